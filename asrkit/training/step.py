"""The first half of a training step: the gradients of some batches, without any optimizer. ``update.py`` is the other half."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from asrkit.data.loader import death_of, start_loader
from asrkit.errors import UserError
from asrkit.training.config import autocast


class Metric(NamedTuple):
    """Logged as the sum of totals divided by the sum of divisors since the last line; without a divisor, as the total.

    ``total`` is a tensor () on the device, so that nothing waits for it, or a number if that is known anyway.
    """

    total: Tensor | float
    divisor: float | None


@dataclass(frozen=True)
class LossOutput:
    """The loss of a batch.

    losses: (B,) differentiable, one for each utterance.
    count: encoder frames or symbols of text. The sum of a step's losses is divided by the sum of its counts. A plain number, so
        that nothing waits for the device.
    metrics: values to log, by name.
    regularizer: a differentiable scalar for the whole batch, added to the step's mean.
    """

    losses: Tensor
    count: float
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    regularizer: Tensor | None = None


class TrainingBatch(Protocol):
    """What the loop needs of a batch of audio or text; ``durations`` are seconds of audio, empty for text. ``left_out``: cuts that
    could not be read, and why."""

    @property
    def cut_ids(self) -> list[str]: ...

    @property
    def durations(self) -> list[float]: ...

    @property
    def left_out(self) -> dict[str, str]: ...

    def to(self, device: torch.device) -> Any: ...


class Plan(Protocol):
    """As much of a plan of batches as the loop needs."""

    @property
    def steps_per_epoch(self) -> int: ...


class TrainingBatches(Protocol):
    """``batches[number]`` with number = step * slices + slice: a pure function, in every process and at any time."""

    @property
    def slices(self) -> int: ...

    @property
    def plan(self) -> Plan: ...

    def __getitem__(self, number: int) -> Any: ...


@dataclass(frozen=True)
class TrainTask:
    """What a stage gives the loop.

    model: the model to train; frozen parameters have ``requires_grad`` off.
    loss: (model, batch on the device, step) -> LossOutput.
    frozen: parts of the model that stay in evaluation mode (no dropout) while the rest is trained.
    before_step: (model, optimizer, step, first batch of the step on the device); called before the gradients are computed.
    after_step: (model, step); called after the weights have moved, for the model and for its average.
    measure: (averaged model) -> dev metrics; the lowest value of the first one is the best. None if there is no dev set.
    dev_metrics: (averaged model, dev cuts) -> metrics in addition to the error rates.
    dev_method: the search that dev error rates are measured with; None is greedy if the loss trains the transducer, else ctc.
    not_before: the first step after which the model is what the stage promises; nothing is published earlier.
    variant: the variant to train; None for the model's default, or if it has no variants.
    facts: entries for the stage's part of the lineage.
    notes: lines to show the user before training starts.
    check: raises if the finished run's weights are not what the stage promises.
    watch: (step, the means of a logged line) -> a warning for the user, or None.
    """

    model: nn.Module
    loss: Callable[[Any, Any, int], LossOutput]
    batches: TrainingBatches
    frozen: Sequence[nn.Module] = ()
    before_step: Callable[[Any, torch.optim.Optimizer, int, Any], None] | None = None
    after_step: Callable[[Any, int], None] | None = None
    measure: Callable[[nn.Module], dict[str, float]] | None = None
    dev_metrics: Callable[[Any, Any], dict[str, float]] | None = None
    dev_method: Literal["greedy", "ctc"] | None = None
    not_before: int = 0
    variant: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    check: Callable[[Mapping[str, Tensor]], None] | None = None
    watch: Callable[[int, Mapping[str, float]], str | None] | None = None


@dataclass
class StepResult:
    """The sums over some batches of one step.

    gradients: of the sum of their losses, for each trained parameter in order; None for a parameter without a gradient.
    count: see ``LossOutput``. audio: seconds. waited: seconds spent waiting for data.
    finite: for each batch, its cut ids and whether the loss of each cut is finite, (B,) on the device.
    """

    gradients: list[Tensor | None]
    count: float = 0.0
    audio: float = 0.0
    waited: float = 0.0
    metrics: dict[str, Metric] = field(default_factory=dict)
    finite: list[tuple[list[str], Tensor]] = field(default_factory=list)

    @property
    def cut_ids(self) -> list[str]:
        return [cut_id for cut_ids, _ in self.finite for cut_id in cut_ids]

    def bad_cut_ids(self) -> list[str]:
        """The cuts whose loss is not finite; waits for the device."""
        return [
            cut_id
            for cut_ids, finite in self.finite
            for cut_id, fine in zip(cut_ids, finite.tolist(), strict=True)
            if not fine
        ]


@dataclass(frozen=True)
class Arithmetic:
    """The device and precision of a step. ``scale`` scales the loss before the backward pass, so that float16 gradients do not
    vanish."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    scale: Callable[[Tensor], Tensor] | None = None


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to train, in the order of ``StepResult.gradients``."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def seed_for(seed: int, number: int, slices: int) -> int:
    """The seed for everything random in the batch ``number``, in whichever process it is computed."""
    step, part = divmod(number, slices)
    return int(np.random.SeedSequence((seed, part, step)).generate_state(1, np.uint64)[0]) >> 1


