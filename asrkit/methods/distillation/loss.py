"""The recognizer's loss plus the distillation loss of frozen teachers.

The distillation loss of an utterance is the divergence from its teacher's posteriors on the transducer's lattice (arXiv 2011.06110),
times a weight for the utterance (self-adaptive distillation, US20220309340A1). The teacher is that of the utterance's language; the
posteriors of several teachers are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lhotse.cut import Cut
from torch import Tensor, nn

from asrkit.config import from_dict, to_dict
from asrkit.data.batch import Batch
from asrkit.errors import UserError
from asrkit.losses.distillation import (
    counted_nodes,
    divergence,
    frame_divergence,
    full_lattice_divergence,
    node_log_probs,
)
from asrkit.methods.distillation.cache import CachedOutputs, PosteriorCache
from asrkit.methods.distillation.config import DistillationConfig, check_distillation
from asrkit.methods.distillation.features import NAME as WHISPER_MAP
from asrkit.methods.distillation.features import FeatureCache
from asrkit.methods.distillation.teacher_outputs import TeacherOutputs
from asrkit.methods.distillation.teachers import ANY, Teachers, check_languages, each, load_teacher
from asrkit.methods.distillation.weights import weights_of
from asrkit.models import AsrModel
from asrkit.models.spec import ModelSpec
from asrkit.nn.context import Context
from asrkit.run_dir import WEIGHTS
from asrkit.training.asr_loss import ForwardPass, LossConfig, asr_loss, forward_losses
from asrkit.training.contexts import AttentionDropoutConfig, ContextsConfig, drawn, drawn_gates
from asrkit.training.session import StageConfig
from asrkit.training.step import LossOutput, Metric


@dataclass(frozen=True)
class Distillation:
    """Teachers and the settings of distillation, as used by every stage that can have teachers.

    teachers: by language; {} where Whisper teaches alone. cache: their posteriors on disk, read instead of running them. features: the
    frames of a Whisper teacher on disk.
    """

    teachers: Teachers
    settings: DistillationConfig
    cache: PosteriorCache | None = None
    features: FeatureCache | None = None

    @classmethod
    def of_one(cls, teacher: Path, settings: DistillationConfig, tokenizer: Path) -> Distillation:
        """One run directory that teaches all languages and has the student's ``tokenizer``.

        Raises:
            UserError: it cannot be used, or has another tokenizer.
        """
        return cls({ANY: [load_teacher(teacher, tokenizer)]}, settings)

    def check(self, stage: StageConfig) -> None:
        """Refuse teachers and settings that do not fit a student trained with the settings ``stage``, before any work.

        Raises:
            UserError: teachers last trained without a head that is needed; a weight that never starts to decay; joined
                utterances for teachers that take a language as an input.
        """
        check_distillation(self.teachers, self.settings, stage)

    def check_cuts(self, cuts: Iterable[Cut]) -> list[str]:
        """Why the cuts cannot all be taught by these teachers; [] if they can."""
        return check_languages(self.teachers, cuts)

    def attach(self, model: AsrModel) -> None:
        """If encoders are compared, give the student a linear map to the encoder of each teacher of another width, and to Whisper's."""
        if self.settings.encoder_scale > 0:
            dim = model.spec.encoder.dim
            widths = {teacher.name: teacher.model.spec.encoder.dim for teacher in each(self.teachers)}
            maps = {name: nn.Linear(dim, width) for name, width in widths.items() if width != dim}
            model.teacher_maps.update(maps)
        if self.features is not None and self.settings.features_scale > 0:
            model.teacher_maps[WHISPER_MAP] = nn.Linear(model.spec.encoder.dim, self.features.width)

    @property
    def needs_clean(self) -> bool:
        """Whether batches must hold the clean features as input for the teachers."""
        return bool(self.teachers) and self.cache is None and self.settings.input == "clean"

    @property
    def weights(self) -> dict[str, Path]:
        """The teachers' weights, by option: files that the run depends on."""
        paths = [teacher.run.path / WEIGHTS for teacher in each(self.teachers)]
        return {f"teacher {number}" if number > 1 else "teacher": path for number, path in enumerate(paths, start=1)}

    def outputs(self, batch: Batch, own: ForwardPass, context: Context) -> TeacherOutputs | CachedOutputs:
        """The teachers' outputs for a batch that the student ran on in ``context``."""
        how = self.settings
        if self.cache is not None:
            return self.cache.outputs(batch, own.encoder_out_lens, own.symbol_lens, how.delay)
        return TeacherOutputs(
            self.teachers,
            batch.languages,
            batch.clean if how.input == "clean" else batch.features,
            batch.feature_lens,
            batch.symbols,
            own.symbol_lens,
            own.encoder_out_lens,
            classes=how.classes,
            temperature=how.temperature,
            delay=how.delay,
            context=context if how.context == "same" else None,
        )


