"""Senones: states of phones in context, tied by a decision tree grown on aligned speech.

Each phone's states begin as one class each; the class whose best question about its left or right neighbor raises the
likelihood most is split, again and again (Young, Odell and Woodland 1994). A class is one diagonal Gaussian of cepstra. The questions
are the clusters of the phones' own means, merged two by two (our choice; Kaldi finds its own too, so no phonetics is needed).
Shapes: C contexts, P phones, D cepstra, Q questions.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from lhotse.supervision import AlignmentItem
from pydantic import Field, TypeAdapter, ValidationError

from asrkit.config import config
from asrkit.data.features import NUM_MEL_BINS
from asrkit.errors import UserError, clip
from asrkit.frames import FRAME_SHIFT
from asrkit.run_dir import read_yaml, write_yaml

EDGE = "#"  # the neighbor of the first and last phone
NUM_CEPSTRA = 13
SMALLEST_VARIANCE = 1e-4
_COSINES = np.cos(np.pi / NUM_MEL_BINS * (np.arange(NUM_MEL_BINS)[:, None] + 0.5) * np.arange(NUM_CEPSTRA))
SIDES = ("left", "right")
MOST_STATES = 3  # of a phone
Node = dict[str, Any]  # {senone} of a leaf, else {side, question, yes, no}


@config
class SenoneConfig:
    """The tree of senones (Young, Odell and Woodland 1994)."""

    number: Annotated[int, Field(ge=1)] = 500
    """About how many senones in all; never fewer than phones times `states`."""
    states: Annotated[int, Field(ge=1, le=MOST_STATES)] = 1
    """States of a phone: 1 (our choice: a frame of 40 ms leaves little room) to 3, as in Kaldi's GMMs."""
    smallest: Annotated[int, Field(ge=1)] = 200
    """Frames of 10 ms every senone must be seen in."""


@dataclass(frozen=True)
class SenoneTree:
    """Which senone a state of a phone is between its neighbors.

    questions: sets of phones; roots: of each phone, a node for each of its states.
    """

    states: int
    questions: list[list[str]]
    roots: dict[str, list[Node]]

    @property
    def senones(self) -> list[str]:
        """Every senone."""
        return [leaf["senone"] for root in itertools.chain(*self.roots.values()) for leaf in _leaves(root)]

    def senones_of(self, phones: Sequence[str]) -> list[str]:
        """The senones of an utterance's phones, ``states`` for each.

        Raises:
            UserError: a phone that the tree was not grown on.
        """
        if missing := sorted({phone for phone in phones if phone not in self.roots}):
            raise UserError(f"the senones know no phone {' '.join(missing)}: the cuts they were made from have none")
        return [
            self._senone(root, left, right) for left, phone, right in in_context(phones) for root in self.roots[phone]
        ]

    def align(self, phones: Sequence[AlignmentItem]) -> list[AlignmentItem]:
        """A phone alignment as one of senones, a phone's time shared evenly among its states."""
        names = iter(self.senones_of([phone.symbol for phone in phones]))
        return [
            AlignmentItem(next(names), start, round(end - start, 4), phone.score)
            for phone in phones
            for start, end in parts_of(phone.start, phone.end, self.states)
        ]

    def _senone(self, node: Node, left: str, right: str) -> str:
        while "senone" not in node:
            neighbor = left if node["side"] == "left" else right
            node = node["yes"] if neighbor in self.questions[node["question"]] else node["no"]
        return node["senone"]


def cepstra_of(log_mel: np.ndarray) -> np.ndarray:
    """(T, 80) -> (T, D), the first cosine coefficients, whose covariance is nearly diagonal."""
    return log_mel @ _COSINES * np.sqrt(2 / NUM_MEL_BINS)


def parts_of(start: float, end: float, count: int) -> list[tuple[float, float]]:
    """An interval in ``count`` equal ones, to a tenth of a millisecond."""
    edges = np.linspace(start, end, count + 1).round(4).tolist()
    return list(itertools.pairwise(edges))


