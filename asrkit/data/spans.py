"""Spans of frames that are hidden, chosen at random, and the distractors to tell a hidden frame's content from (arXiv 2006.11477).

Shapes: B batch, T' frames, M hidden frames of each row, K distractors. Without any loop over rows or frames.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spans(starts: Tensor, length: int) -> Tensor:
    """Where spans of ``length`` lie that begin at ``starts``: (B, N) bool -> (B, N) bool. The last may be cut off by the end."""
    begun = starts.to(torch.int32).cumsum(1)
    ended = torch.zeros_like(begun)
    ended[:, length:] = begun[:, :-length]
    return begun > ended
