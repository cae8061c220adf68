"""Several server processes, each with some of the parameters, their optimizer and their average."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from asrkit.training.asynchronous.replica import Arrays, arrays, summed
from asrkit.training.ema import MovingAverage, average_decay
from asrkit.training.optim import make_optimizer
from asrkit.training.session import TaskRecipe
from asrkit.training.step import StepResult, trained_parameters
from asrkit.training.update import Updater, clip, copy_of, divided, norms_of


def partition(sizes: Sequence[int], shards: int) -> list[list[int]]:
    """The indices of the parameters of each shard, of about equal size in all: the largest first, to the emptiest."""
    parts: list[list[int]] = [[] for _ in range(min(shards, len(sizes)))]
    filled = [0] * len(parts)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        emptiest = filled.index(min(filled))
        parts[emptiest].append(index)
        filled[emptiest] += sizes[index]
    return [sorted(part) for part in parts]


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state of a parameter, as a shard gets it, which has no GPU."""
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


class Shard:
    """The second half of a step for some of the parameters; ``Updater`` does the same for all of them."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def begin(self, recipe: TaskRecipe, part: Sequence[int]) -> None:
        """Build the model, of which the parameters of the indices ``part`` are this shard's."""
        task = recipe.rebuild()
        self._settings, self._after_step = recipe.settings.training, task.after_step
        self._model = task.model
        for index, parameter in enumerate(trained_parameters(self._model)):
            parameter.requires_grad_(index in set(part))
        self._average = copy_of(self._model)
        self._follow = MovingAverage(self._model, self._average)
        self._parameters = trained_parameters(self._model)
        names = {name for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        self._averages = [parameter for name, parameter in self._average.named_parameters() if name in names]
        self._optimizer = make_optimizer(self._parameters, self._settings.optimizer)

    @torch.no_grad()
    def load(self, weights: Arrays, averages: Arrays, states: Sequence[dict[str, torch.Tensor]]) -> None:
        """Set the parameters, their averages and their optimizer's state."""
        for parameter, average, weight, mean, state in zip(
            self._parameters, self._averages, weights, averages, states, strict=True
        ):
            parameter.copy_(torch.tensor(weight))
            average.copy_(torch.tensor(mean))
            if state:
                self._optimizer.state[parameter] = dict(state)

    def pid(self) -> int:
        return os.getpid()

    def weights(self) -> Arrays:
        return arrays(self._parameters)

    def state(self) -> tuple[Arrays, Arrays, list[dict[str, torch.Tensor]]]:
        """What ``load`` takes."""
        states = [
            {key: value.clone() for key, value in self._optimizer.state[parameter].items() if value is not None}
            for parameter in self._parameters
        ]
        return arrays(self._parameters), arrays(self._averages), states

    def receive(self, count: float, *pushes: Arrays) -> list[Any]:
        """Take the gradients of some pushes; returns the norm of the mean of each, None where there is none."""
        gradients = summed(pushes)
        norms = iter(norms_of(divided(gradients, count)))
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return [None if gradient is None else next(norms).numpy() for gradient in gradients]

    def move(self, norm: float, rate: float) -> None:
        """Change the weights by the gradients, whose norm is that of all shards together."""
        clip([parameter.grad for parameter in self._parameters], norm, self._settings.optimizer.max_gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()

    def follow(self, step: int) -> None:
        """Update the average, and call the task's hook, as ``Updater`` does."""
        if self._after_step is not None:
            self._after_step(self._model, step)
        self._follow.follow(average_decay(step, self._settings.average_decay))
        if self._after_step is not None:
            self._after_step(self._average, step)


class ShardedUpdater(Updater):
    """An updater whose weights, average and optimizer are in shards; its own are those of the last ``read``, which it saves.

    Args:
        actors: of ``Shard``, one for each of ``parts``, which have begun. get: waits for the results of their methods.
    """

    def __init__(
        self, *arguments: Any, actors: Sequence[Any], parts: Sequence[Sequence[int]], get: Callable[[Any], Any]
    ) -> None:
        super().__init__(*arguments)
        self._actors, self._parts, self._get = actors, parts, get
        self._averages = [
            average
            for average, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True)
            if parameter.requires_grad
        ]
        self._pushes: Sequence[Sequence[Any]] = []
        for actor, part in zip(actors, parts, strict=True):
            states = [_on_cpu(self.optimizer.state[self._trained[index]]) for index in part]
            weights = [arrays(tensors[index] for index in part) for tensors in (self._trained, self._averages)]
            get(actor.load.remote(*weights, states))

    def weights(self) -> list[Any]:
        """References to the weights of each shard, as of now."""
        return [actor.weights.remote() for actor in self._actors]

    def gather(self, pushes: Sequence[Sequence[Any]]) -> list[torch.Tensor | None]:
        """Note which pushes the next step is made of; their gradients go to the shards alone."""
        self._pushes = pushes
        return []

    def read(self) -> None:
        """Bring the shards' state here."""
        states = self._get([actor.state.remote() for actor in self._actors])
        with torch.no_grad():
            for part, (weights, averages, optimizer) in zip(self._parts, states, strict=True):
                for index, weight, average, state in zip(part, weights, averages, optimizer, strict=True):
                    self._trained[index].copy_(torch.tensor(weight))
                    self._averages[index].copy_(torch.tensor(average))
                    if state:
                        self.optimizer.state[self._trained[index]] = dict(state)

    def _receive(self, result: StepResult) -> float:
        answers = [
            actor.receive.remote(result.count, *(push[number] for push in self._pushes))
            for number, actor in enumerate(self._actors)
        ]
        norms: dict[int, Any] = {}
        for part, of_part in zip(self._parts, self._get(answers), strict=True):
            norms |= dict(zip(part, of_part, strict=True))
        present = [norms[index] for index in sorted(norms) if norms[index] is not None]
        return float(torch.from_numpy(np.stack(present)).norm()) if present else 0.0

    def _move(self, norm: float) -> None:
        for actor in self._actors:
            actor.move.remote(norm, self._rate)

    def _follow(self) -> None:
        for actor in self._actors:
            actor.follow.remote(self.step)

    def _check(self) -> None:
        self.read()
        super()._check()
