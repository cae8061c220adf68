"""The settings of distillation, and whether they fit the teachers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from itertools import pairwise
from typing import Annotated, Any, Literal

from lhotse.cut import Cut
from pydantic import Field, model_validator

from asrkit.config import Advanced, NonNegative, Positive, config
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.train_batches import DataConfig
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.losses.distillation import (
    Classes,
    Direction,
    Distance,
    LastRow,
)
from asrkit.methods.distillation.teachers import Teachers, check_texts, each
from asrkit.training.asr_loss import LossConfig
from asrkit.training.session import StageConfig

Step = Annotated[int, Field(ge=0)]


@config
class WeightConfig:
    """The weight w of an utterance's distillation loss.

    US20220309340A1 says what it depends on (nothing, the step, the teacher's loss, or both losses). The functions are our choice;
    student-teacher is that of the closest published code (google-research/protoscribe).
    """

    kind: Literal["constant", "linear", "exponential", "piecewise", "teacher-loss", "student-teacher"] = (
        "student-teacher"
    )
    """How each utterance's distillation loss is weighted: constant, 1; linear or exponential, from `start` to `end`;
    piecewise, by `points`; teacher-loss, 1 / (1 + L_teacher); student-teacher, L_student / (1 + L_teacher), where L
    are the transducer losses on the reference."""
    start: NonNegative = 1.0
    """linear, exponential: weight up to `from_step`."""
    end: NonNegative = 0.01
    """linear, exponential: weight from `to_step` on."""
    from_step: Step = 0
    """linear, exponential: step at which the weight begins to fall."""
    to_step: Step | None = None
    """linear, exponential: step at which it reaches `end`; null is the last one."""
    points: list[tuple[Step, NonNegative]] = field(default_factory=list)
    """piecewise: [step, weight] pairs such as [[0, 1.0], [1000, 0.1]]; each weight holds from its step on."""
    per: Advanced[Literal["token", "frame", "sum"]] = "token"
    """teacher-loss, student-teacher: take the losses per token, per frame, or as the utterance's sum."""
    detach: Advanced[bool] = True
    """Stop the gradient through the weight. The published code lets it flow."""
    clamp: Advanced[tuple[NonNegative, NonNegative] | None] = None
    """[minimum, maximum] of the weight; null for no limits."""

    @model_validator(mode="after")
    def _decays(self) -> Any:
        if self.kind in ("linear", "exponential") and self.end > self.start:
            raise ValueError(f"a decaying weight cannot rise from start={self.start} to end={self.end}; lower end")
        if self.kind == "exponential" and self.end == 0:
            raise ValueError("an exponential decay never reaches 0; set end above 0, or kind=linear")
        if self.kind in ("linear", "exponential") and self.to_step is not None and self.to_step <= self.from_step:
            raise ValueError(f"to_step={self.to_step} must be greater than from_step={self.from_step}")
        if self.kind == "piecewise":
            if not self.points or self.points[0][0] != 0:
                raise ValueError("piecewise needs points such as [[0, 1.0], [1000, 0.1]], the first at step 0")
            for (step, weight), (later, after) in pairwise(self.points):
                if later <= step or after > weight:
                    raise ValueError("the steps of points must rise and their weights must not")
        if self.clamp is not None and self.clamp[0] > self.clamp[1]:
            raise ValueError(f"clamp is [minimum, maximum], not {list(self.clamp)}")
        return self

    @property
    def needs_teacher_loss(self) -> bool:
        return self.kind in ("teacher-loss", "student-teacher")


@config
class DistillationConfig:
    """How the student learns from its teachers (arXiv 2011.06110); what the sources leave open is our choice."""

    scale: NonNegative = 0.1
    """Weight beta of the transducer's distillation loss; with `combination=convex` the share alpha."""
    combination: Advanced[Literal["additive", "convex"]] = "additive"
    """additive adds beta w D to the loss (the paper's way); convex takes (1 - alpha) of the pruned transducer loss +
    alpha w D, and leaves the other losses as they are."""
    ctc_scale: NonNegative = 0.1
    """Weight of the divergence of the CTC posteriors, frame by frame, likewise times w; 0 is off."""
    classes: Classes = "three"
    """What is compared at each node: three (next symbol, blank, everything else; the paper's way) or all tokens."""
    lattice: Literal["pruned", "full"] = "pruned"
    """Nodes that are compared: pruned, the student's own band, or full, all of them, which takes more time."""
    chunk: Positive = 8
    """Frames computed at once with `lattice=full`. Fewer take less memory."""
    reduction: Advanced[Literal["sum", "mean"]] = "sum"
    """Sum over the nodes of an utterance (the paper's way), or their mean, which needs a larger `scale`."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature both models' logits are divided by; the loss is multiplied by its square."""
    direction: Advanced[Direction] = "forward"
    """forward is KL(teacher || student), the paper's way; reverse is KL(student || teacher)."""
    last_row: Advanced[LastRow] = "two"
    """After the last symbol, two compares blank with the rest, drop compares nothing."""
    delay: Annotated[int, Field(ge=-5, le=5)] = 0
    """Encoder frames of 40 ms by which the teacher is delayed, for a streaming student of a full-context teacher (arXiv
    2010.06030 tries -2 to 2)."""
    encoder_scale: NonNegative = 0.0
    """Weight of the distance between the encoders' frames, likewise times w; 0 is off. A teacher of another width is
    compared through a linear map that learns and is not kept."""
    encoder_distance: Advanced[Distance] = "mse"
    """Distance of the encoders' frames: mse, l2, l1 or cosine."""
    features_scale: NonNegative = 1.0
    """Weight of the distance of the encoder's frames, through a linear map that learns and is not kept, from those of a
    Whisper teacher, likewise times w; 0 is off."""
    features_distance: Literal["cosine", "l1"] = "cosine"
    """Distance from Whisper's frames: cosine, one less the cosine, or l1, the mean of the differences' sizes."""
    input: Literal["clean", "shared"] = "clean"
    """What the teacher hears: clean, the utterance without SpecAugment, noise and other changes of its sound, or
    shared, what the student hears."""
    context: Literal["own", "same"] = "own"
    """Context the teacher runs in: own, the first its variant was trained in, or same, the student's."""
    weight: WeightConfig = field(default_factory=WeightConfig)
    """How each utterance's distillation loss is weighted."""

    @model_validator(mode="after")
    def _alpha(self) -> Any:
        if self.combination == "convex" and self.scale > 1:
            raise ValueError(f"scale is a share with combination=convex, so at most 1, not {self.scale}")
        return self


def check_distillation(teachers: Teachers, how: DistillationConfig, stage: StageConfig) -> None:
    """Refuse teachers that cannot teach a student trained with the settings ``stage``; without any there is a Whisper teacher only.

    Raises:
        UserError: all findings; see ``Distillation.check``.
    """
    findings, weight, loss = [], how.weight, stage.loss
    if weight.kind in ("linear", "exponential") and weight.from_step >= stage.training.steps:
        findings.append(
            f"teacher.weight.from_step={weight.from_step}: the decay would start after the end of the training "
            f"(training.steps={stage.training.steps}); lower it, or set teacher.weight.kind=constant"
        )
    if not teachers and weight.needs_teacher_loss:
        findings.append(
            f"teacher.weight.kind={weight.kind}: needs the teacher's loss on the reference, and Whisper has none in the student's tokens; "
            "set teacher.weight.kind=constant or a schedule, or add a run directory as a teacher"
        )
    for teacher in each(teachers):
        option = f"--teacher {teacher.run.path}"
        if stage.data.augment.join > 0 and teacher.model.spec.languages:
            findings.append(
                f"{option}: takes the language as an input, but data.augment.join joins utterances of any language; "
                "set data.augment.join=0"
            )
        # Stages without training, such as quantize, record no losses.
        losses = next((entry["losses"] for entry in reversed(teacher.run.lineage) if "losses" in entry), None)
        if losses is None:
            continue
        compares_nodes = how.scale > 0 and loss.transducer_scale > 0
        if (compares_nodes or weight.needs_teacher_loss) and "transducer" not in losses:
            findings.append(
                f"{option}: was trained without a transducer; choose another teacher, or distill CTC only: set "
                "teacher.scale=0 and teacher.weight.kind=constant"
            )
        if how.ctc_scale > 0 and loss.ctc_scale > 0 and "ctc" not in losses:
            findings.append(f"{option}: was trained without CTC; set teacher.ctc_scale=0")
    if findings:
        raise UserError.of(findings)


def check_tokenizers(
    teachers: Teachers,
    tokenizer: Tokenizer,
    how: DistillationConfig,
    loss: LossConfig,
    data: DataConfig,
    cuts: Iterable[Cut],
) -> None:
    """Refuse settings and texts that teachers with another tokenizer than the student's cannot handle.

    Raises:
        UserError: all findings.
    """
    others = [str(t.run.path) for t in each(teachers) if sha256_of(t.run.tokenizer_path) != sha256_of(tokenizer.path)]
    if not others:
        return
    subject, findings = f"teachers with another tokenizer than the student's ({', '.join(others)})", []
    if how.classes == "all":
        findings.append(f"{subject}: their tokens mean something else; set teacher.classes=three")
    if how.ctc_scale > 0 and loss.ctc_scale > 0:
        findings.append(f"{subject}: their CTC posteriors mean something else; set teacher.ctc_scale=0")
    if data.bpe_dropout > 0:
        findings.append(f"{subject}: all must segment a text into the same pieces; set data.bpe_dropout=0")
    if findings := findings or check_texts(teachers, tokenizer, cuts):
        raise UserError.of(findings)
