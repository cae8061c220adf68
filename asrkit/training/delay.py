"""Gradients of older weights, as replicas send them to a parameter server, simulated in the loop's own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from asrkit.training.step import trained_parameters
from asrkit.training.update import Updater


@dataclass(frozen=True)
class Delay:
    """How old the weights are that a step's gradients are computed from.

    theta[n + 1] = theta[n] - rate * gradient(theta[n - staleness]); the first steps use the initial weights. On a quadratic of
    curvature c, plain gradient descent then converges for rate < 2 sin(pi / (2 (2 staleness + 1))) / c.

    staleness: in steps, the same at every step. 0 changes nothing.
    fetch_every: steps between two fetches of the weights; in between, the gradients' weights stay as they are.
    """

    staleness: int = 0
    fetch_every: int = 1

    def version(self, step: int) -> int:
        """The number of the steps that the weights of ``step``'s gradients have behind them."""
        return max(0, step - step % self.fetch_every - self.staleness)

    @contextmanager
    def applied(self, updater: Updater) -> Iterator[None]:
        """Within, the model has the weights that the next step's gradients are computed from.

        What later steps still need of the trained parameters is kept in ``updater.older``, which is saved with the state. Buffers,
        such as masks, are those of now.
        """
        step, older = updater.step, updater.older
        if self.staleness == 0 and self.fetch_every == 1:
            yield
            return
        parameters = trained_parameters(updater.model)
        if step == 0 or (step + self.staleness) % self.fetch_every == 0:  # no later step fetches any other
            older[step] = [parameter.detach().clone() for parameter in parameters]
        version = self.version(step)
        for past in [past for past in older if past < version]:
            del older[past]
        if version == step:
            yield
            return
        now = [parameter.detach().clone() for parameter in parameters]
        _copy(older[version], parameters)
        try:
            yield
        finally:
            _copy(now, parameters)


@torch.no_grad()
def _copy(weights: list[torch.Tensor], parameters: list[torch.nn.Parameter]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
