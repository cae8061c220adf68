"""What a search returns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hypothesis:
    """One utterance's recognized tokens, the encoder frame that emitted each, and the log-probability.

    The score is the path's (greedy) or the sum over the paths the beam kept (beam), natural logarithm.
    """

    tokens: list[int]
    frames: list[int]
    score: float


def collect(emitted: Tensor, scores: Tensor, blank: int, slots_per_frame: int = 1) -> list[Hypothesis]:
    """Hypotheses of a grid ``emitted`` (B, T' * slots) of tokens and ``blank``, with their scores (B,)."""
    emitted, scores = emitted.cpu(), scores.cpu()
    hypotheses = []
    for row, score in zip(emitted, scores.tolist(), strict=True):
        slots = (row != blank).nonzero().squeeze(1)
        hypotheses.append(Hypothesis(row[slots].tolist(), (slots // slots_per_frame).tolist(), score))
    return hypotheses


def silent_columns(special_ids: Collection[int], blank: int, device: torch.device) -> Tensor:
    """The tokens that no search emits: the special ones, which stand for no text, but for the blank."""
    return torch.tensor(sorted(set(special_ids) - {blank}), dtype=torch.int64, device=device)
