"""The recogniser's own loss, shared by every stage that trains it: CTC plus the pruned transducer, in the contexts the
model is trained for, with attention dropout where the stage asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from asrkit.config import config, from_dict, to_dict
from asrkit.data.batches import Batch
from asrkit.errors import UserError
from asrkit.losses.distillation import Classes, node_divergence
from asrkit.losses.transducer import (
    Backend,
    Topology,
    TransducerLoss,
    gather_pruned,
    transducer_loss,
    warm_up_scales,
)
from asrkit.models.asr import AsrModel
from asrkit.models.spec import ContextText, ModelSpec
from asrkit.nn.context import FULL, Context, parse_context

NonNegative = Annotated[float, Field(ge=0.0)]


@config
class LossConfig:
    """Weights and shape of the loss; the schedule is that of the pruned transducer's reference recipes.

    ``ctc_scale`` 0 trains no CTC head, ``transducer_scale`` 0 no transducer. Both together regularise each other.
    ``topology`` (ours): modified lets a frame hold one symbol at most, as the searches and the runtimes decode;
    regular, the original, lets a model emit several in one frame, which those then lose.
    """

    ctc_scale: NonNegative = 0.3
    transducer_scale: NonNegative = 1.0
    simple_scale: NonNegative = 0.5
    warm_up_steps: Annotated[int, Field(ge=0)] = 1000
    prune_range: Annotated[int, Field(ge=2)] = 5
    lm_scale: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25
    am_scale: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    topology: Topology = "modified"
    backend: Backend = "auto"


@config
class ContextsConfig:
    """The contexts a stage trains in, ``train``; the first is the one dev WER is measured in.

    ``sampling`` random: each process draws one a batch. joint: every batch is seen in full context and in one drawn of
    the others, and the losses are added (dual-mode training, arXiv 2010.06030, section 3). Joint training can distil in
    place: ``distillation_scale`` times the divergence of the streaming from the full-context posteriors on the
    streaming pass's pruned lattice, the teacher delayed by ``distillation_delay`` encoder frames (it emits earlier; the
    paper tunes -2 to 2). Its scale and its classes are open in the paper: ours are 0, which is off, and three.
    """

    train: Annotated[list[ContextText], Field(min_length=1)] | None = None
    sampling: Literal["random", "joint"] = "random"
    distillation_scale: NonNegative = 0.0
    distillation_classes: Classes = "three"
    distillation_delay: Annotated[int, Field(ge=-5, le=5)] = 0

    @model_validator(mode="after")
    def _joint_needs_two(self) -> Any:
        streaming = [text for text in self.train or [] if text != str(FULL)]
        if self.sampling == "joint" and not (streaming and str(FULL) in (self.train or [])):
            raise ValueError("joint training takes full and at least one streaming context in contexts.train")
        if self.distillation_scale > 0 and self.sampling != "joint":
            raise ValueError("in-place distillation needs contexts.sampling=joint")
        return self


def check_contexts(contexts: ContextsConfig, loss: LossConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        UserError: in-place distillation without a transducer.
    """
    if contexts.distillation_scale > 0 and loss.transducer_scale == 0:
        raise UserError(
            "contexts.distillation_scale compares transducers, but loss.transducer_scale is 0; set one of them"
        )


@config
class TeacherConfig:
    """What a frozen model teaches the one that trains: ``scale`` times the divergence of their transducers' posteriors on the
    student's pruned lattice, over ``classes``, and ``ctc_scale`` times that of their CTC posteriors."""

    scale: NonNegative = 1.0
    ctc_scale: NonNegative = 0.3
    classes: Classes = "all"


@config
class AttentionDropoutConfig:
    """How attention is dropped at random while the backbone trains (US20240185839A1, which leaves all of this open).

    ``probability`` 1 trains the backbone alone, 0 an ordinary Conformer. ``over``: each layer draws for itself, or the
    whole model at once; ``per`` batch or utterance. ``rescale`` divides what is left by 1 - probability; off, the
    backbone alone is what it is in training when all attention is dropped.
    """

    probability: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    over: Literal["layer", "model"] = "layer"
    per: Literal["batch", "utterance"] = "batch"
    rescale: bool = False


def draw_gates(settings: AttentionDropoutConfig, num_layers: int, batch: int) -> Tensor | None:
    """Factors of attention (num_layers, batch or 1) on the CPU, 0 where it is dropped; None where all of it stays.

    Drawn by torch's own generator, which the loop seeds from (seed, rank, step).
    """
    if settings.probability == 0:
        return None
    shape = (num_layers if settings.over == "layer" else 1, batch if settings.per == "utterance" else 1)
    gates = torch.bernoulli(torch.full(shape, 1 - settings.probability))
    if settings.rescale and settings.probability < 1:
        gates /= 1 - settings.probability
    return gates.expand(num_layers, -1)


