"""What training stages share around the loop: their settings, the way from manifests to a finished run, a trained parent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from lhotse import CutSet
from pydantic import Field
from torch import nn

from asrkit.config import Positive, config, to_dict
from asrkit.data.batch import Batch
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.train_batches import DataConfig, TrainBatches
from asrkit.methods.distillation.config import DistillationConfig, WeightConfig
from asrkit.methods.distillation.teachers import ANY, Teacher
from asrkit.models import AsrModel
from asrkit.models.asr import spec_of
from asrkit.models.digests import submodels_left_behind
from asrkit.nn.context import parse_context
from asrkit.run_dir import TOKENIZER, WEIGHTS, RunDir, open_run, sha256_of
from asrkit.training.asr_loss import LossConfig, LossOutput, check_contexts
from asrkit.training.contexts import ContextsConfig
from asrkit.training.datasets import Datasets, read_datasets, training_table
from asrkit.training.dev_eval import dev_measure
from asrkit.training.distributed import broadcast_object, join_world
from asrkit.training.loop import Task, TrainingConfig, train
from asrkit.training.optim import OptimizerConfig
from asrkit.training.run_writer import RunWriter


@config
class StageConfig:
    """Settings of every stage that trains a recognizer; a stage's own come on top."""

    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of everything random: start, batches, augmentation, dropout."""
    bad_cuts: Literal["refuse", "skip"] = "refuse"
    """What to do with cuts that cannot be trained on: refuse to start, or skip and list them."""
    dev_max_cuts: Positive = 500
    """At most this many cuts of the dev manifest are decoded at each measurement."""
    data: DataConfig = field(default_factory=DataConfig)
    """Batches and where their cuts come from."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Training loss."""
    contexts: ContextsConfig = field(default_factory=ContextsConfig)
    """How much of the recording each frame sees in training."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length of the run, logging, precision and optimizer."""


@config
class FineTuneConfig(StageConfig):
    """``StageConfig`` with the defaults of stages that start from a trained model.

    Our choice: the transducer's simple part does not lead again, and AdamW runs at a quarter of its usual rate.
    """

    loss: LossConfig = field(default_factory=lambda: LossConfig(warm_up_steps=0))
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(optimizer=OptimizerConfig(name="adamw", learning_rate=5e-4))
    )


Compressing = TypeVar("Compressing", bound="CompressConfig")


@config
class CompressConfig(FineTuneConfig):
    """Settings that prune and qat share."""

    variant: str | None = None
    """Variant to train; null trains the parent's default."""
    from_scratch: bool = False
    """Start from new weights instead of the parent's; its shape, feature statistics and tokenizer are taken over."""
    teacher: DistillationConfig = field(
        default_factory=lambda: DistillationConfig(
            scale=1.0,
            ctc_scale=0.3,
            classes="all",
            input="shared",
            context="same",
            weight=WeightConfig(kind="constant"),
        )
    )
    """How the model given by --teacher teaches. By default it compares all tokens, on the student's own input."""


def from_scratch_defaults(kind: type[Compressing]) -> Compressing:
    """The defaults of a run with new weights: those of train-backbone, where a later stage's differ."""
    return kind(from_scratch=True, loss=LossConfig(), training=TrainingConfig())


@dataclass(frozen=True)
class Prepared:
    """A stage's model, ready to train.

    loss: (model, batch on the device, step) -> LossOutput.
    frozen: parts that stay in evaluation mode.
    after_step: (model, step) after the weights moved, to put right what must hold of them.
    not_before: the first step after which the model is what the stage promises.
    extra: what the stage adds to its entry in the lineage.
    check: looks at the finished run's weights; raises when what the stage promises does not hold.
    measure: (averaged model, dev cuts) -> what to measure besides error rates.
    variant: the one that trains, None for the model's default.
    clean: whether the loss needs the clean features of its batches.
    """

    model: AsrModel
    loss: Callable[[Any, Batch, int], LossOutput]
    frozen: Sequence[nn.Module] = ()
    after_step: Callable[[Any, int], None] | None = None
    not_before: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, torch.Tensor]], None] | None = None
    clean: bool = False
    variant: str | None = None
    measure: Callable[[Any, CutSet], dict[str, float]] | None = None


