"""What frozen teachers say of a batch, and how much of it the student is told.

Each utterance is taught by the teacher of its language, or by several, whose posteriors are averaged. The divergence from
them on the transducer's lattice (arXiv 2011.06110) is weighted for each utterance by how well student and teacher know it
(self-adaptive distillation, US20220309340A1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from asrkit.config import config, from_dict, to_dict
from asrkit.data.batches import Batch
from asrkit.errors import UserError
from asrkit.losses.distillation import (
    Classes,
    Direction,
    Distance,
    LastRow,
    counted_nodes,
    divergence,
    frame_divergence,
    full_lattice_divergence,
    node_log_probs,
)
from asrkit.methods.distillation.cache import CachedOutputs, PosteriorCache
from asrkit.methods.distillation.teacher_outputs import TeacherOutputs
from asrkit.methods.distillation.teachers import Teachers, each
from asrkit.models import AsrModel
from asrkit.models.spec import ModelSpec, Positive
from asrkit.nn.context import Context
from asrkit.training.asr_loss import (
    AttentionDropoutConfig,
    ContextsConfig,
    ForwardPass,
    LossConfig,
    LossOutput,
    NonNegative,
    asr_loss,
    draw_gates,
    drawn,
    forward_losses,
)

Step = Annotated[int, Field(ge=0)]


@config
class WeightConfig:
    """The weight w of an utterance's distillation. That it is constant, or falls with the step, or with the teacher's loss, or
    that and rises with the student's, is of US20220309340A1; the functions are ours.

    constant: 1. linear, exponential: from ``start`` to ``end`` between ``from_step`` and ``to_step``. piecewise: that of
    the last of the ``points`` [step, weight] reached. teacher-loss: 1 / (1 + L_teacher). student-teacher:
    L_student / (1 + L_teacher), of which the nearest published code is that of google-research/protoscribe.
    The losses are the transducers' on the reference, ``per`` token, frame, or utterance (sum). ``detach``: no gradient
    through the weight (that code has one). ``clamp``: the least and the most w may be.
    """

    kind: Literal["constant", "linear", "exponential", "piecewise", "teacher-loss", "student-teacher"] = (
        "student-teacher"
    )
    start: NonNegative = 1.0
    end: NonNegative = 0.01
    from_step: Step = 0
    to_step: Step | None = None  # None: the end of the training
    points: list[tuple[Step, NonNegative]] = field(default_factory=list)
    per: Literal["token", "frame", "sum"] = "token"
    detach: bool = True
    clamp: tuple[NonNegative, NonNegative] | None = None

    @model_validator(mode="after")
    def _decays(self) -> Any:
        if self.kind in ("linear", "exponential") and self.end > self.start:
            raise ValueError(f"a decaying weight ends at or below its start, not at {self.end} from {self.start}")
        if self.kind == "exponential" and self.end == 0:
            raise ValueError("an exponential decay never reaches 0; set end above 0, or kind=linear")
        if self.kind in ("linear", "exponential") and self.to_step is not None and self.to_step <= self.from_step:
            raise ValueError(f"to_step={self.to_step} must lie after from_step={self.from_step}")
        if self.kind == "piecewise":
            if not self.points or self.points[0][0] != 0:
                raise ValueError("piecewise needs points such as [[0, 1.0], [1000, 0.1]], the first at step 0")
            for (step, weight), (later, after) in pairwise(self.points):
                if later <= step or after > weight:
                    raise ValueError("the steps of points must rise and their weights must not")
        if self.clamp is not None and self.clamp[0] > self.clamp[1]:
            raise ValueError(f"clamp is [least, most], not {list(self.clamp)}")
        return self

    @property
    def needs_teacher_loss(self) -> bool:
        return self.kind in ("teacher-loss", "student-teacher")


def weights_of(
    settings: WeightConfig,
    step: int,
    steps: int,
    student_loss: Tensor,
    teacher_loss: Tensor,
    symbol_lens: Tensor,
    encoder_out_lens: Tensor,
) -> Tensor:
    """The weight of each utterance, (B,), of the transducer losses (B,); ``steps`` is the length of the training."""
    if settings.needs_teacher_loss:
        if settings.per != "sum":
            lens = (symbol_lens if settings.per == "token" else encoder_out_lens).clamp(min=1)
            student_loss, teacher_loss = student_loss / lens, teacher_loss / lens
        if settings.detach:
            student_loss = student_loss.detach()
        weights = 1 / (1 + teacher_loss.detach())
        if settings.kind == "student-teacher":
            weights = student_loss * weights
    else:
        weights = torch.full_like(student_loss.detach(), scheduled_weight(settings, step, steps))
    return weights if settings.clamp is None else weights.clamp(*settings.clamp)


def scheduled_weight(settings: WeightConfig, step: int, steps: int) -> float:
    """The weight of a kind that knows nothing but the step."""
    if settings.kind == "constant":
        return 1.0
    if settings.kind == "piecewise":
        return [weight for first, weight in settings.points if first <= step][-1]
    last = steps - 1 if settings.to_step is None else settings.to_step
    done = min(1.0, max(0.0, (step - settings.from_step) / max(1, last - settings.from_step)))
    if settings.kind == "linear":
        return settings.start + done * (settings.end - settings.start)
    return settings.start ** (1 - done) * settings.end**done


@config
class DistillationConfig:
    """How the student is taught. What the sources leave open is ours.

    ``scale``: beta, of loss + beta * w * divergence; with ``combination`` convex it is alpha, of (1 - alpha) * pruned
    transducer loss + alpha * w * divergence, the other losses staying whole. ``ctc_scale``: of the divergence of the CTC
    posteriors, likewise times w; ``encoder_scale``: of the ``encoder_distance`` of the encoders' frames, likewise; a teacher
    of another width is met through a linear map that learns and is not kept. ``classes`` three: next symbol, blank and the
    rest; all: the whole vocabulary. ``lattice`` pruned: the student's own band; full: every node, ``chunk`` frames at a
    time. ``reduction`` over the nodes of an utterance. ``direction`` forward: KL(teacher || student). ``last_row``: after the last symbol, blank and rest
    (``all``: all) are compared, or nothing. ``delay``: encoder frames the teacher is behind.
    ``input`` clean: the teacher hears the utterance without SpecAugment, noise and other changes of its sound; shared: as
    the student does. ``context`` own: the first its variant was trained in; same: the student's.
    """

    scale: NonNegative = 0.1
    combination: Literal["additive", "convex"] = "additive"
    ctc_scale: NonNegative = 0.1
    classes: Classes = "three"
    lattice: Literal["pruned", "full"] = "pruned"
    chunk: Positive = 8
    reduction: Literal["sum", "mean"] = "sum"
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    direction: Direction = "forward"
    last_row: LastRow = "two"
    delay: Annotated[int, Field(ge=-5, le=5)] = 0
    encoder_scale: NonNegative = 0.0
    encoder_distance: Distance = "mse"
    input: Literal["clean", "shared"] = "clean"
    context: Literal["own", "same"] = "own"
    weight: WeightConfig = field(default_factory=WeightConfig)

    @model_validator(mode="after")
    def _alpha(self) -> Any:
        if self.combination == "convex" and self.scale > 1:
            raise ValueError(f"scale is a share of 1 with combination=convex, not {self.scale}")
        return self


def check_distillation(teachers: Teachers, teaching: DistillationConfig, settings: LossConfig, steps: int) -> None:
    """Refuse teachers that were last trained without a head that is to teach, and a weight that never begins to decay in
    ``steps``, the length of the training.

    Raises:
        UserError: all of them.
    """
    findings = []
    weight = teaching.weight
    if weight.kind in ("linear", "exponential") and weight.from_step >= steps:
        findings.append(
            f"teacher.weight.from_step={weight.from_step}: the decay would begin after training.steps={steps}; lower it, or set "
            "teacher.weight.kind=constant"
        )
    for teacher in each(teachers):
        # Stages without training, such as quantize, say nothing of losses.
        losses = next((entry["losses"] for entry in reversed(teacher.run.lineage) if "losses" in entry), None)
        if losses is None:
            continue
        at_nodes = teaching.scale > 0 and settings.transducer_scale > 0
        if (at_nodes or weight.needs_teacher_loss) and "transducer" not in losses:
            findings.append(
                f"--teacher {teacher.run.path}: was trained without a transducer; choose another, or teach by CTC: "
                "teacher.scale=0 and teacher.weight.kind=constant"
            )
        if teaching.ctc_scale > 0 and settings.ctc_scale > 0 and "ctc" not in losses:
            findings.append(f"--teacher {teacher.run.path}: was trained without CTC; set teacher.ctc_scale=0")
    if findings:
        raise UserError.of(findings)


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
        parts["teacher_loss"] = _where(own.possible, teacher_loss).sum()
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
        heard = frame_divergence(found, lesson.ctc_log_probs(), own.encoder_out_lens, teaching.direction)
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
