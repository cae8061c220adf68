"""The denominator graph: an n-gram of the training texts' tokens, composed with the CTC topology.

A state is what the n-gram remembers, at most n - 1 tokens, together with the last token, which CTC may repeat; there are two of
each: one in which the last token still sounds, and one in which a blank has ended it. The probabilities are interpolated, not
backed off: the composition needs no epsilons, and its size is 2 arcs for each n-gram that has a probability and 3 for each memory.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.methods.sequence.config import DenominatorConfig
from asrkit.run_dir import TOKENIZER, read_yaml, write_yaml
from asrkit.training.checkpoint import save_tensors

BLANK, END, BEGIN = 0, -1, -2
FILE, DIGEST = "denominator.safetensors", "denominator.yaml"  # in the run directory

History = tuple[int, ...]


@dataclass(frozen=True)
class Denominator:
    """The graph as an acceptor of frames; state 0 is the first, the last one final.

    arcs: (A, 3) int32: from, to, label; sorted. The label is the token of a frame, 0 for blank, -1 at the end.
    scores: (A,) float32, the n-gram's scaled log-probabilities where an arc begins a token or ends the sentence, else 0.
    current: (A,) int32, the last token after the arc, 0 before the first.
    begins: (A,) int32, 1 where the arc begins a token.
    """

    arcs: Tensor
    scores: Tensor
    current: Tensor
    begins: Tensor

    @property
    def num_states(self) -> int:
        return int(self.arcs[:, 1].max()) + 1

    def fsa(self, k2: ModuleType, device: torch.device) -> Any:
        """As an acceptor of k2 with the attributes lm, current and begins."""
        bits = self.scores.view(torch.int32).unsqueeze(1)
        fsa = k2.Fsa(torch.cat([self.arcs, bits], dim=1).to(device))
        fsa.lm, fsa.current, fsa.begins = (t.to(device) for t in (self.scores, self.current, self.begins))
        return k2.arc_sort(fsa)

    def log_prob(self, tokens: Sequence[int]) -> float:
        """The n-gram's scaled log-probability of a sentence; -inf for one that has no path."""
        state, total = 0, 0.0
        for label in (*tokens, END):
            state, score = self._follow(state, label, (0, -math.inf))
            state, _ = self._follow(state, BLANK, (state, 0.0))
            total += score
        return total

    def _follow(self, state: int, label: int, otherwise: tuple[int, float]) -> tuple[int, float]:
        """Where the arc with ``label`` leads, and its score."""
        keys, order = self._sorted
        key = _key(state, label)
        place = int(np.searchsorted(keys, key))
        if place == len(keys) or keys[place] != key:
            return otherwise
        arc = int(order[place])
        return int(self.arcs[arc, 1]), float(self.scores[arc])

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """The arcs' states and labels as numbers (A,) in order, and which arcs they are; a graph may have millions."""
        sources, _, labels = self.arcs.numpy().astype(np.int64).T
        keys = _key(sources, labels)
        order = keys.argsort()
        return keys[order], order


def _key(source: Any, label: Any) -> Any:
    return (source << 32) + (label - END)


def count_n_grams(sentences: Iterable[Sequence[int]], order: int) -> dict[History, Counter[int]]:
    """How often each token, or ``END``, follows the order - 1 tokens before it, and how often the fewer ones, down to none.
    Before the first token is ``BEGIN``."""
    counts: dict[History, Counter[int]] = defaultdict(Counter)
    for tokens in sentences:
        history: History = (BEGIN,)
        for token in (*tokens, END):
            for start in range(len(history) + 1):
                counts[history[start:]][token] += 1
            history = (*history, token)[-(order - 1) :]
    return counts


def make_denominator(sentences: Sequence[Sequence[int]], how: DenominatorConfig, tokens: Sequence[int]) -> Denominator:
    """The graph of sentences, each a list of tokens.

    Args:
        tokens: all that can be emitted.

    Raises:
        UserError: it would have more than ``how.max_arcs`` arcs; says which order would fit.
    """
    smaller = [(order, how.interpolation) for order in range(how.order, 1, -1)]
    smaller += [(how.order, 0.0)] if how.interpolation > 0 else []
    size = 0
    for order, interpolation in smaller:
        counts = count_n_grams(sentences, order)
        histories = _histories(counts, order, tokens if interpolation > 0 else ())
        following = [len(tokens) + 1 if interpolation > 0 else len(counts[history]) for history in histories]
        arcs = 2 * sum(following) + 3 * len(histories)
        size = size or arcs
        if arcs > how.max_arcs:
            continue
        if arcs == size:
            return _with_ctc(counts, histories, how, tokens)
        change = f"order={order}" if interpolation == how.interpolation else f"interpolation={interpolation:g}"
        advice = f"set lattice.denominator.{change} ({arcs} arcs), or raise lattice.denominator.max_arcs"
        break
    else:
        advice = "raise lattice.denominator.max_arcs, or train with criterion mwer, which needs no graph"
    raise UserError(
        f"the denominator graph of order {how.order} over {len(tokens)} tokens would have {size} arcs, more than "
        f"lattice.denominator.max_arcs={how.max_arcs}; {advice}"
    )