@dataclass(frozen=True)
class LossOutput:
    """``loss`` (B,) differentiable, one value for each utterance; ``count`` encoder frames, by which the sum over
    the whole step is divided; ``parts`` sums to log, likewise divided."""

    loss: Tensor
    count: float
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class _Pass:
    """One way through the model: its loss, and what distillation reads of it."""

    loss: Tensor
    parts: dict[str, Tensor]
    encoder_out: Tensor
    encoder_out_lens: Tensor
    symbol_lens: Tensor
    possible: Tensor
    transducer: TransducerLoss | None


def recogniser_loss(
    model: AsrModel,
    batch: Batch,
    step: int,
    settings: LossConfig,
    contexts: ContextsConfig | None = None,
    configuration: str | None = None,
    attention_dropout: AttentionDropoutConfig | None = None,
) -> LossOutput:
    """CTC and pruned transducer loss of a batch (whose tensors are on the model's device).

    An utterance with fewer encoder frames than an alignment of its symbols needs (a frame for each; for CTC one more
    between equal neighbours) adds nothing to that loss and is counted in ``left_out``. Context and attention dropout are
    drawn by torch's generator on the CPU. Joint contexts log full context under the plain names.
    """
    contexts = contexts or ContextsConfig()
    choices = [parse_context(text) for text in contexts.train or [str(FULL)]]
    gates = None
    if attention_dropout is not None and model.training:
        gates = draw_gates(attention_dropout, len(model.encoder.blocks), len(batch.cut_ids))
    if contexts.sampling == "random":
        chosen = choices[0] if len(choices) == 1 else choices[int(torch.randint(len(choices), ()))]
        only = _one_pass(model, batch, step, settings, configuration, chosen, gates)
        return LossOutput(only.loss, float(only.encoder_out_lens.sum()), only.parts)
    others = [context for context in choices if context.streaming]
    chosen = others[0] if len(others) == 1 else others[int(torch.randint(len(others), ()))]
    full = _one_pass(model, batch, step, settings, configuration, FULL, gates)
    streaming = _one_pass(model, batch, step, settings, configuration, chosen, gates)
    loss = full.loss + streaming.loss
    parts = full.parts | {f"streaming_{name}": value for name, value in streaming.parts.items() if name != "left_out"}
    if contexts.distillation_scale > 0:
        divergence = _divergence(
            model,
            batch,
            full.encoder_out,
            full.encoder_out_lens,
            streaming,
            contexts.distillation_classes,
            contexts.distillation_delay,
        )
        loss = loss + contexts.distillation_scale * divergence
        parts["distillation"] = divergence.detach().sum()
    return LossOutput(loss, float(full.encoder_out_lens.sum()), parts)


def _one_pass(
    model: AsrModel,
    batch: Batch,
    step: int,
    settings: LossConfig,
    configuration: str | None,
    context: Context,
    gates: Tensor | None,
) -> _Pass:
    encoder_out, encoder_out_lens = model.encode(batch.features, batch.feature_lens, configuration, context, gates)
    loss = encoder_out.new_zeros(len(batch.cut_ids), dtype=torch.float32)
    parts: dict[str, Tensor] = {}
    if settings.ctc_scale > 0:
        repeats = (batch.symbols[:, 1:] == batch.symbols[:, :-1]) & (batch.symbols[:, 1:] != model.blank)
        possible = encoder_out_lens >= batch.symbol_lens + repeats.sum(1)
        log_probs = model.ctc_log_probs(encoder_out)
        ctc = F.ctc_loss(
            log_probs.transpose(0, 1),
            batch.symbols,
            encoder_out_lens,
            batch.symbol_lens,
            reduction="none",
            zero_infinity=True,
        )
        loss = loss + settings.ctc_scale * ctc
        parts |= {"ctc": ctc.detach().sum(), "left_out": (~possible).sum()}
    possible = encoder_out_lens >= batch.symbol_lens
    # Shortened, so that an impossible utterance has a finite loss to be masked.
    symbol_lens = torch.minimum(batch.symbol_lens, encoder_out_lens)
    transducer = None
    if settings.transducer_scale > 0:
        predicted = model.predictor(model.predictor.contexts_of(batch.symbols))
        transducer = transducer_loss(
            model.joiner.project_encoder(encoder_out),
            model.joiner.project_predictor(predicted),
            model.joiner,
            model.simple_encoder(encoder_out),
            model.simple_predictor(predicted),
            batch.symbols,
            encoder_out_lens,
            symbol_lens,
            prune_range=settings.prune_range,
            lm_scale=settings.lm_scale,
            am_scale=settings.am_scale,
            backend=settings.backend,
            topology=settings.topology,
        )
        simple, pruned = (
            torch.where(possible, part, torch.zeros_like(part)) for part in (transducer.simple, transducer.pruned)
        )
        simple_scale, pruned_scale = warm_up_scales(step, settings.warm_up_steps, settings.simple_scale)
        loss = loss + settings.transducer_scale * (simple_scale * simple + pruned_scale * pruned)
        parts |= {"simple": simple.detach().sum(), "pruned": pruned.detach().sum()}
        parts.setdefault("left_out", (~possible).sum())
    return _Pass(loss, parts, encoder_out, encoder_out_lens, symbol_lens, possible, transducer)