def in_context(phones: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Each phone between its neighbors."""
    around = [EDGE, *phones, EDGE]
    return zip(around, around[1:-1], around[2:], strict=False)


def save_tree(tree: SenoneTree, path: Path) -> None:
    """Write a tree as YAML, atomically."""
    write_yaml(path, {"states": tree.states, "questions": tree.questions, "roots": tree.roots})


def load_tree(path: Path) -> SenoneTree:
    """Read what ``save_tree`` wrote.

    Raises:
        UserError: missing, or something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of senones; asrkit align --unit senone writes one")
    try:
        tree = TypeAdapter(SenoneTree).validate_python(read_yaml(path))
    except ValidationError as error:
        raise UserError(
            f"{path}: not a tree of senones ({error.error_count()} findings); make it again by align"
        ) from error
    if not 1 <= tree.states <= MOST_STATES or not tree.roots:
        raise UserError(
            f"{path}: not a tree of senones (states {clip(tree.states)}, {len(tree.roots)} phones); make it again by align"
        )
    for phone, nodes in tree.roots.items():
        if len(nodes) != tree.states or not all(_is_node(node, len(tree.questions)) for node in nodes):
            raise UserError(f"{path}: not a tree of senones (damaged at phone {clip(phone)}); make it again by align")
    return tree


def _is_node(root: Any, questions: int) -> bool:
    """Whether a node and all below it are what they should be."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict):
            return False
        if {*node} == {"senone"} and isinstance(node["senone"], str):
            continue
        if {*node} != {"side", "question", "yes", "no"} or node["side"] not in SIDES:
            return False
        if type(node["question"]) is not int or not 0 <= node["question"] < questions:
            return False
        waiting += [node["yes"], node["no"]]
    return True


def grow_tree(utterances: Iterable[tuple[Sequence[AlignmentItem], np.ndarray]], settings: SenoneConfig) -> SenoneTree:
    """The tree of aligned utterances.

    Args:
        utterances: the phones of each, and its log-mel features (T, 80) of 10 ms frames.
    """
    contexts = _gather(utterances, settings.states)
    phones = sorted({phone for phone, *_ in contexts})
    number = {name: index for index, name in enumerate([*phones, EDGE])}
    stats = np.stack(list(contexts.values()))
    neighbors = np.array([[number[left], number[right]] for _, _, left, right in contexts])
    sets = _questions(phones, [phone for phone, *_ in contexts], stats)
    asked = np.array([[name in members for name in (*phones, EDGE)] for members in sets], dtype=np.float64)

    queue: list[tuple[float, int, Node, np.ndarray, int, int]] = []
    order = itertools.count()

    def wait(node: Node, rows: np.ndarray) -> None:
        """Put a leaf of these contexts in line, if a question gains something."""
        gain, side, question = _best_question(stats[rows], neighbors[rows], asked, settings.smallest)
        if gain > 0:
            heapq.heappush(queue, (-gain, next(order), node, rows, side, question))

    owners = [(phone, state) for phone, state, _, _ in contexts]
    roots: dict[str, list[Node]] = {phone: [{} for _ in range(settings.states)] for phone in phones}
    for phone, state in sorted(set(owners)):
        wait(roots[phone][state], np.array([row for row, owner in enumerate(owners) if owner == (phone, state)]))
    count = len(phones) * settings.states
    while queue and count < settings.number:
        _, _, node, rows, side, question = heapq.heappop(queue)
        yes, no = {}, {}  # type: tuple[Node, Node]
        node.update(side=SIDES[side], question=question, yes=yes, no=no)
        answers = asked[question, neighbors[rows, side]] > 0
        wait(yes, rows[answers])
        wait(no, rows[~answers])
        count += 1
    for phone, nodes in roots.items():
        for state, root in enumerate(nodes):
            _name(root, f"{phone}.{state}")
    return SenoneTree(settings.states, sets, roots)


def _gather(
    utterances: Iterable[tuple[Sequence[AlignmentItem], np.ndarray]], states: int
) -> dict[tuple[str, int, str, str], np.ndarray]:
    """Number, sum and squares of the cepstra, (1 + 2 D,), of each (phone, state, left neighbor, right neighbor)."""
    contexts: dict[tuple[str, int, str, str], np.ndarray] = defaultdict(lambda: np.zeros(1 + 2 * NUM_CEPSTRA))
    for items, log_mel in utterances:
        cepstra = cepstra_of(log_mel)
        for item, (left, phone, right) in zip(items, in_context([item.symbol for item in items]), strict=True):
            for state, (start, end) in enumerate(parts_of(item.start, item.end, states)):
                first = min(round(start / FRAME_SHIFT), len(cepstra) - 1)
                frames = cepstra[first : max(first + 1, round(end / FRAME_SHIFT))]
                contexts[phone, state, left, right] += np.concatenate(
                    [[len(frames)], frames.sum(axis=0), np.square(frames).sum(axis=0)]
                )
    return dict(contexts)


def _log_likelihood(stats: np.ndarray) -> np.ndarray:
    """Of the frames under their own diagonal Gaussian, (..., 1 + 2 D) -> (...,), without the constants that a split leaves as is."""
    count = np.maximum(stats[..., :1], 1e-9)
    mean, square = np.split(stats[..., 1:] / count, 2, axis=-1)
    return -0.5 * stats[..., 0] * np.log(np.maximum(square - np.square(mean), SMALLEST_VARIANCE)).sum(axis=-1)


def _best_question(
    stats: np.ndarray, neighbors: np.ndarray, asked: np.ndarray, smallest: int
) -> tuple[float, int, int]:
    """What the best question gains in log-likelihood, its side and number; -inf where each leaves too few frames.

    Args:
        stats: (C, 1 + 2 D); neighbors: (C, 2) numbers of the left and right phone; asked: (Q, P + 1), 1 for yes.
    """
    whole = stats.sum(axis=0)
    best = (-np.inf, 0, 0)
    for side in range(len(SIDES)):
        by_phone = np.zeros((asked.shape[1], stats.shape[1]))
        np.add.at(by_phone, neighbors[:, side], stats)
        yes = asked @ by_phone
        no = whole - yes
        gains = _log_likelihood(yes) + _log_likelihood(no) - _log_likelihood(whole)
        gains[(yes[:, 0] < smallest) | (no[:, 0] < smallest)] = -np.inf
        question = int(gains.argmax())
        if gains[question] > best[0]:
            best = (float(gains[question]), side, question)
    return best


def _questions(phones: list[str], owners: list[str], stats: np.ndarray) -> list[list[str]]:
    """Every phone, the edge, and every cluster on the way to one: the two whose union loses the least likelihood are joined."""
    clusters = [
        (frozenset([phone]), stats[[row for row, owner in enumerate(owners) if owner == phone]].sum(axis=0))
        for phone in phones
    ]
    questions = [[EDGE], *([phone] for phone in phones)]
    while len(clusters) > 2:
        each = np.stack([totals for _, totals in clusters])
        loss = -_log_likelihood(each[:, None] + each[None])
        loss += _log_likelihood(each)[:, None] + _log_likelihood(each)[None]
        np.fill_diagonal(loss, np.inf)
        first, second = sorted(int(index) for index in np.unravel_index(loss.argmin(), loss.shape))
        other, other_totals = clusters.pop(second)
        members, totals = clusters.pop(first)
        clusters.append((members | other, totals + other_totals))
        questions.append(sorted(members | other))
    return questions


def _name(node: Node, prefix: str) -> None:
    """Number the leaves below ``node``."""
    for number, leaf in enumerate(_leaves(node)):
        leaf["senone"] = f"{prefix}.{number}"


def _leaves(node: Node) -> list[Node]:
    return [node] if "question" not in node else [*_leaves(node["yes"]), *_leaves(node["no"])]
