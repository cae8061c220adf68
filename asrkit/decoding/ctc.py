"""Greedy search for CTC."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import pad

from asrkit.decoding.hypothesis import Hypothesis, collect, silent_columns


@torch.no_grad()
def ctc_greedy_search(
    log_probs: Tensor, lens: Tensor, blank: int = 0, special_ids: Collection[int] = ()
) -> list[Hypothesis]:
    """The best symbol at each frame of ``log_probs`` (B, T', V) but for ``special_ids``, without repeats and blanks.

    A repeated symbol counts at its first frame.
    """
    silent = silent_columns(special_ids, blank, log_probs.device)
    best, tokens = log_probs.index_fill(2, silent, -torch.inf).max(dim=-1)  # (B, T')
    valid = torch.arange(tokens.shape[1], device=tokens.device) < lens.unsqueeze(1)
    repeated = tokens == pad(tokens[:, :-1], (1, 0), value=blank)
    emitted = tokens.masked_fill(repeated | ~valid, blank)
    return collect(emitted, best.masked_fill(~valid, 0.0).sum(dim=1), blank)
