"""The denominator graph: an n-gram of the training texts' tokens, composed with the CTC topology.

A state is what the n-gram remembers, at most n - 1 tokens, together with the last token, which CTC may repeat; there are two of
each: one in which the last token still sounds, and one in which a blank has ended it. Without back-off, exactly the n-grams of the
texts have a path: the composition needs no epsilons, and its size is 2 arcs for each n-gram and 3 for each memory.
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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.run_dir import read_yaml, write_yaml
from asrkit.training.checkpoint import save_tensors

BLANK, END = 0, -1
FILE, DIGEST = "denominator.safetensors", "denominator.yaml"  # in the run directory

History = tuple[int, ...]


@dataclass(frozen=True)
class Denominator:
    """The graph as an acceptor of frames; state 0 is the first, the last one final.

    arcs: (A, 3) int32: from, to, label; sorted by where they come from, then by label. The label is the token of a frame, 0 for
        blank, -1 at the end.
    scores: (A,) float32, the n-gram's log-probabilities where an arc begins a token or ends the sentence, else 0.
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
        """The n-gram's log-probability of a sentence; -inf for one with n-grams that no text had."""
        state, total = 0, 0.0
        for label in (*tokens, END):
            state, score = self._after_blank.get((state, label), (0, -math.inf))
            state, _ = self._after_blank.get((state, BLANK), (state, 0.0))
            total += score
        return total

    @cached_property
    def _after_blank(self) -> dict[tuple[int, int], tuple[int, float]]:
        return {
            (source, label): (target, score)
            for (source, target, label), score in zip(self.arcs.tolist(), self.scores.tolist(), strict=True)
        }


def count_n_grams(sentences: Iterable[Sequence[int]], order: int) -> dict[History, Counter[int]]:
    """How often each token, or ``END``, follows the order - 1 tokens before it, or those from the beginning of the sentence."""
    counts: dict[History, Counter[int]] = defaultdict(Counter)
    for tokens in sentences:
        history: History = ()
        for token in (*tokens, END):
            counts[history][token] += 1
            history = (*history, token)[-(order - 1) :]
    return counts


def make_denominator(sentences: Sequence[Sequence[int]], order: int, max_arcs: int, vocab_size: int) -> Denominator:
    """The graph of sentences, each a list of tokens; probabilities are relative frequencies.

    Args:
        order: at least 2.

    Raises:
        UserError: it would have more than ``max_arcs`` arcs; says which order would fit.
    """
    sizes = {}
    for lower in range(order, 1, -1):
        counts = count_n_grams(sentences, lower)
        sizes[lower] = 2 * sum(map(len, counts.values())) + 3 * len(counts)
        if sizes[lower] > max_arcs:
            continue
        if lower == order:
            return _with_ctc(counts, order)
        break
    advice = "raise lattice.denominator.max_arcs, or train with criterion mwer, which needs no graph"
    if sizes[lower] <= max_arcs:
        advice = f"set lattice.denominator.order={lower} ({sizes[lower]} arcs), or raise lattice.denominator.max_arcs"
    raise UserError(
        f"the denominator graph of order {order} over {vocab_size} tokens would have {sizes[order]} arcs, more than "
        f"lattice.denominator.max_arcs={max_arcs}; {advice}"
    )


def _with_ctc(counts: dict[History, Counter[int]], order: int) -> Denominator:
    """The n-gram with CTC's blanks and repetitions. The state 2 i of history i has the last token ended by a blank, 2 i + 1 has it
    sounding; the first history, the empty one, has no token, and its state 1 is never reached."""
    numbers = {history: number for number, history in enumerate(sorted(counts))}
    final = 2 * len(numbers)
    rows: list[tuple[int, int, int, float, int, int]] = []  # from, to, label, score, current, begins
    for history, number in numbers.items():
        ended, sounding = 2 * number, 2 * number + 1
        last = history[-1] if history else BLANK
        rows.append((ended, ended, BLANK, 0.0, last, 0))
        rows += [(sounding, sounding, last, 0.0, last, 0), (sounding, ended, BLANK, 0.0, last, 0)]
        total = sum(counts[history].values())
        for token, count in counts[history].items():
            score = math.log(count / total)
            for state in (ended, sounding):
                if token == END:
                    rows.append((state, final, END, score, last, 0))
                elif state == ended or token != last:
                    target = 2 * numbers[(*history, token)[-(order - 1) :]] + 1
                    rows.append((state, target, token, score, token, 1))
    rows = sorted(row for row in rows if row[0] != 1)
    columns = list(zip(*rows, strict=True))
    arcs = torch.tensor([row[:3] for row in rows], dtype=torch.int32)
    return Denominator(
        arcs,
        torch.tensor(columns[3], dtype=torch.float32),
        *(torch.tensor(column, dtype=torch.int32) for column in columns[4:]),
    )


def save_denominator(run: Path, graph: Denominator, facts: dict[str, Any]) -> None:
    """Write the graph to a run directory, and beside it ``facts`` and the digest it is known by."""
    tensors = {name: getattr(graph, name) for name in ("arcs", "scores", "current", "begins")}
    save_tensors(run / FILE, tensors)
    write_yaml(
        run / DIGEST, {**facts, "states": graph.num_states, "arcs": len(graph.arcs), "sha256": sha256_of(run / FILE)}
    )


def load_denominator(run: Path) -> tuple[Denominator, str]:
    """The graph of a run directory and its digest.

    Raises:
        UserError: it is missing or not the one that was written.
    """
    if (run / FILE).is_file() and (run / DIGEST).is_file():
        digest = sha256_of(run / FILE)
        if digest == read_yaml(run / DIGEST).get("sha256"):
            try:
                return Denominator(**load_file(run / FILE)), digest
            except (SafetensorError, TypeError):
                pass
    raise UserError(f"{run / FILE}: missing or damaged; remove {run} and train again")