def compute_gradients(
    task: TrainTask, model: nn.Module, batches: Fetched, numbers: Sequence[int], seed: int, arithmetic: Arithmetic
) -> StepResult:
    """The gradients of the batches ``numbers``, all of one step, summed.

    A pure function of the model's weights and the other arguments: torch's generator is seeded for each batch.

    Args:
        batches: returns, by number, the batch on the device and the seconds spent waiting for it.

    Raises:
        UserError: out of memory; describes the batch.
    """
    slices = task.batches.slices
    set_training(task, model)
    parameters = trained_parameters(model)
    for parameter in parameters:
        parameter.grad = None
    result = StepResult([])
    for number in numbers:
        torch.manual_seed(seed_for(seed, number, slices))
        batch, waited = batches[number]
        step = number // slices
        with out_of_memory_named(batch, step):
            with autocast(arithmetic.device, arithmetic.dtype):
                output = task.loss(model, batch, step)
            total = output.losses.sum()
            metrics = dict(output.metrics)
            if output.regularizer is not None:
                # The step's sum is divided by its count later, so each batch contributes its share of one such term.
                total = total + output.regularizer * output.count
                metrics["regularizer"] = Metric(output.regularizer.detach(), 1.0)
            metrics["loss"] = Metric(total.detach(), output.count)
            (total if arithmetic.scale is None else arithmetic.scale(total)).backward()
        result.finite.append((batch.cut_ids, output.losses.detach().isfinite()))
        result.count += output.count
        result.audio += sum(batch.durations)
        result.waited += waited
        metrics["audio_seconds"] = Metric(sum(batch.durations), None)
        add_metrics(result.metrics, metrics)
    result.gradients = [parameter.grad for parameter in parameters]
    return result


def set_training(task: TrainTask, model: nn.Module) -> None:
    """Put the model in training mode, except its frozen parts."""
    model.train()
    for part in task.frozen:
        part.eval()


def add_metrics(sums: dict[str, Metric], metrics: Mapping[str, Metric]) -> None:
    """Add ``metrics`` to ``sums``, in double precision and on their device, so that nothing waits for the device."""
    for name, (total, divisor) in metrics.items():
        if isinstance(total, Tensor):
            total = total.detach().double()
        if name in sums:
            total = sums[name].total + total  # a resumed run's number and a tensor make a tensor
            divisor = None if divisor is None else (sums[name].divisor or 0.0) + divisor
        sums[name] = Metric(total, divisor)


