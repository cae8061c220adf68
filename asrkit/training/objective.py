"""The recogniser's own loss, shared by every stage that trains it: CTC plus the pruned transducer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from asrkit.config import config
from asrkit.data.batches import Batch
from asrkit.losses.transducer import Backend, Topology, transducer_loss, warm_up_scales
from asrkit.models.asr import AsrModel

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


@dataclass(frozen=True)
class LossOutput:
    """``loss`` (B,) differentiable, one value for each utterance; ``count`` encoder frames, by which the sum over
    the whole step is divided; ``parts`` sums to log, likewise divided."""

    loss: Tensor
    count: float
    parts: dict[str, Tensor]


def recogniser_loss(model: AsrModel, batch: Batch, step: int, settings: LossConfig) -> LossOutput:
    """CTC and pruned transducer loss of a batch (whose tensors are on the model's device).

    An utterance with fewer encoder frames than an alignment of its symbols needs (a frame for each; for CTC one more
    between equal neighbours) adds nothing to that loss and is counted in ``left_out``.
    """
    encoder_out, encoder_out_lens = model.encode(batch.features, batch.feature_lens)
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
    if settings.transducer_scale > 0:
        possible = encoder_out_lens >= batch.symbol_lens
        # Shortened, so that an impossible utterance has a finite loss to be masked.
        symbol_lens = torch.minimum(batch.symbol_lens, encoder_out_lens)
        predicted = model.predictor(model.predictor.contexts_of(batch.symbols))
        simple, pruned = transducer_loss(
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
        simple, pruned = (torch.where(possible, part, torch.zeros_like(part)) for part in (simple, pruned))
        simple_scale, pruned_scale = warm_up_scales(step, settings.warm_up_steps, settings.simple_scale)
        loss = loss + settings.transducer_scale * (simple_scale * simple + pruned_scale * pruned)
        parts |= {"simple": simple.detach().sum(), "pruned": pruned.detach().sum()}
        parts.setdefault("left_out", (~possible).sum())
    return LossOutput(loss, float(encoder_out_lens.sum()), parts)
