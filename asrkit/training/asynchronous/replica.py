"""A replica of the model in a process of its own: it computes gradients of the batches whose numbers it is given.

It rebuilds the task from the recipe and reads its data itself. What it sends are sums and gradients; the ids of cuts only where
gradients are not finite.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asrkit.data.ray_session import versions
from asrkit.errors import UserError
from asrkit.training.config import resolve_precision
from asrkit.training.own_data import Report
from asrkit.training.session import TaskRecipe
from asrkit.training.step import Arithmetic, compute_gradients, metric_sums, trained_parameters
from asrkit.training.update import norm_of

Arrays = list[Any]  # of each parameter of a part, its numpy array, or None for a missing gradient


@dataclass(frozen=True)
class Push:
    """The sums over the batches of an item, as in ``StepResult``, without the gradients.

    metrics: totals and divisors. finite: of each batch, where the gradients are not finite, its cut ids and whether their losses are.
    """

    count: float
    audio: float
    waited: float
    metrics: dict[str, tuple[float, float | None]]
    finite: list[tuple[list[str], list[bool]]]


class Replica:
    """Computes gradients of one model, with weights that it is sent.

    Args:
        threads: for a CPU. gpu: computes on the GPU that this process sees. folder: where paths are relative to, if it exists here.
    """

    def __init__(self, threads: int, gpu: bool, folder: str) -> None:
        with suppress(OSError):  # on another machine it may not exist
            os.chdir(folder)
        torch.set_num_threads(threads)
        self._device = torch.device("cuda:0" if gpu else "cpu")

    def versions(self) -> dict[str, str]:
        return versions()

    def pid(self) -> int:
        return os.getpid()

    def check_own(self, check: Callable[[Path], Report], manifest: Path) -> Report:
        """``check`` of this replica's own manifest."""
        return check(manifest)

    def begin(self, recipe: TaskRecipe, parts: Sequence[Sequence[int]]) -> int:
        """Build the task; returns the number of steps in which its data are seen once.

        Args:
            parts: the indices of the trained parameters that are sent together.

        Raises:
            UserError: what the stage's ``build`` raises.
        """
        self._task = recipe.rebuild()
        self._model = self._task.model.to(self._device)
        self._parameters, self._parts = trained_parameters(self._model), parts
        self._seed = recipe.settings.seed
        self._arithmetic = Arithmetic(self._device, resolve_precision(recipe.settings.training, self._device))
        if self._arithmetic.dtype == torch.float16:
            raise UserError("replicas compute in bfloat16 or float32; set training.precision to one of them")
        self._batches = Ahead(self._task.batches, recipe.settings.data.num_workers, self._device)
        return self._task.batches.plan.steps_per_epoch

    def compute(self, numbers: Sequence[int], next_numbers: Sequence[int], *weights: Arrays) -> list[Any]:
        """The gradients of the batches ``numbers``: a ``Push``, and for each part the arrays of its parameters' gradients.

        Args:
            next_numbers: batches that will probably be asked for next. weights: of each part; none to keep those from before.

        Raises:
            UserError: unreadable audio, out of memory.
        """
        if weights:
            self.load(weights)
        self._batches.make(numbers, next_numbers)
        result = compute_gradients(self._task, self._model, self._batches, numbers, self._seed, self._arithmetic)
        norm = float(norm_of([gradient for gradient in result.gradients if gradient is not None]))
        bad = [] if math.isfinite(norm) else [(ids, finite.tolist()) for ids, finite in result.finite]
        push = Push(result.count, result.audio, result.waited, metric_sums(result.metrics), bad)
        return [push, *(arrays(result.gradients[index] for index in part) for part in self._parts)]

    @torch.no_grad()
    def load(self, weights: Sequence[Arrays]) -> None:
        """Set the weights of all parts."""
        for part, values in zip(self._parts, weights, strict=True):
            for index, value in zip(part, values, strict=True):
                self._parameters[index].copy_(torch.tensor(value))


def arrays(tensors: Iterable[torch.Tensor | None]) -> Arrays:
    """Tensors as arrays in this process's memory."""
    return [None if tensor is None else tensor.detach().cpu().numpy() for tensor in tensors]


class Ahead:
    """Batches by number, made ahead in threads: a replica knows its next item only when it begins one.

    Args:
        num_workers: threads; 0 makes batches when they are needed.
    """

    def __init__(self, batches: Any, num_workers: int, device: torch.device) -> None:
        self._source, self._device = batches, device
        self._threads = ThreadPoolExecutor(num_workers) if num_workers else None
        self._made: dict[int, Future[Any]] = {}

    def make(self, numbers: Sequence[int], next_numbers: Sequence[int]) -> None:
        """Make these batches, the first ones first, and forget all others."""
        wanted = [*numbers, *next_numbers]
        for number in [number for number in self._made if number not in wanted]:
            self._made.pop(number).cancel()
        if self._threads is not None:
            for number in wanted:
                if number not in self._made:
                    self._made[number] = self._threads.submit(self._source.__getitem__, number)

    def __getitem__(self, number: int) -> tuple[Any, float]:
        began = time.monotonic()
        future = self._made.pop(number, None)
        batch = self._source[number] if future is None else future.result()
        return batch.to(self._device), time.monotonic() - began


def summed(pushes: Sequence[Sequence[Any]]) -> list[torch.Tensor | None]:
    """The sums of arrays, in order; one that is missing counts as zeros, and stays missing where all miss it."""
    sums: list[torch.Tensor | None] = []
    for values in zip(*pushes, strict=True):
        present = [value for value in values if value is not None]
        total = present[0].copy() if present else None  # what another process has sent cannot be changed
        for other in present[1:]:
            total += other
        sums.append(None if total is None else torch.from_numpy(total))
    return sums