def train_stage(
    run: RunWriter,
    settings: StageConfig,
    material: Datasets,
    tokenizer: Tokenizer,
    prepare: Callable[[RunWriter, TrainBatches], Prepared],
) -> None:
    """Train what ``prepare`` makes, in a claimed run directory, to its end.

    Args:
        prepare: makes the model, and may look at the training batches; torch's generator is seeded before. The model's
            default variant is measured, in the first context it is trained in.

    Raises:
        UserError: cuts that cannot be trained on, and what training finds.
        Interrupted: stopped by a signal, state saved.
    """
    world = run.world
    table, noise = training_table(material, settings.data, tokenizer, settings.bad_cuts, run)
    batches = run.batches(table, settings.data, tokenizer, noise, settings.training.accumulate, settings.seed, world)
    torch.manual_seed(settings.seed)
    prepared = prepare(run, batches)
    scales = {"transducer": settings.loss.transducer_scale, "ctc": settings.loss.ctc_scale}
    run.extra = {**prepared.extra, "losses": [name for name, scale in scales.items() if scale > 0]}
    if prepared.model.spec.submodels:
        idle = submodels_left_behind(prepared.model, prepared.variant)
        active = prepared.model.submodels_of(prepared.variant)
        run.extra |= {"trained_submodels": list(active), "idle_submodels": idle}
        if idle:
            run.note(
                f"{run.path}: the backbone is trained without {', '.join(idle)}, which stay as they were on the one before"
            )
    batches.clean = prepared.clean
    spec = prepared.model.spec
    run.describe(to_dict(spec), f"{len(table)} utterances, {table.durations.sum() / 60:.1f} min", world)
    measure = None
    if material.dev is not None:
        measure_wer = measure = dev_measure(
            material.dev,
            tokenizer,
            settings.data.max_duration,
            settings.dev_max_cuts,
            "greedy" if settings.loss.transducer_scale > 0 else "ctc",
            spec.variant,
            parse_context(spec.variants[spec.variant].contexts[0]),
        )
        if (besides := prepared.measure) is not None:
            dev = material.dev

            def measure(model: nn.Module) -> dict[str, float]:
                return {**measure_wer(model), **besides(model, dev)}

    task = Task(
        model=prepared.model,
        loss=prepared.loss,
        batches=batches,
        measure=measure,
        publish=run.publish,
        frozen=prepared.frozen,
        after_step=prepared.after_step,
        not_before=prepared.not_before,
    )
    train(task, run.path, settings.training, settings.data.num_workers, settings.seed, world)
    if world.is_main and prepared.check is not None:
        prepared.check(open_run(run.path).weights())
    run.finish()


def inputs_of(settings: StageConfig, **files: Path | None) -> dict[str, Path | None]:
    """The files a run depends on, by the name of their option: those given and the manifests of ``data.also``."""
    return {**files, **{f"set data.also.{number}": path for number, path in enumerate(settings.data.also)}}


def fine_tune(
    stage: str,
    parent: RunDir,
    manifest: Path,
    out: Path,
    settings: FineTuneConfig,
    prepare: Callable[[RunWriter, TrainBatches], Prepared],
    *,
    content: Mapping[str, Any] | None = None,
    teacher: Teacher | None = None,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Run a stage on the model of ``parent``, or go on with a run that was interrupted; returns ``out``.

    Args:
        prepare: see ``train_stage``.
        content: what the stage was told besides ``settings``, for config.yaml.
        teacher: takes part; its weights are held against those of the run's beginning.

    Raises:
        UserError: unusable manifests or output directory, found before any training.
        Interrupted: stopped by a signal, state saved.
    """
    check_contexts(settings.contexts, settings.loss)
    weights = None if teacher is None else teacher.run.path / WEIGHTS
    told = {
        "from": str(parent.path),
        "from_weights_sha256": sha256_of(parent.path / WEIGHTS),
        **({} if weights is None else {"teacher_weights_sha256": sha256_of(weights)}),
        **(content or {}),
        **to_dict(settings),
    }
    files = inputs_of(settings, manifest=manifest, dev=dev, teacher=weights)
    with (
        join_world(device) as world,
        RunWriter.open(out, stage, told, files, command, world, parent=parent.path) as run,
    ):
        if run.finished:
            return out
        if world.is_main and not (out / TOKENIZER).is_file():
            Tokenizer(parent.tokenizer_path).copy_to(out / TOKENIZER)
        broadcast_object(world, None)  # the others read it only once it is there
        teachers = {} if teacher is None else {ANY: [teacher]}
        languages = spec_of(parent).languages
        material = read_datasets(manifest, dev, settings.data, settings.bad_cuts, run, languages, teachers)
        train_stage(run, settings, material, Tokenizer(out / TOKENIZER), prepare)
    return out
