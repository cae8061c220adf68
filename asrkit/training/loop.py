"""The one training loop: it calls the two halves of a step, in one process or in several that share every step.

Everything random is seeded from (seed, slice, step), and the state on disk is complete, so a run that is killed at any
moment and started again ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from asrkit.training.checkpoint import Progress
from asrkit.training.config import TrainingConfig, autocast
from asrkit.training.delay import Delay
from asrkit.training.distributed import World, sum_gradients
from asrkit.training.step import BatchStream, StepResult, TrainTask, compute_gradients, seed_for, set_training
from asrkit.training.stopping import Interrupted, watched_signals
from asrkit.training.update import Publish, Updater

NO_DELAY = Delay()


def train(
    task: TrainTask,
    run: Path,
    settings: TrainingConfig,
    num_workers: int,
    seed: int,
    world: World,
    publish: Publish,
    delay: Delay = NO_DELAY,
) -> Progress:
    """Train to ``settings.steps``; if ``run`` holds a state, resume from it.

    Every process computes the gradients of its share of a step's batches; they are summed, and every process applies the sum.

    Args:
        publish: (averaged model, step, metrics): writes the run's weights and lineage; called in the main process only.
        delay: from which weights the gradients are computed; by default from those of now.

    Raises:
        UserError: losses that stay non-finite, an unusable state, no room to write, a loader process that died.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    updater = Updater(task, run, settings, task.batches.slices, world, publish)
    numbers = OwnNumbers(updater.step, settings.steps, task.batches.slices, world)
    with watched_signals() as stopping, updater.log:
        stream = BatchStream(task.batches, numbers, num_workers, world.device)
        with stream.deaths_named():
            stop = updater.measure(stopping) if updater.progress.measure_due else 0
            while not stop and updater.step < settings.steps:
                own = numbers.of_step(updater.step)
                updater.set_rate()
                if task.before_step is not None:
                    _before_step(task, updater, stream, own[0], seed)
                with delay.applied(updater):
                    result = compute_gradients(task, updater.model, stream, own, seed, updater.arithmetic)
                stream.fetch()
                # Checked once per step; a later signal waits for the next step, so the run never stops without saving.
                stop = _sum(world, result, stopping.code, list(updater.model.parameters()))
                updater.apply(result)
                stop = updater.finish_step(stop, stopping)
    if stop:
        raise Interrupted(stop)
    return updater.progress


class OwnNumbers(Sequence[int]):
    """The numbers of the batches that this process computes from step ``start`` on, in order.

    Raises:
        ValueError: the processes cannot share the slices of a step evenly.
    """

    def __init__(self, start: int, steps: int, slices: int, world: World) -> None:
        if slices % world.size:
            raise ValueError(f"{world.size} processes cannot share {slices} batches per step evenly")
        self._start, self._steps, self._slices, self._world = start, steps, slices, world

    def of_step(self, step: int) -> range:
        """The numbers of one step."""
        return range(step * self._slices + self._world.rank, (step + 1) * self._slices, self._world.size)

    def __len__(self) -> int:
        return max(0, self._steps - self._start) * (self._slices // self._world.size)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        step, part = divmod(range(len(self))[index], self._slices // self._world.size)
        return self.of_step(self._start + step)[part]


def _before_step(task: TrainTask, updater: Updater, stream: BatchStream, number: int, seed: int) -> None:
    """Call the task's hook, with the model in training mode and in the precision of training."""
    assert task.before_step is not None
    set_training(task, updater.model)
    torch.manual_seed(seed_for(seed, number, task.batches.slices))
    batch, _ = stream.peek(number)
    with autocast(updater.arithmetic.device, updater.arithmetic.dtype):
        task.before_step(updater.model, updater.optimizer, updater.step, batch)


def _sum(world: World, result: StepResult, stop: int, parameters: list[torch.Tensor]) -> int:
    """Sum a step over all processes, in place; returns the main process's exit code, 0 to go on."""
    if world.size == 1:
        return stop
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    numbers = [result.count, result.audio, float(stop if world.is_main else 0)]
    result.gradients, totals = sum_gradients(world, result.gradients, trained, numbers)
    result.count, result.audio = totals[:2]
    return int(totals[2])
