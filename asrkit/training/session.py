"""What training stages share around the loop: their settings, and the way from manifests to a finished run.

A stage opens the run directory (``open_training``), reads and checks its cuts (``datasets.py``), defines how to build its task
(``TaskRecipe``), and trains it (``run_recipe``). For a stage that starts from a trained model, ``fine_tune`` does all of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from lhotse.cut import Cut
from torch import nn

from asrkit.config import Positive, Seed, config, to_dict
from asrkit.data.cut_table import CutTable
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
from asrkit.training.asr_loss import LossConfig, check_losses
from asrkit.training.checkpoint import saved_slices
from asrkit.training.config import TrainingConfig
from asrkit.training.contexts import ContextsConfig
from asrkit.training.datasets import (
    check_own_cuts,
    check_training_cuts,
    read_datasets,
    read_dev,
    training_batches,
    usable_cuts,
)
from asrkit.training.delay import Delay
from asrkit.training.dev_eval import dev_measure
from asrkit.training.distributed import World, broadcast_object, join_world
from asrkit.training.loop import NO_DELAY, train
from asrkit.training.optim import OptimizerConfig
from asrkit.training.own_data import OwnBatches, Report, no_batches, record
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
    manifests: one that every process reads; or several, of which each replica has its own and reads no other.
    slices: batches per step, over all processes.
    open_batches: (manifest, settings.data, out, slices, seed) -> batches; a module-level function.
    replicas: with several manifests, the numbers of those that this process reads.
    """

    build: Callable[[Any], TrainTask]
    out: Path
    manifests: tuple[Path, ...]
    settings: AudioStageConfig
    slices: int
    open_batches: Callable[[Path, Any, Path, int, int], TrainingBatches] = training_batches
    replicas: tuple[int, ...] = ()

    def batches(self) -> Any:
        """The batches to train on; those of the first replica of this process, if each has its own."""
        data, seed = self.settings.data, self.settings.seed
        if len(self.manifests) == 1:
            return self._skipping(self.open_batches(self.manifests[0], data, self.out, self.slices, seed))
        if not self.replicas:
            assert isinstance(data, DataConfig)
            return no_batches(data, self.slices, Tokenizer(self.out / TOKENIZER), seed)
        return self._own_batches(self.replicas[0])

    def _own_batches(self, replica: int) -> Any:
        """The batches of a replica's own data, which no other's augmentation is like."""
        settings = self.settings
        accumulate, seed = settings.training.accumulate, settings.seed + replica
        return self._skipping(self.open_batches(self.manifests[replica], settings.data, self.out, accumulate, seed))

    def _skipping(self, batches: Any) -> Any:
        """The batches, which are to do with unreadable cuts as the settings say."""
        batches.skip_bad = self.settings.bad_cuts == "skip"
        return batches

    def rebuild(self) -> TrainTask:
        """The task: the same model, loss and batches in every process, bit for bit."""
        batches = self.batches()
        torch.manual_seed(self.settings.seed)
        task = self.build(batches)
        if len(self.manifests) > 1:
            own: list[TrainBatches | None] = [None] * len(self.manifests)
            for replica in self.replicas:
                of_replica = batches if replica == self.replicas[0] else self._own_batches(replica)
                of_replica.clean, of_replica.annotate = batches.clean, batches.annotate
                own[replica] = of_replica
            accumulate = self.settings.training.accumulate
            task = replace(task, batches=OwnBatches(own, accumulate, self.slices // accumulate))
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
        for line in [] if parent is None or run.finished else open_run(parent).unfinished:
            run.note(f"{out}: warning: {line}")
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


def slices_of(out: Path, settings: TrainingConfig, world: World, pushes: int = 1) -> int:
    """Batches per step. A resumed run keeps the number it started with, which the number of processes must divide.

    Args:
        pushes: see ``Driver``.

    Raises:
        UserError: the processes cannot share them evenly.
    """
    slices = saved_slices(out) or world.size * settings.accumulate * pushes
    if slices % world.size:
        raise UserError(
            f"{out}: was started with {slices} batches per step, which {world.size} processes cannot share evenly; "
            f"use a number of processes that divides {slices}, or choose another --out"
        )
    return slices


class Running(Protocol):
    """A recipe's training, ready to begin."""

    def check_own(self, check: Callable[[Path], Report]) -> list[Report]:
        """``check`` of each replica's own manifest, where its data are."""

    def train(self, task: TrainTask) -> None:
        """Train ``task``, the recipe's in this process, to its last step or from where it was saved."""


class Driver(Protocol):
    """How a recipe is trained: it calls the two halves of a step.

    pushes: how many processes' gradients make a step, each of ``training.accumulate`` batches.
    """

    @property
    def pushes(self) -> int: ...

    def start(self, recipe: TaskRecipe, run: RunWriter) -> AbstractContextManager[Running]: ...


@dataclass(frozen=True)
class Here:
    """Trains in this process, and in those that torchrun started beside it.

    delay: from which weights gradients are computed; see ``Delay``. own_data: whether replicas' own data may be read here.
    """

    delay: Delay = NO_DELAY
    pushes: int = 1
    own_data: bool = False

    @contextmanager
    def start(self, recipe: TaskRecipe, run: RunWriter) -> Iterator[_RunningHere]:
        if len(recipe.manifests) > 1 and not self.own_data:
            raise UserError(
                "several manifests are data of several replicas, but this runs in one process; give one --manifest"
            )
        yield _RunningHere(recipe, run, self.delay)


@dataclass(frozen=True)
class _RunningHere:
    recipe: TaskRecipe
    run: RunWriter
    delay: Delay

    def check_own(self, check: Callable[[Path], Report]) -> list[Report]:
        return [check(manifest) for manifest in self.recipe.manifests]

    def train(self, task: TrainTask) -> None:
        settings, run = self.recipe.settings, self.run
        if len(self.recipe.manifests) > 1:  # of all replicas, which are simulated in this process
            replicas = tuple(range(len(self.recipe.manifests)))
            task = replace(task, batches=replace(self.recipe, replicas=replicas).rebuild().batches)
        workers = settings.data.num_workers
        train(task, run.path, settings.training, workers, settings.seed, run.world, run.publish, self.delay)


SERIAL = Here()


def run_recipe(
    run: RunWriter,
    build: Callable[[TrainBatches], TrainTask],
    manifest: Path | Sequence[Path],
    settings: StageConfig,
    dev: CutTable | None,
    prepare: Callable[[RunWriter, TrainBatches], None] | None = None,
    driver: Driver = SERIAL,
    check_own: Callable[[Path], Report] | None = None,
    every_cut: bool = False,
) -> None:
    """Train the task that ``build`` makes to its last step, in a claimed run directory.

    Args:
        build, manifest: see ``TaskRecipe``; several manifests are the replicas' own.
        dev: cuts to measure the model's default variant on, in the first context it is trained in.
        prepare: writes the files that ``build`` reads; is called before it, in all processes.
        driver: what trains; by default this process.
        check_own: finds what cannot be trained on in a replica's own manifest; it can be pickled.
        every_cut: ``prepare`` reads the audio of all cuts, so all of it is checked first.

    Raises:
        UserError: cuts that cannot be trained on, and errors of the training itself.
        Interrupted: stopped by a signal, state saved.
    """
    tokenizer = Tokenizer(run.path / TOKENIZER)
    manifests = (manifest,) if isinstance(manifest, Path) else tuple(manifest)
    if dev is not None:  # now, not when it is first measured: its audio may be gone
        dev = usable_cuts(dev, None, settings.bad_cuts, run, read_audio=True, need_text=False)
    if len(manifests) == 1:
        check_training_cuts(manifests[0], settings.data, tokenizer, settings.bad_cuts, run, every=every_cut)

    def complete(task: TrainTask) -> TrainTask:
        model = task.model
        assert isinstance(model, AsrModel)
        facts = {**_facts(run, model, task.variant, settings.loss), **task.facts}
        measure = task.measure if dev is None else _measure(task, model, tokenizer, settings, dev)
        return replace(task, facts=facts, measure=measure)

    slices = slices_of(run.path, settings.training, run.world, driver.pushes)
    train_recipe(run, TaskRecipe(build, run.path, manifests, settings, slices), complete, prepare, driver, check_own)


def train_recipe(
    run: RunWriter,
    recipe: TaskRecipe,
    complete: Callable[[TrainTask], TrainTask],
    prepare: Callable[[RunWriter, Any], None] | None = None,
    driver: Driver = SERIAL,
    check_own: Callable[[Path], Report] | None = None,
) -> None:
    """Train the task of a recipe to its last step, in a claimed run directory, on cuts that are known to be usable.

    Args:
        complete: gives the task what it cannot make of files alone: its dev measurement, and facts for the lineage.
        prepare: writes the files that the recipe's ``build`` reads; is called before it, in all processes.
        driver, check_own: see ``run_recipe``.

    Raises:
        UserError: cuts of a replica's own that cannot be trained on, and errors of the training itself.
        Interrupted: stopped by a signal, state saved.
    """
    world, own = run.world, len(recipe.manifests) > 1
    if own and prepare is not None:
        raise UserError("this stage has to read all training data before it begins; give one --manifest")
    if not own:
        run.save_left_out()
    if prepare is not None:
        prepare(run, recipe.batches())
    with driver.start(recipe, run) as running:
        facts: dict[str, Any] = {}
        if own:
            assert check_own is not None
            reports = running.check_own(check_own)
            facts, amount = record(run, recipe.manifests, reports), [(one.utterances, one.seconds) for one in reports]
        task = recipe.rebuild()
        if not own:
            table = task.batches.table  # type: ignore[attr-defined]
            amount = [(len(table), table.durations.sum())]
        for note in task.notes:
            run.note(f"{run.path}: {note}")
        task = complete(task)
        run.state({**task.facts, **facts})
        utterances, seconds = map(sum, zip(*amount, strict=True))
        run.describe(task.model.spec, f"{utterances} utterances, {seconds / 60:.1f} min")  # type: ignore[arg-type]
        running.train(task)
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
    task: TrainTask, model: AsrModel, tokenizer: Tokenizer, settings: StageConfig, dev: CutTable
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
    manifest: Path | Sequence[Path],
    out: Path,
    settings: FineTuneConfig,
    build: Callable[[TrainBatches], TrainTask],
    *,
    entry: Mapping[str, Any] | None = None,
    files: Mapping[str, Path | None] | None = None,
    check_cuts: Callable[[Iterable[Cut]], list[str]] | None = None,
    prepare: Callable[[RunWriter, TrainBatches], None] | None = None,
    driver: Driver = SERIAL,
    other_losses: bool = False,
    every_cut: bool = False,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Run a stage on the model of ``parent``, or resume an interrupted run; returns ``out``.

    Args:
        manifest: several are the data of as many replicas, each of which reads its own.
        build: see ``TaskRecipe``.
        entry: the stage's arguments other than ``settings``, for config.yaml.
        files: files other than the manifests that the run depends on, such as a teacher's weights, by option.
        check_cuts: returns findings about cuts that the stage cannot use; [] if there are none.
        prepare, driver, every_cut: see ``run_recipe``.
        other_losses: see ``check_losses``.

    Raises:
        UserError: unusable manifests or output directory, found before any training.
        Interrupted: stopped by a signal, state saved.
    """
    check_losses(settings.contexts, settings.loss, other_losses)
    manifests = [manifest] if isinstance(manifest, Path) else list(manifest)
    shared = manifests[0] if len(manifests) == 1 else None
    content = {
        "from": str(parent.path),
        "from_weights_sha256": sha256_of(parent.path / WEIGHTS),
        **({} if shared else {"manifests": list(map(str, manifests))}),
        **(entry or {}),
        **to_dict(settings),
    }
    inputs = {**input_files(settings, manifest=shared, dev=dev), **(files or {})}
    with open_training(stage, out, content, inputs, parent=parent.path, device=device, command=command) as run:
        if run.finished:
            return out
        copy_tokenizer(parent.tokenizer_path, run)
        data, policy, languages = settings.data, settings.bad_cuts, spec_of(parent).languages
        check_own = None
        if shared is not None:
            dev_cuts = read_datasets(shared, dev, data, policy, run, languages, check_cuts).dev
        else:
            dev_cuts = read_dev(dev, data, policy, run, languages)
            left_out = None if run.fresh else run.left_out
            check_own = partial(check_own_cuts, data, run.path / TOKENIZER, policy, languages, check_cuts, left_out)
        run_recipe(run, build, manifests, settings, dev_cuts, prepare, driver, check_own, every_cut)
    return out
