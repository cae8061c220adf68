"""How teachers teach: the settings of distillation."""

from __future__ import annotations

from dataclasses import field
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from asrkit.config import NonNegative, Positive, config
from asrkit.errors import UserError
from asrkit.losses.distillation import (
    Classes,
    Direction,
    Distance,
    LastRow,
)
from asrkit.methods.distillation.teachers import Teachers, each
from asrkit.training.asr_loss import LossConfig

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
