"""Settings of supernets, and which of them contradict each other.

Sources: self-pruning (arXiv 2207.11906), omni-sparsity DNN (arXiv 2110.08352).
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from asrkit.config import Advanced, NonNegative, Positive, config
from asrkit.losses.distillation import Classes
from asrkit.methods.pruning import MaskSchedule, last_update, updates
from asrkit.models.compression import LayerChoice
from asrkit.models.spec import ContextText
from asrkit.training.asr_loss import LossConfig
from asrkit.training.config import TrainingConfig
from asrkit.training.contexts import ContextsConfig
from asrkit.training.session import FineTuneConfig
from asrkit.training.start import StartConfig

WITH_MOMENTS = ("adamw", "scaled_adam")  # optimizers that know how large a weight's gradients have been


@config
class GrowthConfig:
    """When and how the masks of the sparse member grow; after the last time they do not change."""

    kind: Literal["geometric", "cubic"] = "geometric"
    """geometric: `share` of what is left goes each time until the sparsity is reached (arXiv 2207.11906). cubic: `times` times,
    the sparsity growing as 1 - (1 - i / times)^3 of its target (arXiv 2110.08352)."""
    start: Annotated[int, Field(ge=0)] | None = None
    """Step at which the masks grow for the first time; before it both members have all weights. null: after one `interval` of steps in which the
    encoder is trained, as in the paper."""
    interval: Positive = 200
    """Steps from one growth of the masks to the next. The paper has 6,000 and 10,000 for 60,000 and 960 hours of speech."""
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of the remaining blocks that goes each time, with geometric. The last time takes what is missing to the sparsity (our choice)."""
    times: Positive = 8
    """How often the masks grow, with cubic."""
    monotone: bool = True
    """A block that has gone does not come back (arXiv 2207.11906). false: masks are computed anew from all weights each
    time, as those under the mask learn in the dense member (arXiv 2110.08352)."""
    score: Literal["l2", "l1", "adam"] = "l2"
    """What decides which blocks stay: the sum of their squared weights, of their absolute weights (the paper only says
    magnitude), or of |w| sqrt(v) with Adam's second moment v (arXiv 2110.08352)."""

    @property
    def schedule(self) -> MaskSchedule:
        """The times and shares."""
        start = self.interval if self.start is None else self.start
        kind: Literal["iterative", "cubic"] = "cubic" if self.kind == "cubic" else "iterative"
        return MaskSchedule(kind=kind, shots=self.times, interval=self.interval, start=start, share=self.share)

    def final(self, sparsity: float) -> int:
        """The step before which the masks grow for the last time."""
        return last_update(self.schedule, sparsity)

    def sparsity_at(self, step: int, sparsity: float) -> float:
        """The sparsity at a step, on the way to ``sparsity``."""
        schedule = self.schedule
        if step < schedule.start:
            return 0.0
        reached = updates(schedule, sparsity)
        return reached[min((step - schedule.start) // schedule.interval, len(reached) - 1)] or 0.0


@config
class LassoConfig:
    """Group lasso, a decay that makes whole blocks small before they are pruned (arXiv 2207.11906)."""

    scale: NonNegative = 0.0
    """Strength; 0 is off, 1 is the paper's. A layer's own is this times the mean norm of its blocks."""
    start: Annotated[int, Field(ge=0)] = 0
    """First step with the decay."""
    end: Annotated[int, Field(ge=0)] | None = None
    """First step without it again; null: once the masks are final, as in the paper."""
    times_learning_rate: Advanced[bool] = True
    """Multiply the decay by the learning rate, as AdamW's weight decay is. The paper leaves this open."""

    def steps(self, final: int, begin: int) -> range:
        """The steps with the decay: none once the masks are ``final``, unless `end` says so, and none before step ``begin``."""
        return range(max(begin, self.start), final if self.end is None else self.end)


@config
class InPlaceConfig:
    """In-place distillation: on a sparse step, the dense member teaches the sparse one (arXiv 2110.08352)."""

    scale: NonNegative = 0.0
    """Weight of the divergence on the sparse pass's pruned lattice; 0 is off. It takes a dense pass without gradients
    on every sparse step."""
    classes: Advanced[Classes] = "three"
    """What is compared: three (next symbol, blank, everything else) or all tokens."""
    delay: Advanced[Annotated[int, Field(ge=-5, le=5)]] = 0
    """Encoder frames of 40 ms by which the dense member, which emits earlier in full context, is delayed."""


@config
class MembersConfig:
    """Further members, with another sparsity in each layer, any of which can be cut out afterwards (arXiv 2110.08352)."""

    sparsities: list[Annotated[float, Field(ge=0.0, lt=1.0)]] = field(default_factory=list)
    """Sparsities that a random member draws from for each encoder block, beside `sparsity`, which must be the largest; such
    as [0.5, 0.6, 0.7] with a sparsity of 0.8, as in the paper. Empty: there are the dense and the sparse member only."""
    random: Positive = 2
    """Random members in a step. Each batch is split in equal parts, one for the dense member, one for the sparse one and one
    for each random one (the sandwich rule)."""


@config
class SelfPruningConfig:
    """How the masks of a sparse member are found while both members are trained (arXiv 2207.11906)."""

    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.67
    """Share of the weights that the sparse member leaves out in the end, the same in every layer."""
    block: tuple[Positive, Positive] = (8, 1)
    """Outputs and inputs that stay or go as one block. The paper has 8 weights in a block and leaves open which way it lies."""
    draws: tuple[Positive, Positive] = (1, 1)
    """How often a process draws the dense and the sparse member, as a ratio; [1, 1], the paper's, is half and half."""
    dense_steps: Annotated[int, Field(ge=0)] = 0
    """First steps in which the dense member trains alone (the paper's two-step training). A parent trained so makes
    them unnecessary."""
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    """When the masks grow, and what stays."""
    lasso: LassoConfig = field(default_factory=LassoConfig)
    """A decay that makes whole blocks small beforehand."""
    layers: LayerChoice = field(default_factory=LayerChoice)
    """Which linear layers have masks; never the joiner, and never a subsampling that `pretrained.freeze_embed` keeps as it is."""


@config
class SupernetConfig(SelfPruningConfig, StartConfig):
    """Settings of supernet (arXiv 2207.11906, arXiv 2110.08352). config.yaml of the run holds them all."""

    loss: LossConfig = field(default_factory=lambda: FineTuneConfig().loss)
    """Training loss."""
    training: TrainingConfig = field(default_factory=lambda: FineTuneConfig().training)
    """Length of the run, logging, precision and optimizer."""
    variant: str | None = None
    """Variant of the parent to make both members of, with its sub-models; null is the parent's default."""
    dense: ContextText = "full"
    """Context of the dense member."""
    sparse: ContextText = "chunk=8,left=32"
    """Context of the sparse member, in encoder frames of 40 ms."""
    default: Literal["sparse", "dense"] = "sparse"
    """Variant that is used where none is named; the best weights are those of its lowest dev WER. The other's is
    measured too."""
    members: MembersConfig = field(default_factory=MembersConfig)
    """Members between the two."""
    freeze_masks: bool = False
    """Keep the masks of a parent that is a supernet, instead of finding new ones."""
    adaptive_dropout: bool = False
    """On sparse steps, drop (1 - sparsity) times as much beside masked layers (arXiv 2110.08352)."""
    distillation: InPlaceConfig = field(default_factory=InPlaceConfig)
    """The dense member as the teacher of the sparse one."""

    @model_validator(mode="after")
    def _sparsities_ascend(self) -> Any:
        others = self.members.sparsities
        if others != sorted({*others}) or (others and others[-1] >= self.sparsity):
            raise ValueError(f"members.sparsities: {others} must ascend and stay below the sparsity of {self.sparsity}")
        return self


def contradictions(settings: SupernetConfig, begin: int) -> list[str]:
    """Findings about settings that contradict each other or the length of the training, of which the first ``begin`` steps do not
    train the encoder."""
    findings = []
    if settings.freeze_masks:
        plain = SupernetConfig()
        asked = [name for name in ("sparsity", "block", "growth", "lasso", "layers")
                 if getattr(settings, name) != getattr(plain, name)]  # fmt: skip
        asked += ["members.sparsities"] * bool(settings.members.sparsities)
        if asked:
            findings.append(f"freeze_masks keeps the parent's masks as they are; leave out {', '.join(asked)}")
    else:
        findings += schedule_findings(settings, settings.training, begin)
    if settings.members.random != MembersConfig().random and not (settings.members.sparsities or settings.freeze_masks):
        findings.append("members.random: has no effect without members.sparsities; set these, or leave it out")
    if settings.contexts != ContextsConfig():
        findings.append("contexts: the members have one context each; use --dense and --sparse instead")
    if settings.distillation.scale > 0 and settings.loss.transducer_scale == 0:
        findings.append(
            "distillation.scale compares transducers, but loss.transducer_scale is 0; set one of them otherwise"
        )
    return findings


def schedule_findings(
    settings: SelfPruningConfig, training: TrainingConfig, begin: int = 0, group: str = ""
) -> list[str]:
    """Findings about masks and decay that do not fit into the training, and about layers that never have a mask.

    Args:
        begin: first step that trains the encoder.
        group: the name of the group that the settings stand in, with a dot.
    """
    findings, growth, lasso = [], settings.growth, settings.lasso
    final, start = growth.final(settings.sparsity), growth.schedule.start
    if final >= training.steps:
        findings.append(
            f"a sparsity of {settings.sparsity} would be reached at step {final}, but training.steps is {training.steps}; train longer, "
            f"or lower {group}growth.interval, or what else lengthens the schedule ({group}growth.start, {group}growth.times, a small "
            f"{group}growth.share)"
        )
    if start < begin:
        findings.append(
            f"{group}growth.start: is {start}, but the encoder is trained from step {begin} on; leave it out, or set it to {begin} or more"
        )
    if growth.score == "adam":
        if start <= begin:
            findings.append(
                f"{group}growth.score=adam needs what the optimizer learns in the steps before; set {group}growth.start ({start}) above {begin}"
            )
        if training.optimizer.name not in WITH_MOMENTS:
            findings.append(
                f"{group}growth.score=adam needs the second moments of {' or '.join(WITH_MOMENTS)}, which {training.optimizer.name} has not; "
                "set another training.optimizer.name, or another score"
            )
    if lasso.scale > 0 and not (decayed := lasso.steps(final, begin)):
        findings.append(
            f"{group}lasso: would begin at step {decayed.start} and end at step {decayed.stop}, so there would be none; lower "
            f"{group}lasso.start, or raise {group}lasso.end"
        )
    if settings.dense_steps >= training.steps:
        findings.append(
            f"{group}dense_steps is {settings.dense_steps}, but training.steps is {training.steps}, so the sparse member would never be "
            "trained; train longer, or lower it"
        )
    if others := [part for part in settings.layers.only if part in ("joiner", "ctc_head")]:
        findings.append(
            f"{group}layers.only: {', '.join(others)} stays dense in a supernet; choose from encoder, submodels"
        )
    return findings
