"""The one training loop. A stage brings a model, a loss and a way to measure; the loop brings everything else.

Everything random is seeded from (seed, rank, step), and the state on disk is complete, so that a run killed at any
instant and started again ends with the very weights of the uninterrupted one.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import nn

from asrkit.config import config
from asrkit.data.bucketing import BucketPlan
from asrkit.data.train_batches import loader
from asrkit.errors import UserError
from asrkit.training.asr_loss import LossOutput
from asrkit.training.checkpoint import Progress, load_state, save_state
from asrkit.training.distributed import World, all_sum, broadcast_object, gather_lists, sum_gradients
from asrkit.training.logs import RunLog
from asrkit.training.optim import OptimizerConfig, learning_rate, make_optimizer

Steps = Annotated[int, Field(ge=1)]


@config
class TrainingConfig:
    """Length, rhythm and arithmetic of a run."""

    steps: Steps = 4000
    """Optimizer steps in all."""
    accumulate: Steps = 1
    """Batches whose gradients are added up for one step. Raise it when a batch as large as you want does not fit in
    memory."""
    log_every: Steps = 50
    """Steps between lines of the log and of metrics.jsonl."""
    evaluate_every: Steps = 500
    """Steps between measurements on the dev manifest."""
    save_every: Steps = 250
    """Steps between saved states; at most this much work is lost when the run is killed."""
    average_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.998
    """The saved and evaluated weights are a running average of the trained ones; the decay of step n, counted from 0, is
    (1 + n) / (10 + n), at most this. 0 saves the last weights as they are."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the forward pass: auto is bfloat16 on GPUs and CPUs that compute in it, else float32."""
    keep: Literal["best", "last"] = "best"
    """Which weights the run ends with: those of the best dev WER, or the last."""
    max_skipped_in_a_row: Steps = 10
    """End the run after this many steps in a row whose loss or gradient was not finite."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""


class TrainingBatch(Protocol):
    """What the loop asks of a batch, of audio or of text; ``durations`` are seconds of audio, none of text."""

    @property
    def cut_ids(self) -> list[str]: ...

    @property
    def durations(self) -> list[float]: ...

    def to(self, device: torch.device) -> Any: ...


class TrainingBatches(Protocol):
    """``batches[step * slices + slice]``, after a plan that knows how many steps are an epoch."""

    @property
    def plan(self) -> BucketPlan: ...

    def __getitem__(self, place: int) -> Any: ...


@dataclass(frozen=True)
class Task:
    """What a stage hands to the loop.

    loss: (model, batch on the device, step) -> LossOutput.
    measure: the averaged model -> dev metrics, the lowest first one being the best; None when there is nothing to measure on.
    publish: (averaged model, step, metrics): write the run's weights and lineage; main process only.
    frozen: parts of the model that stay in evaluation mode (no dropout) while the rest trains.
    after_step: (model, step), when the weights have moved, those of the model and those of its average.
    not_before: the first step after which the model is what the stage promises; nothing is published earlier.
    """

    model: nn.Module
    loss: Callable[[Any, Any, int], LossOutput]
    batches: TrainingBatches
    measure: Callable[[nn.Module], dict[str, float]] | None
    publish: Callable[[nn.Module, int, dict[str, float]], None]
    frozen: Sequence[nn.Module] = ()
    after_step: Callable[[Any, int], None] | None = None
    not_before: int = 0


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; ``code`` is the process's exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"interrupted by signal {code - 128}")
        self.code = code


def resolve_precision(settings: TrainingConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: ``auto`` looks at the hardware."""
    if settings.precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[settings.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def train(
    task: Task,
    run: Path,
    settings: TrainingConfig,
    num_workers: int,
    seed: int,
    world: World,
) -> Progress:
    """Train to ``settings.steps``, resuming from ``run`` when it holds a state.

    Raises:
        UserError: losses that stay non-finite, an unusable state, no place to write.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    device, dtype = world.device, resolve_precision(settings, world.device)
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("training.precision=float16 needs a GPU; use bfloat16 or float32 on a CPU")
    model = task.model.to(device)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, settings.optimizer)
    scaler = torch.cuda.amp.GradScaler() if dtype == torch.float16 else None
    slices = world.size * settings.accumulate

    progress = load_state(run, model, average, optimizer) or Progress(slices=slices)
    if progress.slices != slices:
        raise UserError(
            f"{run}: was trained with {progress.slices} parts a step (processes times training.accumulate), now {slices}; "
            "use as many as before, or another --out"
        )
    if scaler is not None and progress.scaler:
        scaler.load_state_dict(progress.scaler)
    start = progress.step
    places = [
        step * slices + world.size * part + world.rank
        for step in range(start, settings.steps)
        for part in range(settings.accumulate)
    ]
    log = RunLog(run, settings, start, task.batches.plan.steps_per_epoch, world.is_main)
    began, shadow = time.monotonic() - progress.seconds, _Shadow(model, average)

    def save() -> None:
        progress.seconds = time.monotonic() - began
        progress.scaler = scaler.state_dict() if scaler is not None else {}
        if world.is_main:
            save_state(run, progress, model, average, optimizer)

    with _signals() as stop, log:
        source = _fetch(task.batches, places, num_workers, device)
        for step in range(start, settings.steps):
            model.train()
            for part in task.frozen:
                part.eval()
            torch.manual_seed(_mix(seed, world.rank, step))
            lr = learning_rate(step, settings.steps, settings.optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            done = _accumulate(task, model, source, step, settings.accumulate, device, dtype, scaler)
            totals = all_sum(world, torch.tensor([done.count, done.audio], dtype=torch.float64, device=device))
            sum_gradients(world, trained)
            if scaler is not None:
                scaler.unscale_(optimizer)
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad.div_(float(totals[0]))
            norm = float(nn.utils.clip_grad_norm_(trained, settings.optimizer.max_gradient_norm))
            if scaler is not None:  # an overflow is how the scaler finds its scale: it skips by itself
                scaler.step(optimizer)
                scaler.update()
            elif math.isfinite(norm):
                optimizer.step()
            if math.isfinite(norm) or (scaler is not None and not done.bad_cut_ids):
                progress.skipped_in_a_row = 0
                if task.after_step is not None:
                    task.after_step(model, step)
                shadow.follow(min(settings.average_decay, (1 + step) / (10 + step)))
                if task.after_step is not None:
                    task.after_step(average, step)
            else:
                _skip(progress, settings, done, step, log, world)
            progress.step = step + 1
            log.count(progress, done.sums, totals, norm, done.waited)

            # Asked once a step: a signal after this waits for the next, so none is obeyed without a saved state.
            code = int(broadcast_object(world, stop()))  # type: ignore[call-overload]
            last = progress.step == settings.steps
            if last or progress.step % settings.log_every == 0:
                _share_sums(world, progress)
                log.step(progress, lr)
            if task.measure is not None and (last or progress.step % settings.evaluate_every == 0):
                _measure(task, average, progress, settings, world, log)
                save()
            elif last or progress.step % settings.save_every == 0 or code:
                unmeasured = task.measure is None or settings.keep == "last" or not progress.best
                if world.is_main and unmeasured and progress.step >= task.not_before:
                    task.publish(average, progress.step, progress.last_dev)
                save()
            if code:
                raise Interrupted(code)
    return progress


@dataclass
class _Done:
    """What one step's parts add up to on this process."""

    count: float = 0.0
    audio: float = 0.0
    waited: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    cut_ids: list[str] = field(default_factory=list)
    bad_cut_ids: list[str] = field(default_factory=list)


def _accumulate(
    task: Task,
    model: nn.Module,
    source: Iterator[tuple[TrainingBatch, float]],
    step: int,
    parts: int,
    device: torch.device,
    dtype: torch.dtype,
    scaler: Any,
) -> _Done:
    done = _Done()
    for _ in range(parts):
        batch, waited = next(source)
        context = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
        with _room_for(batch, step):
            with context:
                output = task.loss(model, batch, step)
            total = output.loss.sum()
            (scaler.scale(total) if scaler is not None else total).backward()
        finite = output.loss.detach().isfinite()
        if not bool(finite.all()):
            done.bad_cut_ids += [
                cut_id for cut_id, fine in zip(batch.cut_ids, finite.tolist(), strict=True) if not fine
            ]
        done.count += output.count
        done.audio += sum(batch.durations)
        done.waited += waited
        done.cut_ids += batch.cut_ids
        for name, value in {"loss": total.detach(), **output.parts}.items():
            done.sums[name] = done.sums.get(name, 0.0) + float(value)
    return done


@contextmanager
def _room_for(batch: TrainingBatch, step: int) -> Iterator[None]:
    """Say which batch was too large where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own for GPUs alone
        said = str(error)
        words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of torch, of its CPU, of CUDA's libraries
        if not isinstance(error, MemoryError) and not any(word in said for word in words):
            raise
        size, remedy = "", "max_symbols"
        if batch.durations:
            longest = max(range(len(batch.durations)), key=batch.durations.__getitem__)
            size = f", the longest {batch.cut_ids[longest]} of {batch.durations[longest]:.1f} s"
            remedy = "data.max_duration (and raise training.accumulate), or leave the longest out"
        raise UserError(
            f"step {step + 1}: out of memory with {len(batch.cut_ids)} utterances{size}; train anew with a lower {remedy}"
        ) from error


def _skip(progress: Progress, settings: TrainingConfig, done: _Done, step: int, log: RunLog, world: World) -> None:
    progress.skipped_in_a_row += 1
    # Each process knows its own part of the batch only.
    culprits = gather_lists(world, done.bad_cut_ids) or gather_lists(world, done.cut_ids)
    log.skipped(step + 1, culprits)
    done.sums.clear()
    if progress.skipped_in_a_row >= settings.max_skipped_in_a_row:
        raise UserError(
            f"the loss was not finite {progress.skipped_in_a_row} steps in a row, last for cuts {', '.join(culprits[:10])}; "
            "run `asrkit data check` on the manifest, or lower training.optimizer.learning_rate"
        )


def _measure(
    task: Task, average: nn.Module, progress: Progress, settings: TrainingConfig, world: World, log: RunLog
) -> None:
    measured: dict[str, float] = {}
    if world.is_main and task.measure is not None:
        began = time.monotonic()
        measured = task.measure(average)
        ready = progress.step >= task.not_before
        first = next(iter(measured))
        better = ready and (not progress.best or measured[first] <= progress.best[first])
        if better:
            progress.best = {**measured, "step": progress.step}
        progress.last_dev = measured
        if better or (ready and settings.keep == "last"):
            task.publish(average, progress.step, measured)
        log.dev(progress, measured, time.monotonic() - began)
    progress.last_dev, progress.best = broadcast_object(world, (progress.last_dev, progress.best))  # type: ignore[misc]


def _share_sums(world: World, progress: Progress) -> None:
    if world.size > 1:
        names = sorted(progress.sums)
        values = all_sum(
            world, torch.tensor([progress.sums[n] for n in names], dtype=torch.float64, device=world.device)
        )
        shared = {"count", "audio", "steps", "gradient_norm"}  # already of the whole world
        for name, value in zip(names, values.tolist(), strict=True):
            progress.sums[name] = value / world.size if name in shared else value


class _Shadow:
    """The running average of the weights: average += (1 - decay) (weights - average), buffers copied."""

    def __init__(self, model: nn.Module, average: nn.Module) -> None:
        pairs = [
            (mine, theirs)
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True)
            if theirs.requires_grad
        ]
        self._average: list[torch.Tensor] = [mine for mine, _ in pairs]
        self._weights: list[torch.Tensor] = [theirs for _, theirs in pairs]
        self._buffers = list(zip(average.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        copied = list(self._buffers)
        if decay == 0:  # the weights themselves, which a difference added would miss by a rounding error
            copied += zip(self._average, self._weights, strict=True)
        else:  # by the difference, so that weights which nothing trains stay what they are to the last bit
            moved = torch._foreach_sub(self._weights, self._average)
            torch._foreach_add_(self._average, moved, alpha=1 - decay)
        for mine, theirs in copied:
            mine.copy_(theirs)


def _fetch(
    batches: TrainingBatches, places: Sequence[int], num_workers: int, device: torch.device
) -> Iterator[tuple[TrainingBatch, float]]:
    """Batches on the device, each with the seconds training waited for it."""
    source = iter(loader(batches, places, num_workers))
    while True:
        began = time.monotonic()
        try:
            batch = next(source)
        except StopIteration:
            return
        except UserError as error:  # from a worker process it comes wrapped in that process's traceback
            raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None
        yield batch.to(device), time.monotonic() - began


def _mix(*numbers: int) -> int:
    """One seed from several numbers, without the collisions of adding them."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """Yield a function that tells the exit code a SIGINT (130) or SIGTERM (143) asked for, 0 before."""
    code = 0

    def remember(number: int, frame: object) -> None:
        nonlocal code
        if code:  # asked twice: at once
            raise KeyboardInterrupt
        code = 128 + number

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
