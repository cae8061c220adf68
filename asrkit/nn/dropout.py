"""Dropout whose mask costs little to draw on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 256  # of a random byte


class Dropout(nn.Module):
    """``nn.Dropout`` with one random byte a value: torch 2 draws a Bernoulli number for each, which is 6 % of a CPU's training step.

    The probability is rounded to 1/256 (our choice), 0.1 to 26/256, and values are scaled by the rounded one, so that their
    expectation stays. Bytes come from torch's generator and are the same in every torch. GPUs, whose own dropout is one kernel, use it.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.scale(1.0)

    def scale(self, factor: float) -> None:
        """Drop ``factor`` times ``p`` from here on."""
        self.current = self.p * factor
        self.dropped_levels = 0 if self.current == 0 else max(1, round(LEVELS * self.current))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.dropped_levels == 0:
            return x
        if x.device.type != "cpu" or self.dropped_levels == LEVELS:
            return F.dropout(x, self.current)
        return x * self._mask(x)

    def _mask(self, x: Tensor) -> Tensor:
        """0 where a value is dropped, elsewhere the factor that makes up for it."""
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)  # type: ignore[call-overload]
        levels = words.view(torch.uint8)[: x.numel()].view(x.shape).to(x.dtype)
        # Whole numbers: those below dropped_levels become 0, the others 1. Comparing bytes would take four times as long.
        kept = levels.sub_(self.dropped_levels - 1).clamp_(0, 1)
        return kept.mul_(LEVELS / (LEVELS - self.dropped_levels))

    def extra_repr(self) -> str:
        return f"p={self.p}"