def _histories(counts: dict[History, Counter[int]], order: int, tokens: Sequence[int]) -> list[History]:
    """What the states remember, that of the first one first. With ``tokens``, which may then follow anything, also shorter ones."""
    if tokens:
        return sorted({history for history in counts if history} | {(token,) for token in tokens})
    return sorted(history for history in counts if len(history) == order - 1 or history[:1] == (BEGIN,))


def _probabilities(
    counts: dict[History, Counter[int]], history: History, interpolation: float, tokens: Sequence[int]
) -> dict[int, float]:
    """Those above 0 of what follows a history: its relative frequencies, interpolated with those of one token less, down to
    equal probabilities of all ``tokens`` and the end."""
    found = dict.fromkeys((*tokens, END), 1 / (len(tokens) + 1))
    for start in range(len(history), -1, -1):
        if seen := counts.get(history[start:]):
            total = sum(seen.values())
            found = {token: interpolation * found.get(token, 0.0) for token in {**found, **seen}}
            for token, count in seen.items():
                found[token] += (1 - interpolation) * count / total
    return {token: probability for token, probability in found.items() if probability > 0}


def _with_ctc(
    counts: dict[History, Counter[int]], histories: Sequence[History], how: DenominatorConfig, tokens: Sequence[int]
) -> Denominator:
    """The n-gram with CTC's blanks and repetitions. The state 2 i of history i has the last token ended by a blank, 2 i + 1 has it
    sounding; the first history has no token, and its state 1 is never reached."""
    numbers = {history: number for number, history in enumerate(histories)}
    final = 2 * len(numbers)
    rows: list[tuple[int, int, int, float, int, int]] = []  # from, to, label, score, current, begins
    for history, number in numbers.items():
        ended, sounding = 2 * number, 2 * number + 1
        last = max(history[-1], BLANK)
        rows.append((ended, ended, BLANK, 0.0, last, 0))
        rows += [(sounding, sounding, last, 0.0, last, 0), (sounding, ended, BLANK, 0.0, last, 0)]
        for token, probability in _probabilities(counts, history, how.interpolation, tokens).items():
            score = how.lm_scale * math.log(probability)
            if token == END:
                rows += [(state, final, END, score, last, 0) for state in (ended, sounding)]
                continue
            longest = (*history, token)[-(how.order - 1) :]
            target = next(numbers[longest[start:]] for start in range(len(longest)) if longest[start:] in numbers)
            rows += [
                (state, 2 * target + 1, token, score, token, 1)
                for state in (ended, sounding)
                if state == ended or token != last
            ]
    rows = sorted(row for row in rows if row[0] != 1)
    columns = list(zip(*rows, strict=True))
    arcs = torch.tensor([row[:3] for row in rows], dtype=torch.int32)
    return Denominator(
        arcs,
        torch.tensor(columns[3], dtype=torch.float32),
        *(torch.tensor(column, dtype=torch.int32) for column in columns[4:]),
    )


def save_denominator(run: Path, graph: Denominator, facts: dict[str, Any]) -> None:
    """Write the graph to a run directory, and beside it ``facts`` and the digests of it and of the run's tokenizer."""
    tensors = {name: getattr(graph, name) for name in ("arcs", "scores", "current", "begins")}
    save_tensors(run / FILE, tensors)
    sizes = {"states": graph.num_states, "arcs": len(graph.arcs)}
    digests = {"sha256": sha256_of(run / FILE), "tokenizer_sha256": sha256_of(run / TOKENIZER)}
    write_yaml(run / DIGEST, {**facts, **sizes, **digests})


def load_denominator(run: Path) -> tuple[Denominator, str]:
    """The graph of a run directory and its digest.

    Raises:
        UserError: it is missing or not the one that was written, or of another tokenizer than the run.
    """
    if (run / FILE).is_file() and (run / DIGEST).is_file():
        digest = sha256_of(run / FILE)
        facts = read_yaml(run / DIGEST)
        if isinstance(facts, dict) and digest == facts.get("sha256"):
            if facts.get("tokenizer_sha256") != sha256_of(run / TOKENIZER):
                raise UserError(
                    f"{run / FILE}: belongs to another tokenizer than that of the run; remove {run} and train again"
                )
            try:
                return Denominator(**load_file(run / FILE)), digest
            except (SafetensorError, TypeError):
                pass
    raise UserError(f"{run / FILE}: missing or damaged; remove {run} and train again")
