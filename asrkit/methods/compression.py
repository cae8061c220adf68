"""What qat and prune share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import TypeVar

from asrkit.config import config
from asrkit.data.train_batches import TrainBatches
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.methods.distillation.config import DistillationConfig, WeightConfig
from asrkit.methods.distillation.loss import Distillation, build_loss
from asrkit.models import AsrModel, ModelSpec, load_model
from asrkit.models.registry import spec_of
from asrkit.models.surgery import in_variant, is_mask, rebuild, reinitialized
from asrkit.run_dir import RunDir
from asrkit.training.asr_loss import LossConfig
from asrkit.training.config import TrainingConfig
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import FineTuneConfig, fine_tune
from asrkit.training.step import TrainTask


@config
class CompressConfig(FineTuneConfig):
    """Settings that prune and qat share."""

    variant: str | None = None
    """Variant to train; null trains the parent's default."""
    from_scratch: bool = False
    """Start from new weights instead of the parent's; its shape, feature statistics and tokenizer are kept. The option
    --from-scratch also changes the defaults of `loss` and `training` to those of train-backbone; this setting alone does not."""
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


Compressing = TypeVar("Compressing", bound=CompressConfig)


def from_scratch_defaults(kind: type[Compressing]) -> Compressing:
    """The defaults of a run with new weights, which are those of train-backbone."""
    return kind(from_scratch=True, loss=LossConfig(), training=TrainingConfig())


def open_teacher(teacher: Path | None, settings: CompressConfig, student: RunDir) -> Distillation | None:
    """The model given by --teacher, checked; None without one.

    Raises:
        UserError: it cannot teach this student.
    """
    if teacher is None:
        if settings.teacher != type(settings)().teacher:
            raise UserError(
                "teacher: says how a teacher teaches; give one with --teacher, or leave out --set teacher.*"
            )
        return None
    distillation = Distillation.of_one(teacher, settings.teacher, student.tokenizer_path)
    distillation.check(settings)
    return distillation


def parent_model(parent: RunDir, variant: str | None) -> AsrModel:
    """The model to compress in ``variant``, None being the default. Of a model whose variants differ in their masks or integers, such as a
    supernet, that variant alone: training it would leave the weights behind that only the others use.

    Raises:
        UserError: there is no such variant.
    """
    model = load_model(parent)
    return in_variant(model, model.spec.variant if variant is None else variant)


def left_out(parent: RunDir, model: AsrModel) -> list[str]:
    """A line on the variants of ``parent`` that ``parent_model`` left out; [] where there are none."""
    gone = [name for name in spec_of(parent).variants if name not in model.spec.variants]
    if not gone:
        return []
    return [
        f"variant {model.spec.variant} alone: {', '.join(gone)} of {parent.path} share its weights, not its masks, and are left out"
    ]


def compression_task(
    settings: CompressConfig,
    spec: ModelSpec,
    origin: AsrModel,
    distillation: Distillation | None,
    batches: TrainBatches,
    notes: Sequence[str],
) -> TrainTask:
    """The model of ``spec``, with the weights of ``origin`` or new ones, and its loss, with what a teacher adds to it."""
    model = rebuild(spec, origin, new=is_mask)
    if settings.from_scratch:
        model = reinitialized(model, origin.submodels_of(settings.variant))
    if distillation is not None:
        distillation.attach(model)
        batches.clean = distillation.needs_clean
    loss = build_loss(spec, settings.loss, settings.contexts, distillation, steps=settings.training.steps)
    return TrainTask(model, loss, batches, notes=notes)


def fine_tune_compressed(
    stage: str,
    parent: RunDir,
    manifest: Path,
    out: Path,
    settings: CompressConfig,
    build: Callable[[TrainBatches], TrainTask],
    distillation: Distillation | None,
    *,
    prepare: Callable[[RunWriter, TrainBatches], None] | None = None,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """``fine_tune`` with an optional teacher."""
    weights = {} if distillation is None else distillation.weights
    return fine_tune(
        stage,
        parent,
        manifest,
        out,
        settings,
        build,
        entry={"teachers_sha256": {option: sha256_of(path) for option, path in weights.items()}} if weights else None,
        files=weights,
        check_cuts=None if distillation is None else distillation.check_cuts,
        prepare=prepare,
        other_losses=distillation is not None,
        dev=dev,
        device=device,
        command=command,
    )
