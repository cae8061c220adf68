"""The second half of a training step, which applies the gradients: clipping, optimizer, averaging, skipping, progress,
measuring, saving and publishing. ``step.py`` is the first half.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from asrkit.errors import UserError
from asrkit.training.checkpoint import Progress, check_finite, load_state, save_state
from asrkit.training.config import TrainingConfig, make_scaler, resolve_precision
from asrkit.training.distributed import World, all_sum, broadcast_object, gather_lists, sum_over_processes
from asrkit.training.ema import MovingAverage, average_decay
from asrkit.training.logs import RunLog
from asrkit.training.optim import learning_rate, make_optimizer
from asrkit.training.step import (
    Arithmetic,
    Metric,
    StepResult,
    TrainTask,
    add_metrics,
    metric_sums,
    trained_parameters,
)
from asrkit.training.stopping import Stopped, Stopping


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of a model that is not trained, such as its average."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def divided(gradients: Sequence[Tensor | None], count: float) -> list[Tensor]:
    """The gradients that are there, divided by ``count`` in place."""
    present = [gradient for gradient in gradients if gradient is not None]
    if present:
        torch._foreach_div_(present, count)
    return present


def norms_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The norm () of each gradient."""
    return list(torch._foreach_norm(list(gradients))) if gradients else []


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norm () of all gradients together."""
    return torch.stack(norms_of(gradients)).norm() if gradients else torch.zeros(())


def clip(gradients: Sequence[Tensor | None], norm: float, most: float) -> None:
    """Scale gradients whose ``norm`` is greater than ``most`` down to it, in place."""
    if norm > most:
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], most / (norm + 1e-6))


Publish = Callable[[nn.Module, int, dict[str, float]], None]


class Updater:
    """Owns everything that changes from step to step. If ``run`` holds a state, it is resumed.

    Args:
        publish: (averaged model, step, metrics): writes the run's weights and lineage; called in the main process only.
        slices: batches per step, over all processes.
        scaled: whether the gradients are of losses that ``arithmetic`` scaled; those of replicas are not.

    Raises:
        UserError: an unusable state.
    """

    def __init__(
        self,
        task: TrainTask,
        run: Path,
        settings: TrainingConfig,
        slices: int,
        world: World,
        publish: Publish,
        scaled: bool = True,
    ) -> None:
        dtype = resolve_precision(settings, world.device)
        self.task, self.run, self.settings, self.world, self._publish = task, run, settings, world, publish
        self.model = task.model.to(world.device)
        self.average = copy_of(self.model)
        self._average = MovingAverage(self.model, self.average)
        self._trained = trained_parameters(self.model)
        self.optimizer = make_optimizer(self._trained, settings.optimizer)
        self._scaler = make_scaler() if scaled and dtype == torch.float16 else None
        self.older: dict[int, list[Tensor]] = {}  # see Delay
        saved = load_state(run, self.model, self.average, self.optimizer, self.older)
        self.progress = saved or Progress(slices=slices)
        if self._scaler is not None and self.progress.scaler:
            self._scaler.load_state_dict(self.progress.scaler)
        self.arithmetic = Arithmetic(world.device, dtype, None if self._scaler is None else self._scaler.scale)
        self.log = RunLog(run, settings, self.step, task.batches.plan.steps_per_epoch, world.is_main)
        share = (
            1.0 if world.is_main else 0.0
        )  # the state has the sums of all processes, which the main one goes on with
        self._metrics = {
            name: Metric(share * total, None if divisor is None else share * divisor)
            for name, (total, divisor) in self.progress.metrics.items()
        }
        self._rate = 0.0
        self._began = time.monotonic() - self.progress.seconds

    @property
    def step(self) -> int:
        """The number of steps done."""
        return self.progress.step

    def set_rate(self) -> None:
        """Set the optimizer's learning rate for the next step."""
        self._rate = learning_rate(self.step, self.settings.steps, self.settings.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate

    def apply(self, result: StepResult) -> None:
        """Update the weights with a step's gradients, already summed over all processes. If these are not finite, the weights do
        not change.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        norm = self._receive(result)
        finite = math.isfinite(norm)
        if finite or self._scaler is not None:
            self._move(norm)
        if finite or self._overflowed(result):
            self.progress.skipped_in_a_row = 0
            self._follow()
            add_metrics(self._metrics, result.metrics)
            if finite:
                add_metrics(self._metrics, {"gradient_norm": Metric(norm, 1.0)})
        else:
            self._skip(result)
        self.progress.step += 1
        self.log.count(self.step, result.audio, result.waited)

    def _receive(self, result: StepResult) -> float:
        """Take a step's gradients; returns the norm of their mean over all weights."""
        for parameter, gradient in zip(self._trained, result.gradients, strict=True):
            parameter.grad = gradient
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        return float(norm_of(divided(result.gradients, result.count)))

    def _move(self, norm: float) -> None:
        """Change the weights by the gradients of this norm."""
        clip([parameter.grad for parameter in self._trained], norm, self.settings.optimizer.max_gradient_norm)
        if self._scaler is not None:  # the scaler finds its scale by overflows, and skips those steps itself
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            self.optimizer.step()

    def finish_step(self, stop: int, stopping: Stopping) -> int:
        """Log, measure, save and publish, as far as these are due after the step.

        Args:
            stop: the exit code if a signal came, in which case the state is saved; 0 otherwise.

        Returns:
            The exit code to end with, 0 to go on.
        """
        settings, last = self.settings, self.step == self.settings.steps
        if last or self.step % settings.log_every == 0:
            self._log_step()
        measure_due = self.task.measure is not None and (last or self.step % settings.evaluate_every == 0)
        save_due = last or self.step % settings.save_every == 0 or bool(stop)
        if measure_due:
            self._check()
            return self.measure(stopping, stop)
        if save_due:
            self.keep()
        return stop

    def keep(self) -> None:
        """Save the state, and publish the average unless a measurement decides what to publish."""
        self._check()
        self._publish_unmeasured()
        self.save()

    def _check(self) -> None:
        check_finite({"model": self.model, "average": self.average}, self.step)

    def measure(self, stopping: Stopping, stop: int = 0) -> int:
        """Measure the average, publish it if it is the best, and save; a signal postpones the measurement to the next start.

        Returns:
            The exit code to end with, 0 to go on.
        """
        stop = stop or self._measure(stopping)
        self.progress.measure_due = bool(stop)
        if stop:
            self._publish_unmeasured()
        self.save()
        return stop

    def _publish_unmeasured(self) -> None:
        """Publish the average, unless a measurement decides what to publish."""
        unmeasured = self.task.measure is None or self.settings.keep == "last" or not self.progress.best
        if self.world.is_main and unmeasured and self.step >= self.task.not_before:
            self._publish(self.average, self.step, self.progress.last_dev)

    def save(self) -> None:
        """Write everything that resuming needs; every process calls it."""
        progress = self.progress
        progress.seconds = time.monotonic() - self._began
        progress.scaler = self._scaler.state_dict() if self._scaler is not None else {}
        progress.metrics = sum_over_processes(self.world, metric_sums(self._metrics))
        if self.world.is_main:
            save_state(self.run, progress, self.model, self.average, self.optimizer, self.older)

    def _overflowed(self, result: StepResult) -> bool:
        """Whether the scaler has caused gradients that are not finite: every loss of every process is finite, and the scale not so
        small that it has nothing to do with it."""
        if self._scaler is None or self._scaler.get_scale() < 1:
            return False
        bad = torch.tensor(len(result.bad_cut_ids()), device=self.world.device)
        return int(all_sum(bad)) == 0

    def _follow(self) -> None:
        """Update the average, and call the task's hook for the weights and for the average."""
        after_step = self.task.after_step
        if after_step is not None:
            after_step(self.model, self.step)
        self._average.follow(average_decay(self.step, self.settings.average_decay))
        if after_step is not None:
            after_step(self.average, self.step)

    def _skip(self, result: StepResult) -> None:
        progress = self.progress
        progress.skipped_in_a_row += 1
        # Each process knows only its own part of the batch.
        culprits = gather_lists(self.world, result.bad_cut_ids()) or gather_lists(self.world, result.cut_ids)
        self.log.skipped(self.step + 1, culprits)
        if progress.skipped_in_a_row >= self.settings.max_skipped_in_a_row:
            raise UserError(
                f"the loss was not finite for {progress.skipped_in_a_row} steps in a row, last for cuts "
                f"{', '.join(culprits[:10])}; run `asrkit data check` on the manifest, or lower "
                "training.optimizer.learning_rate"
            )

    def _log_step(self) -> None:
        metrics, self._metrics = self._metrics, {}
        sums = sum_over_processes(self.world, metric_sums(metrics))
        means = {name: total if count is None else total / count for name, (total, count) in sums.items() if count != 0}
        self.log.step(self.progress, means, self._rate)
        if self.task.watch is not None and (warning := self.task.watch(self.step, means)):
            self.log.note(warning)

    def _measure(self, stopping: Stopping) -> int:
        """Measure the average on the dev manifest, in the main process. Returns the exit code if a signal came meanwhile, else 0."""
        task, progress, stop = self.task, self.progress, 0
        if self.world.is_main and task.measure is not None:
            began = time.monotonic()
            try:
                with stopping.at_once():
                    measured = task.measure(self.average)
            except Stopped:
                stop = stopping.code
            else:
                self._judge(measured)
                self.log.dev(progress, measured, time.monotonic() - began)
        everywhere = broadcast_object(self.world, (progress.last_dev, progress.best, stop))
        progress.last_dev, progress.best, stop = everywhere  # type: ignore[misc]
        if bad := [name for name, value in progress.last_dev.items() if math.isnan(value)]:
            raise UserError(
                f"after step {self.step}: dev {', '.join(bad)} is not a number, so these weights were not published; start a new run with "
                "a lower training.optimizer.learning_rate, or run the command again to resume from the last save"
            )
        return stop

    def _judge(self, measured: dict[str, float]) -> None:
        """Publish the average if it is the best so far, or if the last weights are kept."""
        progress, ready = self.progress, self.step >= self.task.not_before
        first = next(iter(measured))
        ready = ready and not any(map(math.isnan, measured.values()))
        better = ready and (not progress.best or measured[first] <= progress.best[first])
        if better:
            progress.best = {**measured, "step": self.step}
        progress.last_dev = measured
        if better or (ready and self.settings.keep == "last"):
            self._publish(self.average, self.step, measured)