def metric_sums(metrics: Mapping[str, Metric]) -> dict[str, tuple[float, float | None]]:
    """Metrics as plain numbers, with a single transfer from the device."""
    waiting = {name: metric.total for name, metric in metrics.items() if isinstance(metric.total, Tensor)}
    read = dict(zip(waiting, torch.stack(list(waiting.values())).tolist(), strict=True)) if waiting else {}
    return {name: (read[name] if name in read else float(total), divisor) for name, (total, divisor) in metrics.items()}


class Fetched(Protocol):
    """Batches on the device by number, each with the seconds spent waiting for it."""

    def __getitem__(self, number: int) -> tuple[Any, float]: ...


class BatchStream:
    """Batches prefetched by loader processes, in the order in which training needs them.

    A GPU gets the next batch while it works: ``fetch``, once a step's work is launched, takes it from the loader and queues its copy.

    Args:
        numbers: all numbers that will be requested, in order.
    """

    def __init__(
        self, batches: TrainingBatches, numbers: Sequence[int], num_workers: int, device: torch.device
    ) -> None:
        self._numbers, self._left = iter(numbers), len(numbers)
        self._source, self._processes = start_loader(batches, numbers, num_workers)
        self._device = device
        self._ahead: tuple[int, Any, float] | None = None
        self._noted: set[str] = set()

    def __getitem__(self, number: int) -> tuple[Any, float]:
        batch, waited = self.peek(number)
        self._ahead = None
        return batch, waited

    def fetch(self) -> None:
        """Get the next batch, if any, onto its way to a GPU; a CPU has nothing else to do meanwhile and takes it when it needs it."""
        if self._device.type != "cpu" and self._ahead is None and self._left:
            self._ahead = self._next()

    @contextmanager
    def deaths_named(self) -> Iterator[None]:
        """Say what happened where a loader process dies, of which torch tells wherever the training happens to be.

        Raises:
            UserError: a loader process died.
        """
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            if (death := death_of(self._processes)) is None:
                raise
            raise UserError(death) from error

    def peek(self, number: int) -> tuple[Any, float]:
        """The next batch, without consuming it."""
        if self._ahead is None:
            self._ahead = self._next()
        expected, batch, waited = self._ahead
        if number != expected:
            raise RuntimeError(f"batch {number} was requested, but {expected} is next")
        return batch, waited

    def _next(self) -> tuple[int, Any, float]:
        """The next number, its batch on the device, and the seconds spent waiting for it."""
        began = time.monotonic()
        try:
            batch = next(self._source)
        except UserError as error:  # from a loader process it comes wrapped in that process's traceback
            raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None
        self._note(batch.left_out)
        self._left -= 1
        return next(self._numbers), batch.to(self._device), time.monotonic() - began

    def _note(self, left_out: Mapping[str, str]) -> None:
        """Name the cuts that could not be read, each once, in whichever process trains on them."""
        for cut_id in left_out.keys() - self._noted:
            print(f"left out: cut {cut_id}: {left_out[cut_id]}", file=sys.stderr)
        self._noted |= left_out.keys()


@contextmanager
def out_of_memory_named(batch: TrainingBatch, step: int) -> Iterator[None]:
    """If memory runs out, raise a ``UserError`` that describes the batch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has a special class for GPUs only
        message = str(error)
        words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of torch, of its CPU, of CUDA's libraries
        if not isinstance(error, MemoryError) and not any(word in message for word in words):
            raise
        size, remedy = "", "max_symbols"
        if batch.durations:
            longest = max(range(len(batch.durations)), key=batch.durations.__getitem__)
            size = f", the longest {batch.cut_ids[longest]} of {batch.durations[longest]:.1f} s"
            remedy = "data.max_duration (and raise training.accumulate), or leave the longest out"
        raise UserError(
            f"step {step + 1}: out of memory with {len(batch.cut_ids)} utterances{size}; "
            f"start a new run with a lower {remedy}"
        ) from error
