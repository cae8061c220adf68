"""The recognizer's own loss, shared by every stage that trains it: CTC plus the pruned transducer, in the contexts to
train in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from asrkit.config import Advanced, NonNegative, config
from asrkit.data.batch import Batch
from asrkit.errors import UserError
from asrkit.losses.ctc import ctc_loss
from asrkit.losses.distillation import Classes, delayed, node_divergence
from asrkit.losses.transducer import (
    Backend,
    Topology,
    TransducerLoss,
    fits,
    gather_pruned,
    range_needed,
    transducer_loss,
    warm_up_scales,
)
from asrkit.models.asr import AsrModel
from asrkit.nn.context import FULL, Context
from asrkit.training.contexts import AttentionDropoutConfig, ContextsConfig, drawn, drawn_gates
from asrkit.training.step import LossOutput, Metric


@config
class LossConfig:
    """Weights and shape of the loss: CTC and the pruned transducer (arXiv 2206.13236)."""

    ctc_scale: NonNegative = 0.3
    """Weight of the CTC loss; 0 trains no CTC head."""
    transducer_scale: NonNegative = 1.0
    """Weight of the transducer loss; 0 trains no transducer."""
    simple_scale: NonNegative = 0.5
    """Weight of the transducer's simple loss, whose joiner only adds logits and which decides what the pruned loss
    looks at, once the warm-up is over."""
    warm_up_steps: Annotated[int, Field(ge=0)] = 1000
    """Steps in which the weight of the simple loss falls from 1 to `simple_scale` and that of the pruned loss rises
    from 0.1 to 1."""
    prune_range: Annotated[int, Field(ge=2)] = 5
    """Symbols that the pruned loss looks at in each frame. More costs memory."""
    lm_scale: Advanced[Annotated[float, Field(ge=0.0, le=1.0)]] = 0.25
    """Share of the predictor's own posteriors in the simple loss."""
    am_scale: Advanced[Annotated[float, Field(ge=0.0, le=1.0)]] = 0.0
    """Share of the encoder's own posteriors in the simple loss."""
    topology: Advanced[Topology] = "modified"
    """modified lets a frame emit one symbol at most, as the searches and runtimes decode; regular, the original, allows
    several, which decoding then loses."""
    backend: Backend = "auto"
    """What computes the pruned transducer loss: k2, torch, or auto, which is k2 where it is installed. Both give the
    same numbers."""


