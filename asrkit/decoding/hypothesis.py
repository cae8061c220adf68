"""What a search returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SCORED_AT_ONCE = 256  # texts
_ODD_CONSTANT = 0x1E3779B97F4A7C15  # spreads a hash's bits (the golden ratio, as in Fibonacci hashing)


@dataclass(frozen=True)
class Hypothesis:
    """One utterance's recognized tokens, the encoder frame that emitted each, and the log-probability.

    The score is the path's (greedy) or the sum over the paths the beam kept (beam), natural logarithm. ``posteriors``: the
    probability of each token by a lattice; [] of a search without one.
    """

    tokens: list[int]
    frames: list[int]
    score: float
    posteriors: list[float] = field(default_factory=list)


def collect(emitted: Tensor, scores: Tensor, blank: int, slots_per_frame: int = 1) -> list[Hypothesis]:
    """Hypotheses of a grid ``emitted`` (B, T' * slots) of tokens and ``blank``, with their scores (B,)."""
    emitted, scores = emitted.cpu(), scores.cpu()
    hypotheses = []
    for row, score in zip(emitted, scores.tolist(), strict=True):
        slots = (row != blank).nonzero().squeeze(1)
        hypotheses.append(Hypothesis(row[slots].tolist(), (slots // slots_per_frame).tolist(), score))
    return hypotheses


def collect_n_best(emitted: Tensor, scores: Tensor, blank: int) -> list[list[Hypothesis]]:
    """Hypotheses of a grid ``emitted`` (B, N, T') of tokens and ``blank``, with their scores (B, N), in their order; those of
    score -inf are left out, but for an utterance's first."""
    batch, count, _ = emitted.shape
    flat = collect(emitted.flatten(0, 1), scores.flatten(), blank)
    rows = [flat[row * count : (row + 1) * count] for row in range(batch)]
    return [[h for n, h in enumerate(row) if n == 0 or h.score > -math.inf] for row in rows]


def silent_columns(special_ids: Collection[int], blank: int, device: torch.device) -> Tensor:
    """The tokens that no search emits: the special ones, which stand for no text, but for the blank."""
    return torch.tensor(sorted(set(special_ids) - {blank}), dtype=torch.int64, device=device)


class NBest(NamedTuple):
    """Each utterance's hypotheses, for training; no two of an utterance have the same tokens."""

    tokens: Tensor  # (B, N, U) int64, blank after the last one; U is at least 1
    lens: Tensor  # (B, N) int64
    scores: Tensor  # (B, N) log-probabilities as the search has them, -inf where there are fewer than N hypotheses


def traced(parents: Sequence[Tensor], emitted: Sequence[Tensor], ends: Tensor) -> Tensor:
    """What the hypotheses ``ends`` (B, N) of the last frame emitted in each frame: (B, N, T').

    Args:
        parents, emitted: for each frame, (B, K): the hypothesis of the frame before, and the token or blank.
    """
    path = []
    for parent, tokens in zip(reversed(parents), reversed(emitted), strict=True):
        path.append(tokens.gather(1, ends))
        ends = parent.gather(1, ends)
    return torch.stack(path[::-1], dim=2) if path else ends.new_zeros(*ends.shape, 0)


def n_best_of(emitted: Tensor, scores: Tensor, blank: int) -> NBest:
    """The tokens of a grid (B, N, T') of tokens and blanks, with their scores (B, N)."""
    tokens, lens = without_blanks(emitted, blank)
    return NBest(tokens, lens, scores)


def without_blanks(emitted: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """The tokens of each row of (B, N, T') in their order, (B, N, U) with blanks at the end, and their number (B, N)."""
    emits = emitted != blank
    lens = emits.sum(dim=2)
    places = torch.where(emits, emits.cumsum(dim=2) - 1, emitted.shape[2])  # blanks go to one place past the end
    room = emitted.new_full((*emitted.shape[:2], emitted.shape[2] + 1), blank)
    tokens = room.scatter(2, places, emitted)
    longest = max(1, int(lens.max()) if lens.numel() else 1)
    return tokens[:, :, : min(longest, tokens.shape[2])], lens


def append_hash(prefixes: Tensor, tokens: Tensor) -> Tensor:
    """64-bit hashes of token sequences, each with one token appended: a polynomial, which wraps around on purpose."""
    return (tokens + 1).add(prefixes, alpha=_ODD_CONSTANT)


Scorer = Callable[[Tensor, Tensor], Tensor]  # tokens (N, U), padded with 0, and lengths (N,) to scores (N,)


def rescored(n_best: Sequence[Sequence[Hypothesis]], scorer: Scorer) -> list[list[Hypothesis]]:
    """N-best lists of a batch by their score and what ``scorer`` gives their tokens, the best one first."""
    texts = [torch.tensor(h.tokens, dtype=torch.int64) for hypotheses in n_best for h in hypotheses]
    gains: list[float] = []
    for begin in range(0, len(texts), SCORED_AT_ONCE):
        part = texts[begin : begin + SCORED_AT_ONCE]
        gains += scorer(pad_sequence(part, batch_first=True), torch.tensor([len(text) for text in part])).tolist()
    scores = iter(gains)
    return [
        sorted(
            (Hypothesis(h.tokens, h.frames, h.score + next(scores)) for h in hypotheses),
            key=lambda hypothesis: -hypothesis.score,
        )
        for hypotheses in n_best
    ]
