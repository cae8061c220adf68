"""The loss of a language model: how unlikely it finds each next symbol and the end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sequence_nll(logits: Tensor, symbols: Tensor, symbol_lens: Tensor) -> Tensor:
    """-log P of each sequence and its end, (B,) float32.

    Args:
        logits: (B, N + 1, V), at n of what follows the first n symbols; the end is class 0.
        symbols: (B, N) int64 padded with 0; symbol_lens: (B,).
    """
    targets = F.pad(symbols, (0, 1))  # the padding's 0 is the end's class, so it stands right after each last symbol
    nll = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    beyond = torch.arange(targets.shape[1], device=symbols.device) > symbol_lens.unsqueeze(1)
    return nll.masked_fill(beyond, 0.0).sum(dim=1)