def loss_of_a_stage(
    spec: ModelSpec,
    settings: LossConfig,
    contexts: ContextsConfig,
    teacher: AsrModel | None = None,
    teaching: TeacherConfig | None = None,
) -> Callable[[Any, Batch, int], LossOutput]:
    """The loss of a stage that trains ``spec``'s default configuration, in ``contexts`` or else those it was trained in.

    Raises:
        UserError: a teacher, and contexts to train jointly.
    """
    train = contexts.train or spec.configurations[spec.configuration].contexts
    mine = from_dict(ContextsConfig, {**to_dict(contexts), "train": train}, "contexts")
    if teacher is None:
        return lambda model, batch, step: recogniser_loss(model, batch, step, settings, mine)
    if mine.sampling == "joint":
        raise UserError("a teacher teaches one context a batch; use contexts.sampling=random")
    choices = [parse_context(text) for text in train]

    def taught(model: AsrModel, batch: Batch, step: int) -> LossOutput:
        chosen = choices[0] if len(choices) == 1 else choices[int(torch.randint(len(choices), ()))]
        guide = teacher.to(batch.features.device).eval()
        return taught_loss(model, guide, batch, step, settings, teaching or TeacherConfig(), chosen)

    return taught


def taught_loss(
    model: AsrModel,
    teacher: AsrModel,
    batch: Batch,
    step: int,
    settings: LossConfig,
    teaching: TeacherConfig,
    context: Context = FULL,
) -> LossOutput:
    """``recogniser_loss`` in one context, and what ``teacher``, in evaluation mode and in the same context, says of it.

    Each runs in its own default configuration.
    """
    own = _one_pass(model, batch, step, settings, None, context, None)
    with torch.no_grad():
        encoder_out, _ = teacher.encode(batch.features, batch.feature_lens, None, context)
    loss, parts = own.loss, dict(own.parts)
    if teaching.scale > 0 and own.transducer is not None:
        taught = _divergence(teacher, batch, encoder_out, own.encoder_out_lens, own, teaching.classes)
        loss, parts["taught"] = loss + teaching.scale * taught, taught.detach().sum()
    if teaching.ctc_scale > 0 and settings.ctc_scale > 0:
        with torch.no_grad():
            expected = teacher.ctc_log_probs(encoder_out)
        found = model.ctc_log_probs(own.encoder_out)
        valid = torch.arange(found.shape[1], device=found.device) < own.encoder_out_lens.unsqueeze(1)
        per_frame = (expected.exp() * (expected - found)).sum(-1).masked_fill(~valid, 0.0)
        loss, parts["taught_ctc"] = loss + teaching.ctc_scale * per_frame.sum(1), per_frame.detach().sum()
    return LossOutput(loss, float(own.encoder_out_lens.sum()), parts)


def _divergence(
    teacher: AsrModel,
    batch: Batch,
    teacher_out: Tensor,
    encoder_out_lens: Tensor,
    student: _Pass,
    classes: Classes,
    delay: int = 0,
) -> Tensor:
    """How far a pass is from what ``teacher`` makes of its own encoder frames, (B,), on the pass's own pruned lattice."""
    if student.transducer is None:
        raise ValueError("distillation compares transducers, and this pass had none")
    num_frames = teacher_out.shape[1]
    with torch.no_grad():
        # Frame t of the teacher is its frame t - delay; at the ends, where there is none, the nearest.
        frames = (torch.arange(num_frames, device=teacher_out.device) - delay).clamp(min=0)
        frames = torch.minimum(frames, encoder_out_lens.unsqueeze(1) - 1).clamp(min=0)
        rows = torch.arange(len(frames), device=frames.device).unsqueeze(1)
        predicted = teacher.joiner.project_predictor(teacher.predictor(teacher.predictor.contexts_of(batch.symbols)))
        encoded = teacher.joiner.project_encoder(teacher_out[rows, frames])
        expected = teacher.joiner(*gather_pruned(encoded, predicted, student.transducer.ranges))
    with torch.autocast(expected.device.type, enabled=False):
        divergence = node_divergence(
            student.transducer.logits,
            expected,
            batch.symbols,
            student.transducer.ranges,
            student.encoder_out_lens,
            student.symbol_lens,
            classes,
        )
    return torch.where(student.possible, divergence, torch.zeros_like(divergence))
