"""The settings of sequence criteria, and whether they fit each other."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Annotated, Literal

from pydantic import Field

from asrkit.config import Advanced, NonNegative, Positive, config
from asrkit.errors import UserError
from asrkit.run_dir import RunDir
from asrkit.training.asynchronous.config import AsyncConfig
from asrkit.training.config import TrainingConfig
from asrkit.training.optim import OptimizerConfig
from asrkit.training.session import FineTuneConfig

Criterion = Literal["mwer", "sampled-mbr", "mmi", "bmmi", "smbr", "mpe"]
LATTICE: tuple[Criterion, ...] = ("mmi", "bmmi", "smbr", "mpe")
Head = Literal["transducer", "ctc"]
Unit = Literal["word", "char", "token"]
Scale = Annotated[float, Field(gt=0.0)]


@config
class HypothesesConfig:
    """What mwer and sampled-mbr count errors of."""

    beam: Annotated[int, Field(ge=1, le=1000)] = 4
    """mwer: hypotheses of the beam search, for each utterance; at least 2."""
    paths: Positive = 8
    """sampled-mbr: paths drawn for each utterance; at least 2. arXiv 1706.02776 takes 100; our choice is fewer, which
    costs less."""
    unit: Unit = "word"
    """What errors are counted in: word, char, or token."""
    add_reference: Advanced[bool] = False
    """mwer: add the reference to the hypotheses where the search has not found it. The paper does not."""
    scale: Advanced[Scale] = 1.0
    """mwer: factor of the log-probabilities before they are renormalized over the hypotheses; below 1 the unlikely ones
    count more."""


@config
class DenominatorConfig:
    """The n-gram of tokens that stands for everything that could have been said, composed with the CTC topology."""

    order: Annotated[int, Field(ge=2, le=6)] = 2
    """Tokens of an n-gram. arXiv 1706.02776 takes a weak model, a bigram."""
    interpolation: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """Share in an n-gram's probability of that with one token less, down to equal probabilities of all tokens. With 0 the
    graph has the n-grams of the texts alone. Our choice."""
    lm_scale: NonNegative = 0.0
    """Factor of the n-gram's log-probabilities. Set it to the one that decoding will have, since the head unlearns what the
    n-gram says. 0 (our choice) is for decoding without an n-gram; with it and kappa=1, mmi is the CTC loss."""
    max_arcs: Positive = 2_000_000
    """Refuse a graph of more arcs than this. Our choice."""
    search_beam: Scale = 10.0
    """Log-probability by which a path may fall behind the best one while the lattice is made. Our choice."""
    output_beam: Scale = 6.0
    """Log-probability by which a path of the lattice may be worse than its best one. Our choice."""
    min_active: Advanced[Annotated[int, Field(ge=0)]] = 20
    """States to keep in each frame, whatever the beam. Our choice."""
    max_active: Positive = 1000
    """States to keep in each frame at most. Fewer take less time. Our choice."""


@config
class LatticeConfig:
    """What mmi, bmmi, smbr and mpe make of lattices; the source leaves these values open, so the defaults are our choice."""

    kappa: Scale = 1.0
    """Acoustic scale: factor of the log-probabilities of frames, in numerator and denominator."""
    boost: NonNegative = 0.1
    """bmmi: b, by which the score of each correct frame of the denominator is lowered."""
    numerator: Literal["graph", "alignment"] = "graph"
    """mmi, bmmi: the reference counts with all its alignments (graph), or with the best one."""
    blank: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """bmmi, smbr: how much a correct frame counts where the reference is blank, CTC's silence; a correct frame of a
    token counts 1. More makes smbr leave out tokens, less makes it insert them."""
    reject_frames: bool = True
    """Frames in which no path of the lattice has the token of the reference have no gradient."""
    denominator: DenominatorConfig = field(default_factory=DenominatorConfig)
    """The denominator, and how far its lattices are pruned."""


@config
class SequenceTrainConfig(FineTuneConfig):
    """Settings of sequence-train (US10019985, arXiv 1712.01818, arXiv 1706.02776). config.yaml of the run holds them all.

    The learning rate is a fifth of that of other stages (our choice): the gradient of a few hypotheses is noisy.
    """

    variant: str | None = None
    """Variant to train; null trains the parent's default."""
    criterion: Criterion = "mwer"
    """What is minimized: mwer, the expected errors over n-best hypotheses; sampled-mbr, over sampled paths; or, over
    lattices, which need k2: mmi, bmmi (boosted MMI), smbr (frames), mpe (tokens)."""
    head: Head | None = None
    """Which head is trained by the criterion; null is ctc for lattices, else transducer, if the loss trains it."""
    smoothing: NonNegative | None = None
    """Weight of the recognizer's own loss beside the criterion; null is 0.01 for mwer and sampled-mbr and 1 for
    lattices (our choice)."""
    l2: NonNegative = 0.0
    """Weight of half the squared distance of the trained weights from those of the start."""
    search_every: Positive = 1
    """Hypotheses and lattices are searched with weights that are renewed every N steps, and scored with the current ones.
    1 searches with the current weights."""
    cache: bool = False
    """Search once, before the training, with the weights of the start, on audio as it is, and keep hypotheses or lattices
    in the run directory; every step scores them with the current weights."""
    hypotheses: HypothesesConfig = field(default_factory=HypothesesConfig)
    """mwer and sampled-mbr: what errors are counted of."""
    lattice: LatticeConfig = field(default_factory=LatticeConfig)
    """mmi, bmmi, smbr and mpe."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(optimizer=OptimizerConfig(name="adamw", learning_rate=1e-4))
    )
    """Length of the run, logging, precision and optimizer."""
    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    """Who computes gradients, and from how old weights."""

    @property
    def lattices(self) -> bool:
        return self.criterion in LATTICE

    @property
    def trained_head(self) -> Head:
        """The head that the criterion trains."""
        if self.head is not None:
            return self.head
        return "ctc" if self.lattices or self.loss.transducer_scale == 0 else "transducer"

    @property
    def trained_heads(self) -> list[Head]:
        """The heads that have a loss: that of the criterion, and those of the smoothing."""
        scales: dict[Head, float] = {"transducer": self.loss.transducer_scale, "ctc": self.loss.ctc_scale}
        smoothed = {head for head, scale in scales.items() if scale > 0 and self.smoothing_weight > 0}
        return [head for head in scales if head in smoothed | {self.trained_head}]

    @property
    def smoothing_weight(self) -> float:
        return self.smoothing if self.smoothing is not None else 1.0 if self.lattices else 0.01


def check_sequence(settings: SequenceTrainConfig, parent: RunDir, manifests: int = 1) -> None:
    """Refuse settings that contradict each other, or a parent whose head has not been trained.

    Args:
        manifests: how many there are; several are the data of as many replicas.

    Raises:
        UserError: all findings.
    """
    findings, how, data = _without_effect(settings), settings.hypotheses, settings.data
    if settings.criterion == "mwer" and how.beam < 2:
        findings.append(
            "hypotheses.beam=1 leaves one hypothesis, whose risk has no gradient; raise it to 2 or more (4 is usual)"
        )
    if settings.criterion == "sampled-mbr" and how.paths < 2:
        findings.append("hypotheses.paths=1: the estimate compares paths; raise it to 2 or more")
    if settings.criterion == "sampled-mbr" and settings.search_every > 1:
        findings.append("search_every: sampled-mbr draws its paths from the current weights; leave it at 1")
    if (
        settings.criterion == "sampled-mbr"
        and settings.trained_head == "transducer"
        and settings.loss.topology == "regular"
    ):
        findings.append(
            "loss.topology=regular: sampled-mbr draws one symbol a frame at most; set loss.topology=modified, or head=ctc"
        )
    if settings.lattices and settings.trained_head != "ctc":
        findings.append(
            f"head={settings.head}: {settings.criterion} needs the lattices of the CTC head; leave head out"
        )
    if settings.lattices and (data.bpe_dropout > 0 or data.augment.join > 0):
        findings.append(
            f"{settings.criterion}: the denominator graph has the tokens of the texts as they are; set data.bpe_dropout=0 and "
            "data.augment.join=0"
        )
    if settings.search_every > 1 and (late := _late(settings.asynchronous, manifests)):
        findings.append(
            f"search_every={settings.search_every}: renews the searching weights at the steps of one process, but {late}; leave it at 1"
        )
    if settings.cache:
        findings += [f"--cache: {line}" for line in _cannot_be_cached(settings)]
    if settings.contexts.sampling == "joint":
        findings.append("sequence criteria use one context per batch; set contexts.sampling=random")
    # Stages without training, such as quantize, record no losses.
    trained = next((entry["losses"] for entry in reversed(parent.lineage) if "losses" in entry), None)
    if trained is not None and settings.trained_head not in trained:
        findings.append(
            f"{parent.path}: was trained without the {settings.trained_head} head, whose errors {settings.criterion} would count; set "
            f"head={' or '.join(trained)}, or choose another model"
        )
    if findings:
        raise UserError.of(findings)


# The settings under `hypotheses` and `lattice` that a criterion reads.
_READ: dict[Criterion, tuple[str, ...]] = {
    "mwer": ("hypotheses.beam", "hypotheses.unit", "hypotheses.add_reference", "hypotheses.scale"),
    "sampled-mbr": ("hypotheses.paths", "hypotheses.unit"),
    "mmi": ("lattice.kappa", "lattice.numerator", "lattice.reject_frames", "lattice.denominator"),
    "bmmi": tuple(f"lattice.{each.name}" for each in fields(LatticeConfig)),
    "smbr": ("lattice.kappa", "lattice.blank", "lattice.reject_frames", "lattice.denominator"),
    "mpe": ("lattice.kappa", "lattice.reject_frames", "lattice.denominator"),
}


def _without_effect(settings: SequenceTrainConfig) -> list[str]:
    """Settings that differ from their defaults and that the criterion does not read, as findings."""
    findings, read = [], _READ[settings.criterion]
    for group, values in (("hypotheses", settings.hypotheses), ("lattice", settings.lattice)):
        plain = type(values)()
        changed = [each.name for each in fields(values) if getattr(values, each.name) != getattr(plain, each.name)]
        findings += [
            f"{group}.{name}: {settings.criterion} does not use it; leave it out"
            for name in changed
            if f"{group}.{name}" not in read
        ]
    if settings.smoothing and settings.loss.transducer_scale == settings.loss.ctc_scale == 0:
        findings.append(
            "smoothing: the recognizer's own losses have weight 0; set loss.transducer_scale or loss.ctc_scale"
        )
    return findings


def _late(how: AsyncConfig, manifests: int) -> str:
    """What makes gradients come from older weights than those of the step; empty if nothing does."""
    if how.driver == "simulated":
        return (
            "asynchronous.staleness and fetch_every make its weights older"
            if how.staleness or how.fetch_every > 1
            else ""
        )
    several = (how.workers or manifests) > 1 or how.ray_address is not None
    return "replicas have steps of their own" if how.driver == "ray" or (how.driver == "auto" and several) else ""


def _cannot_be_cached(settings: SequenceTrainConfig) -> list[str]:
    """What a search before the training cannot serve, as findings."""
    augment, findings = settings.data.augment, []
    if settings.criterion == "sampled-mbr":
        findings.append("sampled-mbr draws its paths from the current weights; leave it out")
    if settings.search_every > 1:
        findings.append("searches once; leave search_every at 1")
    timing = {"speed": augment.speed, "tempo": augment.tempo, "silence": augment.silence} if settings.lattices else {}
    for name, value in {**timing, "join": augment.join}.items():
        if value > 0:
            findings.append(f"was searched in audio as it is; set data.augment.{name}=0, not {value}")
    return findings
