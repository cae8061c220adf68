"""Greedy search for CTC."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from asrkit.decoding.hypothesis import Hypothesis, collect


@torch.no_grad()
def ctc_greedy_search(log_probs: Tensor, lens: Tensor, blank: int = 0) -> list[Hypothesis]:
    """The best symbol at each frame of ``log_probs`` (B, T', V), without repeats and blanks.

    A repeated symbol counts at its first frame. ``<unk>`` is an ordinary symbol here, as in the runtime.
    """
    best, tokens = log_probs.max(dim=-1)  # (B, T')
    valid = torch.arange(tokens.shape[1], device=tokens.device) < lens.unsqueeze(1)
    repeated = tokens == pad(tokens[:, :-1], (1, 0), value=blank)
    emitted = tokens.masked_fill(repeated | ~valid, blank)
    return collect(emitted, best.masked_fill(~valid, 0.0).sum(dim=1), blank)