def distillation_loss(
    model: AsrModel,
    distillation: Distillation,
    batch: Batch,
    step: int,
    settings: LossConfig,
    context: Context,
    steps: int,
    variant: str | None = None,
    gates: Tensor | None = None,
) -> LossOutput:
    """``asr_loss`` in one context plus the distillation loss; each teacher runs in its default variant."""
    how = distillation.settings
    own = forward_losses(model, batch, step, settings, variant, context, gates)
    losses, metrics, frames = own.losses, dict(own.metrics), float(batch.num_encoder_frames)
    taught, features = bool(distillation.teachers), distillation.features if how.features_scale > 0 else None
    compares_nodes = taught and how.scale > 0 and own.transducer is not None
    compares_ctc = taught and how.ctc_scale > 0 and settings.ctc_scale > 0
    compares_encoders = taught and how.encoder_scale > 0
    if not (compares_nodes or compares_ctc or compares_encoders or features is not None):
        return LossOutput(losses, frames, metrics)

    def log(name: str, values: Tensor) -> None:
        metrics[f"kd_{name}"] = Metric(values.detach().sum(), frames)

    outputs = distillation.outputs(batch, own, context) if taught else None
    student_loss = torch.zeros_like(losses) if own.transducer is None else own.transducer.pruned
    teacher_loss = torch.zeros_like(losses)
    if how.weight.needs_teacher_loss:
        assert outputs is not None  # refused by ``check``
        teacher_loss = outputs.transducer_losses(settings)
        log("teacher_loss", _where(own.possible, teacher_loss))
    weights = weights_of(how.weight, step, steps, student_loss, teacher_loss, own.symbol_lens, own.encoder_out_lens)
    # An utterance without an alignment has an infinite loss, so it is not distilled.
    weights = _where(own.possible, weights)
    log("weight", weights * own.encoder_out_lens)
    if compares_nodes:
        assert outputs is not None
        on_lattice = _where(own.possible, _on_the_lattice(model, batch, own, outputs, how))
        log("lattice", on_lattice)
        if how.combination == "convex":
            losses = losses - how.scale * own.pruned
        losses = losses + how.scale * (weights * on_lattice)
    if compares_ctc:
        assert isinstance(outputs, TeacherOutputs)  # a cache has the nodes only
        student, teacher = model.ctc_log_probs(own.encoder_out), outputs.ctc_log_probs()
        by_frame = frame_divergence(student, teacher, own.encoder_out_lens, how.direction, how.temperature)
        ctc = _where(own.possible, how.temperature**2 * by_frame)
        log("ctc", ctc)
        losses = losses + how.ctc_scale * (weights * ctc)
    if compares_encoders:
        assert isinstance(outputs, TeacherOutputs)
        distances = outputs.encoder_distances(own.encoder_out, model.teacher_maps, how.encoder_distance)
        encoder = _where(own.possible, distances)
        log("encoder", encoder)
        losses = losses + how.encoder_scale * (weights * encoder)
    if features is not None:
        mapped = model.teacher_maps[WHISPER_MAP](own.encoder_out)
        apart = features.distances(mapped, own.encoder_out_lens, batch, how.features_distance, how.delay)
        apart = _where(own.possible, apart)
        log("features", apart)
        losses = losses + how.features_scale * (weights * apart)
    return LossOutput(losses, frames, metrics)


def _on_the_lattice(
    model: AsrModel,
    batch: Batch,
    own: ForwardPass,
    outputs: TeacherOutputs | CachedOutputs,
    how: DistillationConfig,
) -> Tensor:
    """The divergence of each utterance, (B,), with the settings ``how``; times the square of the temperature, because the
    gradient shrinks with it."""
    assert own.transducer is not None and own.joiner_in is not None
    lens = (own.encoder_out_lens, own.symbol_lens)
    if how.lattice == "full":
        encoded, predicted = own.joiner_in
        total = full_lattice_divergence(
            encoded,
            predicted,
            model.joiner,
            outputs.node_log_probs,
            batch.symbols,
            *lens,
            classes=how.classes,
            temperature=how.temperature,
            direction=how.direction,
            last_row=how.last_row,
            chunk=how.chunk,
        )
        ranges = torch.arange(predicted.shape[1], device=encoded.device).expand(*encoded.shape[:2], -1)
        nodes = counted_nodes(ranges, *lens, how.last_row)
    else:
        ranges = own.transducer.ranges
        nodes = counted_nodes(ranges, *lens, how.last_row)
        expected = outputs.node_log_probs(slice(None), ranges)
        with torch.autocast(expected.device.type, enabled=False):
            student = node_log_probs(
                own.transducer.logits, batch.symbols, ranges, lens[1], how.classes, how.temperature
            )
            total = divergence(student, expected, nodes, how.direction)
    if how.reduction == "mean":
        total = total / nodes.sum(dim=(1, 2)).clamp(min=1)
    return total if how.temperature == 1.0 else total * how.temperature**2


def _where(possible: Tensor, values: Tensor) -> Tensor:
    return torch.where(possible, values, torch.zeros_like(values))


def build_loss(
    spec: ModelSpec,
    settings: LossConfig,
    contexts: ContextsConfig,
    distillation: Distillation | None = None,
    *,
    steps: int = 1,
    variant: str | None = None,
    attention_dropout: AttentionDropoutConfig | None = None,
) -> Callable[[Any, Batch, int], LossOutput]:
    """The loss of a stage that trains the default variant of ``spec`` in ``contexts``, or in those it was trained in.

    Args:
        steps: the length of the training, over which the distillation weight may decay.
        variant: the variant to train; None is the default.

    Raises:
        UserError: teachers with joint contexts, or a weight that needs losses that are off.
    """
    train = contexts.train or spec.variants[spec.variant].contexts
    resolved = from_dict(ContextsConfig, {**to_dict(contexts), "train": train}, "contexts")
    if distillation is None:
        return lambda model, batch, step: asr_loss(model, batch, step, settings, resolved, variant, attention_dropout)
    if resolved.sampling == "joint":
        raise UserError("distillation uses one context per batch; set contexts.sampling=random")
    if distillation.settings.weight.needs_teacher_loss and settings.transducer_scale == 0:
        raise UserError(
            f"teacher.weight.kind={distillation.settings.weight.kind} compares transducers, but loss.transducer_scale is 0; "
            "set teacher.weight.kind=constant"
        )

    def loss(model: AsrModel, batch: Batch, step: int) -> LossOutput:
        gates = drawn_gates(model, attention_dropout, batch)
        context = drawn(resolved.choices)
        return distillation_loss(model, distillation, batch, step, settings, context, steps, variant, gates)

    return loss
