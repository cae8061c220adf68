"""Masks in time and channel between the two halves of an encoder: what SpecAugment is to features (arXiv 2006.11477, section 4.3).

Shapes: B batch, T' encoder frames of 40 ms, D model dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from asrkit.data.spans import spans
from asrkit.devices import send


class SpanMasks(nn.Module):
    """In training, hides spans of frames, in whose place comes one vector, and spans of channels, which become 0.

    Every frame, and every channel of an utterance, begins a span with some probability; spans may overlap.

    Args:
        vector: (D,), that of the pretraining; it is not trained further (our choice).
        time, channels: the probability of a beginning, and the length of a span; a probability of 0 masks nothing.
    """

    vector: Tensor

    def __init__(self, vector: Tensor, time: tuple[float, int], channels: tuple[float, int]) -> None:
        super().__init__()
        self.time, self.channels = time, channels
        self._keeps = False
        self._kept: tuple[Tensor, Tensor] | None = None
        self.register_buffer("vector", vector.clone(), persistent=False)  # it serves training alone

    def forward(self, x: Tensor) -> Tensor:
        """(B, T', D) -> (B, T', D). Drawn on the CPU, so that every device masks the same."""
        if not self.training:
            return x
        time, channels = self._kept or self._draw(x)
        if self._keeps:
            self._kept = time, channels
        x = torch.where(time.unsqueeze(-1), self.vector.to(x.dtype), x)
        return x.masked_fill(channels.unsqueeze(1), 0.0)

    @contextmanager
    def one_draw(self) -> Iterator[None]:
        """Within, every pass of a batch hides the same, as it has the same features; else a distillation from one pass to another
        would compare what they see."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps, self._kept = False, None

    def _draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T') and (B, D) bool, True where hidden, on the device of ``x``."""
        batch, frames, dim = x.shape
        time, channels = self._drawn(batch, frames, *self.time), self._drawn(batch, dim, *self.channels)
        return send(time, x.device), send(channels, x.device)

    @staticmethod
    def _drawn(batch: int, size: int, probability: float, length: int) -> Tensor:
        """(batch, size) bool, True within a span."""
        return spans(torch.rand(batch, size) < probability, length)
