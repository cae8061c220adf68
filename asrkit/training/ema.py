"""The running average of the weights, which a run publishes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MovingAverage:
    """average += (1 - decay) (weights - average) for trained parameters; buffers are copied.

    Args:
        model: the model that is trained.
        average: a copy of it, changed in place.
    """

    def __init__(self, model: nn.Module, average: nn.Module) -> None:
        pairs = [
            (averaged, weight)
            for averaged, weight in zip(average.parameters(), model.parameters(), strict=True)
            if weight.requires_grad
        ]
        self._average: list[Tensor] = [averaged for averaged, _ in pairs]
        self._weights: list[Tensor] = [weight for _, weight in pairs]
        self._buffers = list(zip(average.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """One step; with a decay of 0 the average becomes the weights, to the last bit."""
        copied = list(self._buffers)
        if decay == 0:  # adding a difference would be off by a rounding error
            copied += zip(self._average, self._weights, strict=True)
        else:  # adding a difference keeps weights that do not move the same to the last bit
            moved = torch._foreach_sub(self._weights, self._average)
            torch._foreach_add_(self._average, moved, alpha=1 - decay)
        for averaged, current in copied:
            averaged.copy_(current)


def average_decay(step: int, most: float) -> float:
    """The decay of ``step`` (from 0): (1 + step) / (10 + step), at most ``most``; early weights count little."""
    return min(most, (1 + step) / (10 + step))