def check_losses(contexts: ContextsConfig, loss: LossConfig, others: bool = False) -> None:
    """Refuse settings that contradict each other.

    Args:
        others: the stage has a loss of its own, such as a teacher's.

    Raises:
        UserError: in-place distillation without a transducer, or nothing to train by.
    """
    if loss.transducer_scale == 0 and loss.ctc_scale == 0 and not others:
        raise UserError(
            "loss.transducer_scale and loss.ctc_scale are both 0, so there is nothing to learn; set one of them above 0"
        )
    if contexts.distillation_scale > 0 and loss.transducer_scale == 0:
        raise UserError(
            "contexts.distillation_scale compares transducers, but loss.transducer_scale is 0; set contexts.distillation_scale=0, or "
            "loss.transducer_scale above 0"
        )


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass: its losses, and the outputs that distillation uses.

    losses (B,): the weighted sum of all losses. metrics: see ``LossOutput``.
    encoder_out (B, T', D), encoder_out_lens (B,).
    symbol_lens (B,): the number of symbols, cut where the transducer has too few frames for them; ``possible`` (B,) says where it has enough.
    transducer: the parts of its loss; None if it is off. pruned (B,): the pruned transducer's share of ``losses``.
    joiner_in: the joiner's two projected inputs, (B, T', J) and (B, U + 1, J).
    """

    losses: Tensor
    metrics: dict[str, Metric]
    encoder_out: Tensor
    encoder_out_lens: Tensor
    symbol_lens: Tensor
    possible: Tensor
    transducer: TransducerLoss | None
    pruned: Tensor
    joiner_in: tuple[Tensor, Tensor] | None


def asr_loss(
    model: AsrModel,
    batch: Batch,
    step: int,
    settings: LossConfig,
    contexts: ContextsConfig | None = None,
    variant: str | None = None,
    attention_dropout: AttentionDropoutConfig | None = None,
) -> LossOutput:
    """CTC and pruned transducer loss of a batch (whose tensors are on the model's device).

    An utterance with fewer encoder frames than an alignment of its symbols needs (a frame for each; for CTC one more
    between equal neighbors) adds nothing to that loss and is counted in ``left_out``. Context and attention dropout are
    drawn by torch's generator on the CPU. With joint contexts, the metrics of full context have the plain names.
    """
    contexts = contexts or ContextsConfig()
    gates = drawn_gates(model, attention_dropout, batch)
    frames = float(batch.num_encoder_frames)
    choices = contexts.choices
    if contexts.sampling == "random":
        only = forward_losses(model, batch, step, settings, variant, drawn(choices), gates)
        return LossOutput(only.losses, frames, only.metrics)
    streaming_context = drawn([context for context in choices if context.streaming])
    with model.encoder.one_draw():
        full = forward_losses(model, batch, step, settings, variant, FULL, gates)
        streaming = forward_losses(model, batch, step, settings, variant, streaming_context, gates)
    losses = full.losses + streaming.losses
    metrics = dict(full.metrics)
    metrics |= {f"streaming_{name}": metric for name, metric in streaming.metrics.items() if name != "left_out"}
    if contexts.distillation_scale > 0:
        assert full.joiner_in is not None  # check_losses
        how = (contexts.distillation_classes, contexts.distillation_delay)
        divergence = in_place_divergence(model, batch, streaming, full.joiner_in, full.encoder_out_lens, *how)
        losses = losses + contexts.distillation_scale * divergence
        metrics["distillation"] = Metric(divergence.detach().sum(), frames)
    return LossOutput(losses, frames, metrics)


def forward_losses(
    model: AsrModel,
    batch: Batch,
    step: int,
    settings: LossConfig,
    variant: str | None,
    context: Context,
    gates: Tensor | None,
) -> ForwardPass:
    """One pass through the encoder in one context, and its losses.

    Args:
        gates: (layers, B or 1), factors of attention; None keeps all of it.
    """
    languages = model.language_ids(batch.languages)
    encoder_out, encoder_out_lens = model.encode(batch.features, batch.feature_lens, variant, context, gates, languages)
    losses = encoder_out.new_zeros(len(batch.cut_ids), dtype=torch.float32)
    metrics: dict[str, Metric] = {}
    frames = float(batch.num_encoder_frames)
    if settings.ctc_scale > 0:
        ctc, possible = _ctc_losses(model, batch, encoder_out, encoder_out_lens)
        losses = losses + settings.ctc_scale * ctc
        metrics |= {"ctc": Metric(ctc.detach().sum(), frames), "left_out": Metric((~possible).sum(), None)}
    possible = fits(settings.topology, encoder_out_lens, batch.symbol_lens)
    # Shortened, so that an utterance that does not fit has a finite loss, which is then masked.
    symbol_lens = torch.where(possible, batch.symbol_lens, torch.minimum(batch.symbol_lens, encoder_out_lens))
    transducer, joiner_in, weighted = None, None, torch.zeros_like(losses)
    if settings.transducer_scale > 0:
        predicted = model.predictor(model.predictor.contexts_of(batch.symbols))
        joiner_in = (model.joiner.project_encoder(encoder_out), model.joiner.project_predictor(predicted))
        transducer = transducer_loss(
            *joiner_in,
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
            least_range=range_needed(batch.encoder_frames, batch.symbol_counts, settings.topology),
        )
        simple, pruned = (
            torch.where(possible, part, torch.zeros_like(part)) for part in (transducer.simple, transducer.pruned)
        )
        simple_scale, pruned_scale = warm_up_scales(step, settings.warm_up_steps, settings.simple_scale)
        weighted = settings.transducer_scale * pruned_scale * pruned
        losses = losses + settings.transducer_scale * (simple_scale * simple + pruned_scale * pruned)
        metrics |= {
            "simple": Metric(simple.detach().sum(), frames),
            "pruned": Metric(pruned.detach().sum(), frames),
        }
        metrics.setdefault("left_out", Metric((~possible).sum(), None))
    return ForwardPass(
        losses,
        metrics,
        encoder_out,
        encoder_out_lens,
        symbol_lens,
        possible,
        transducer,
        weighted,
        joiner_in,
    )


def _ctc_losses(model: AsrModel, batch: Batch, encoder_out: Tensor, encoder_out_lens: Tensor) -> tuple[Tensor, Tensor]:
    """CTC loss of each utterance, (B,), 0 if it has no alignment; and whether it has one, (B,) bool."""
    repeats = (batch.symbols[:, 1:] == batch.symbols[:, :-1]) & (batch.symbols[:, 1:] != model.blank)
    possible = encoder_out_lens >= batch.symbol_lens + repeats.sum(1)
    counts = batch.encoder_frames, batch.symbol_counts
    losses = ctc_loss(model.ctc_head(encoder_out), batch.symbols, encoder_out_lens, batch.symbol_lens, counts)
    return losses, possible


def in_place_divergence(
    model: AsrModel,
    batch: Batch,
    student: ForwardPass,
    teacher: tuple[Tensor, Tensor],
    teacher_lens: Tensor,
    classes: Classes,
    delay: int = 0,
) -> Tensor:
    """Divergence of one pass from another one of the same model, (B,), on the student's pruned lattice; the teacher gets no gradient.

    Args:
        teacher: its ``joiner_in``; of ``teacher_lens`` (B,) encoder frames. delay: frames by which it is delayed.
    """
    if student.transducer is None:
        raise ValueError("distillation compares transducers, and this pass had none")
    with torch.no_grad():
        encoded, predicted = teacher
        encoded = delayed(encoded, teacher_lens, delay)
        expected = model.joiner(*gather_pruned(encoded, predicted, student.transducer.ranges))
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
