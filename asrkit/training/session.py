"""What training stages share around the loop: their settings, and the way from manifests to a finished run.

A stage opens the run directory (``open_training``), reads and checks its cuts (``datasets.py``), defines how to build its task
(``TaskRecipe``), and trains it (``run_recipe``). For a stage that starts from a trained model, ``fine_tune`` does all of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from torch import nn

from asrkit.config import Positive, Seed, config, to_dict
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.train_batches import AudioConfig, DataConfig, TrainBatches
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.models import AsrModel
from asrkit.models.compression import keep_pruned
from asrkit.models.digests import submodels_left_behind
from asrkit.models.registry import spec_of
from asrkit.nn.context import parse_context
from asrkit.run_dir import TOKENIZER, WEIGHTS, RunDir, open_run
from asrkit.training.asr_loss import LossConfig, check_contexts
from asrkit.training.checkpoint import saved_slices
from asrkit.training.config import TrainingConfig
from asrkit.training.contexts import ContextsConfig
from asrkit.training.datasets import check_training_cuts, read_datasets, training_batches, usable_cuts
from asrkit.training.dev_eval import dev_measure
from asrkit.training.distributed import World, broadcast_object, join_world
from asrkit.training.loop import train
from asrkit.training.optim import OptimizerConfig
from asrkit.training.run_writer import RunWriter
from asrkit.training.step import TrainingBatches, TrainTask


@config
class AudioStageConfig:
    """Settings of every stage that trains on audio."""

    seed: Seed = 1
    """Seed of everything random: start, batches, augmentation, dropout."""
    bad_cuts: Literal["refuse", "skip"] = "refuse"
    """What to do with cuts that cannot be trained on: refuse to start, or skip and list them."""
    dev_max_cuts: Positive = 500
    """At most this many cuts of the dev manifest are used at each measurement."""
    data: AudioConfig = field(default_factory=AudioConfig)
    """Batches and where their cuts come from."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length of the run, logging, precision and optimizer."""


@config
class StageConfig(AudioStageConfig):
    """Settings of every stage that trains a recognizer; each stage adds its own."""

    data: DataConfig = field(default_factory=DataConfig)
    """Batches and where their cuts come from."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Training loss."""
    contexts: ContextsConfig = field(default_factory=ContextsConfig)
    """How much of the recording each frame sees in training."""


@config
class FineTuneConfig(StageConfig):
    """``StageConfig`` with the defaults of stages that start from a trained model.

    Our choice: no warm-up of the transducer loss, and AdamW at a quarter of its usual rate.
    """

    loss: LossConfig = field(default_factory=lambda: LossConfig(warm_up_steps=0))
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(optimizer=OptimizerConfig(name="adamw", learning_rate=5e-4))
    )


@dataclass(frozen=True)
class TaskRecipe:
    """Everything a process needs to build a task: it can be pickled, and reads only files.

    build: (training batches) -> TrainTask; a module-level function of the stage with its settings and paths filled in
        (``functools.partial``). torch's generator is seeded before the call.
    out: the run directory, which has the tokenizer and the list of cuts that are left out.
    slices: batches per step, over all processes.
    open_batches: (manifest, settings.data, out, slices, seed) -> batches; a module-level function.
    """

    build: Callable[[Any], TrainTask]
    out: Path
    manifest: Path
    settings: AudioStageConfig
    slices: int
    open_batches: Callable[[Path, Any, Path, int, int], TrainingBatches] = training_batches

    def batches(self) -> Any:
        """The batches to train on."""
        return self.open_batches(self.manifest, self.settings.data, self.out, self.slices, self.settings.seed)

    def rebuild(self) -> TrainTask:
        """The task: the same model, loss and batches in every process, bit for bit."""
        batches = self.batches()
        torch.manual_seed(self.settings.seed)
        task = self.build(batches)
        # Every stage keeps a pruned model pruned. A stage that computes masks has its own hook, which knows when they are final.
        return task if task.after_step is not None else replace(task, after_step=keep_pruned)


