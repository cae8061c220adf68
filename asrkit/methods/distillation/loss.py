"""The recognizer's loss plus what frozen teachers add to it.

Each utterance is taught by the teacher of its language, or by several, whose posteriors are averaged: the divergence from them on
the transducer's lattice (arXiv 2011.06110), weighted for each utterance (self-adaptive distillation, US20220309340A1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
from asrkit.methods.distillation.config import DistillationConfig
from asrkit.methods.distillation.teacher_outputs import TeacherOutputs
from asrkit.methods.distillation.teachers import Teachers, each
from asrkit.methods.distillation.weights import weights_of
from asrkit.models import AsrModel
from asrkit.models.spec import ModelSpec
from asrkit.nn.context import Context
from asrkit.training.asr_loss import ForwardPass, LossConfig, LossOutput, asr_loss, forward_losses
from asrkit.training.contexts import AttentionDropoutConfig, ContextsConfig, draw_gates, drawn


def distillation_loss(
    model: AsrModel,
    teachers: Teachers | PosteriorCache,
    batch: Batch,
    step: int,
    settings: LossConfig,
    teaching: DistillationConfig,
    context: Context,
    steps: int,
    variant: str | None = None,
    gates: Tensor | None = None,
) -> LossOutput:
    """``asr_loss`` in one context, and what the teachers, each in its default variant, add to it."""
    own = forward_losses(model, batch, step, settings, variant, context, gates)
    loss, parts = own.loss, dict(own.parts)
    count = float(own.encoder_out_lens.sum())
    at_nodes = teaching.scale > 0 and own.transducer is not None
    at_frames = teaching.ctc_scale > 0 and settings.ctc_scale > 0
    if not (at_nodes or at_frames or teaching.encoder_scale > 0):
        return LossOutput(loss, count, parts)
    lesson: TeacherOutputs | CachedOutputs
    if isinstance(teachers, PosteriorCache):
        lesson = teachers.lesson(batch, own.encoder_out_lens, own.symbol_lens, teaching.delay)
    else:
        lesson = TeacherOutputs(
            teachers,
            batch.languages,
            batch.clean if teaching.input == "clean" else batch.features,
            batch.feature_lens,
            batch.symbols,
            own.symbol_lens,
            own.encoder_out_lens,
            classes=teaching.classes,
            temperature=teaching.temperature,
            delay=teaching.delay,
            context=context if teaching.context == "same" else None,
        )
    student_loss = torch.zeros_like(loss) if own.transducer is None else own.transducer.pruned
    teacher_loss = torch.zeros_like(loss)
    if teaching.weight.needs_teacher_loss:
        teacher_loss = lesson.transducer_losses(settings)
        parts["kd_teacher_loss"] = _where(own.possible, teacher_loss).sum()
    weights = weights_of(
        teaching.weight, step, steps, student_loss, teacher_loss, own.symbol_lens, own.encoder_out_lens
    )
    # Nothing is taught where there is no alignment, whose loss would be infinite.
    weights = _where(own.possible, weights)
    parts["kd_weight"] = (weights.detach() * own.encoder_out_lens).sum()  # logged, like all, as the mean over frames
    if at_nodes:
        taught = _where(own.possible, _on_the_lattice(model, batch, own, lesson, teaching))
        parts["kd_lattice"] = taught.detach().sum()
        if teaching.combination == "convex":
            loss = loss - teaching.scale * own.pruned
        loss = loss + teaching.scale * (weights * taught)
    if at_frames:
        assert isinstance(lesson, TeacherOutputs)  # a cache has the nodes alone
        found = model.ctc_log_probs(own.encoder_out)
        heard = teaching.temperature**2 * frame_divergence(
            found, lesson.ctc_log_probs(), own.encoder_out_lens, teaching.direction, teaching.temperature
        )
        heard = _where(own.possible, heard)
        parts["kd_ctc"] = heard.detach().sum()
        loss = loss + teaching.ctc_scale * (weights * heard)
    if teaching.encoder_scale > 0:
        assert isinstance(lesson, TeacherOutputs)
        far = _where(
            own.possible, lesson.encoder_distances(own.encoder_out, model.teacher_maps, teaching.encoder_distance)
        )
        parts["kd_encoder"] = far.detach().sum()
        loss = loss + teaching.encoder_scale * (weights * far)
    return LossOutput(loss, count, parts)


def _on_the_lattice(
    model: AsrModel,
    batch: Batch,
    own: ForwardPass,
    lesson: TeacherOutputs | CachedOutputs,
    teaching: DistillationConfig,
) -> Tensor:
    """The divergence of each utterance, (B,), as ``teaching`` measures it; times the temperature's square, as the
    gradient falls with it."""
    assert own.transducer is not None and own.joiner_in is not None
    lens = (own.encoder_out_lens, own.symbol_lens)
    if teaching.lattice == "full":
        encoded, predicted = own.joiner_in
        total = full_lattice_divergence(
            encoded,
            predicted,
            model.joiner,
            lesson.node_log_probs,
            batch.symbols,
            *lens,
            classes=teaching.classes,
            temperature=teaching.temperature,
            direction=teaching.direction,
            last_row=teaching.last_row,
            chunk=teaching.chunk,
        )
        ranges = torch.arange(predicted.shape[1], device=encoded.device).expand(*encoded.shape[:2], -1)
        nodes = counted_nodes(ranges, *lens, teaching.last_row)
    else:
        ranges = own.transducer.ranges
        nodes = counted_nodes(ranges, *lens, teaching.last_row)
        expected = lesson.node_log_probs(slice(None), ranges)
        with torch.autocast(expected.device.type, enabled=False):
            found = node_log_probs(
                own.transducer.logits, batch.symbols, ranges, lens[1], teaching.classes, teaching.temperature
            )
            total = divergence(found, expected, nodes, teaching.direction)
    if teaching.reduction == "mean":
        total = total / nodes.sum(dim=(1, 2)).clamp(min=1)
    return total if teaching.temperature == 1.0 else total * teaching.temperature**2


def _where(possible: Tensor, values: Tensor) -> Tensor:
    return torch.where(possible, values, torch.zeros_like(values))


def add_encoder_maps(model: AsrModel, teachers: Teachers, teaching: DistillationConfig) -> None:
    """Give the student a linear map to the encoder of each teacher of another width, where these are to be met."""
    if teaching.encoder_scale > 0:
        mine = model.spec.encoder.dim
        widths = {teacher.name: teacher.model.spec.encoder.dim for teacher in each(teachers)}
        model.teacher_maps.update({name: nn.Linear(mine, width) for name, width in widths.items() if width != mine})


def build_loss(
    spec: ModelSpec,
    settings: LossConfig,
    contexts: ContextsConfig,
    teachers: Teachers | PosteriorCache | None = None,
    teaching: DistillationConfig | None = None,
    *,
    steps: int = 1,
    variant: str | None = None,
    attention_dropout: AttentionDropoutConfig | None = None,
) -> Callable[[Any, Batch, int], LossOutput]:
    """The loss of a stage that trains ``spec``'s default variant, in ``contexts`` or else those it was trained in.

    Args:
        steps: the length of the training, over which a teacher's weight may decay.
        variant: the one to train where it is not the default.

    Raises:
        UserError: teachers, and contexts to train jointly, or a weight of losses that there are not.
    """
    train = contexts.train or spec.variants[spec.variant].contexts
    mine = from_dict(ContextsConfig, {**to_dict(contexts), "train": train}, "contexts")
    if teachers is None:
        return lambda model, batch, step: asr_loss(model, batch, step, settings, mine, variant, attention_dropout)
    teaching = teaching or DistillationConfig()
    if mine.sampling == "joint":
        raise UserError("a teacher teaches one context a batch; use contexts.sampling=random")
    if teaching.weight.needs_teacher_loss and settings.transducer_scale == 0:
        raise UserError(
            f"teacher.weight.kind={teaching.weight.kind} compares transducers, but loss.transducer_scale is 0; "
            "set teacher.weight.kind=constant"
        )

    def taught(model: AsrModel, batch: Batch, step: int) -> LossOutput:
        gates = None
        if attention_dropout is not None and model.training:
            gates = draw_gates(attention_dropout, len(model.encoder.blocks), len(batch.cut_ids))
        return distillation_loss(
            model,
            teachers,
            batch,
            step,
            settings,
            teaching,
            drawn(mine.choices),
            steps,
            variant,
            gates,
        )

    return taught