@contextmanager
def open_training(
    stage: str,
    out: Path,
    entry: Mapping[str, Any],
    files: Mapping[str, Path | None],
    *,
    parent: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Iterator[RunWriter]:
    """Join the processes that train together and claim the run directory ``out``.

    Args:
        entry: for config.yaml: the stage's settings and what it starts from.
        files: the files that the run depends on, by option.

    Raises:
        UserError: files that do not exist, a directory that is in use or holds another run.
    """
    with (
        join_world(device) as world,
        RunWriter.open(out, stage, dict(entry), dict(files), command, world, parent=parent) as run,
    ):
        yield run


def input_files(settings: AudioStageConfig, **files: Path | None) -> dict[str, Path | None]:
    """The files a run depends on, by option: those given and the manifests of ``data``."""
    also = {f"set data.also.{number}": path for number, path in enumerate(settings.data.also)}
    return {**files, **also, "set data.noise": settings.data.noise}


def copy_tokenizer(source: Path, run: RunWriter) -> Tokenizer:
    """The run's tokenizer; ``source`` is copied if there is none yet."""
    path = run.path / TOKENIZER
    if run.world.is_main and not path.is_file():
        Tokenizer(source).copy_to(path)
    broadcast_object(run.world, None)  # the others read it only once it is there
    return Tokenizer(path)


def slices_of(out: Path, settings: TrainingConfig, world: World) -> int:
    """Batches per step. A resumed run keeps the number it started with, which the number of processes must divide.

    Raises:
        UserError: the processes cannot share them evenly.
    """
    slices = saved_slices(out) or world.size * settings.accumulate
    if slices % world.size:
        raise UserError(
            f"{out}: was started with {slices} batches per step, which {world.size} processes cannot share evenly; "
            f"use a number of processes that divides {slices}, or choose another --out"
        )
    return slices


def run_recipe(
    run: RunWriter,
    build: Callable[[TrainBatches], TrainTask],
    manifest: Path,
    settings: StageConfig,
    dev: CutSet | None,
    prepare: Callable[[RunWriter, TrainBatches], None] | None = None,
) -> None:
    """Train the task that ``build`` makes to its last step, in a claimed run directory.

    Args:
        build, manifest: see ``TaskRecipe``.
        dev: cuts to measure the model's default variant on, in the first context it is trained in.
        prepare: writes the files that ``build`` reads; is called before it, in all processes.

    Raises:
        UserError: cuts that cannot be trained on, and errors of the training itself.
        Interrupted: stopped by a signal, state saved.
    """
    tokenizer = Tokenizer(run.path / TOKENIZER)
    check_training_cuts(manifest, settings.data, tokenizer, settings.bad_cuts, run)
    if dev is not None:  # now, not when it is first measured: its audio may be gone
        dev = usable_cuts(dev, None, settings.bad_cuts, run, read_audio=True, need_text=False)

    def complete(task: TrainTask) -> TrainTask:
        model = task.model
        assert isinstance(model, AsrModel)
        facts = {**_facts(run, model, task.variant, settings.loss), **task.facts}
        measure = task.measure if dev is None else _measure(task, model, tokenizer, settings, dev)
        return replace(task, facts=facts, measure=measure)

    slices = slices_of(run.path, settings.training, run.world)
    train_recipe(run, TaskRecipe(build, run.path, manifest, settings, slices), complete, prepare)


def train_recipe(
    run: RunWriter,
    recipe: TaskRecipe,
    complete: Callable[[TrainTask], TrainTask],
    prepare: Callable[[RunWriter, Any], None] | None = None,
) -> None:
    """Train the task of a recipe to its last step, in a claimed run directory, on cuts that are known to be usable.

    Args:
        complete: gives the task what it cannot make of files alone: its dev measurement, and facts for the lineage.
        prepare: writes the files that the recipe's ``build`` reads; is called before it, in all processes.

    Raises:
        UserError: errors of the training itself.
        Interrupted: stopped by a signal, state saved.
    """
    world, settings = run.world, recipe.settings
    run.save_left_out()
    if prepare is not None:
        prepare(run, recipe.batches())
    task = recipe.rebuild()
    for note in task.notes:
        run.note(f"{run.path}: {note}")
    task = complete(task)
    table = task.batches.table  # type: ignore[attr-defined]
    run.facts = dict(task.facts)
    run.describe(task.model.spec, f"{len(table)} utterances, {table.durations.sum() / 60:.1f} min")  # type: ignore[arg-type]
    train(task, run.path, settings.training, settings.data.num_workers, settings.seed, world, run.publish)
    if world.is_main and task.check is not None:
        task.check(open_run(run.path).weights())
    run.finish()


def _facts(run: RunWriter, model: AsrModel, variant: str | None, loss: LossConfig) -> dict[str, Any]:
    """For the lineage: the losses of the training, and the sub-models that are trained or idle."""
    scales = {"transducer": loss.transducer_scale, "ctc": loss.ctc_scale}
    facts: dict[str, Any] = {"losses": [name for name, scale in scales.items() if scale > 0]}
    if model.spec.submodels:
        idle = submodels_left_behind(model, variant)
        facts |= {"trained_submodels": list(model.submodels_of(variant)), "idle_submodels": idle}
        if idle:
            run.note(
                f"{run.path}: {', '.join(idle)}: not in the variant being trained, so these weights stay, but the backbone "
                "under them changes: expect them to get worse"
            )
    return facts


def _measure(
    task: TrainTask, model: AsrModel, tokenizer: Tokenizer, settings: StageConfig, dev: CutSet
) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a model to its dev error rates and the task's other dev metrics."""
    spec = model.spec
    measure_wer = dev_measure(
        dev,
        tokenizer,
        settings.data.max_duration,
        settings.dev_max_cuts,
        task.dev_method or ("greedy" if settings.loss.transducer_scale > 0 else "ctc"),
        spec.variant,
        parse_context(spec.variants[spec.variant].contexts[0]),
    )

    def measure(model: nn.Module) -> dict[str, float]:
        return {**measure_wer(model), **({} if task.dev_metrics is None else task.dev_metrics(model, dev))}

    return measure


def fine_tune(
    stage: str,
    parent: RunDir,
    manifest: Path,
    out: Path,
    settings: FineTuneConfig,
    build: Callable[[TrainBatches], TrainTask],
    *,
    entry: Mapping[str, Any] | None = None,
    files: Mapping[str, Path | None] | None = None,
    check_cuts: Callable[[Iterable[Cut]], list[str]] | None = None,
    prepare: Callable[[RunWriter, TrainBatches], None] | None = None,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Run a stage on the model of ``parent``, or resume an interrupted run; returns ``out``.

    Args:
        build: see ``TaskRecipe``.
        entry: the stage's arguments other than ``settings``, for config.yaml.
        files: files other than the manifests that the run depends on, such as a teacher's weights, by option.
        check_cuts: returns findings about cuts that the stage cannot use; [] if there are none.
        prepare: see ``run_recipe``.

    Raises:
        UserError: unusable manifests or output directory, found before any training.
        Interrupted: stopped by a signal, state saved.
    """
    check_contexts(settings.contexts, settings.loss)
    content = {
        "from": str(parent.path),
        "from_weights_sha256": sha256_of(parent.path / WEIGHTS),
        **(entry or {}),
        **to_dict(settings),
    }
    inputs = {**input_files(settings, manifest=manifest, dev=dev), **(files or {})}
    with open_training(stage, out, content, inputs, parent=parent.path, device=device, command=command) as run:
        if run.finished:
            return out
        copy_tokenizer(parent.tokenizer_path, run)
        languages = spec_of(parent).languages
        datasets = read_datasets(manifest, dev, settings.data, settings.bad_cuts, run, languages, check_cuts)
        run_recipe(run, build, manifest, settings, datasets.dev, prepare)
    return out
