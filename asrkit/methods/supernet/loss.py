"""The loss of a supernet: each process draws one of its two members for each step.

Sources: self-pruning (arXiv 2207.11906); adaptive dropout and in-place distillation of omni-sparsity DNN (arXiv 2110.08352).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from asrkit.data.batch import Batch
from asrkit.methods.supernet.config import InPlaceConfig
from asrkit.methods.supernet.members import DENSE, SPARSE
from asrkit.models import AsrModel
from asrkit.nn.compression import CompressedLinear
from asrkit.nn.context import Context
from asrkit.nn.dropout import Dropout
from asrkit.training.asr_loss import LossConfig, forward_losses, in_place_divergence
from asrkit.training.contexts import drawn
from asrkit.training.step import LossOutput, Metric


def supernet_loss(
    model: AsrModel,
    batch: Batch,
    step: int,
    settings: LossConfig,
    contexts: Mapping[str, Context],
    *,
    draws: tuple[int, int] = (1, 1),
    dense_steps: int = 0,
    sparsity: float = 0.0,
    adaptive_dropout: bool = False,
    distillation: InPlaceConfig | None = None,
) -> LossOutput:
    """The recognizer's losses of a batch in one of the two members, which torch's generator draws for each process and step.

    Args:
        contexts: of DENSE and SPARSE.
        draws: how often dense and sparse are drawn, as a ratio. dense_steps: the first steps, which are dense without a draw.
        sparsity: of the sparse member at this step. adaptive_dropout: see ``sparse_dropout``.
    """
    member = DENSE if step < dense_steps else drawn([DENSE] * draws[0] + [SPARSE] * draws[1])
    with sparse_dropout(model, sparsity if adaptive_dropout and member == SPARSE else 0.0):
        own = forward_losses(model, batch, step, settings, member, contexts[member], None)
    losses, frames, metrics = own.losses, float(batch.num_encoder_frames), dict(own.metrics)
    for name in (DENSE, SPARSE):  # both in every process, so that they can be added up
        drawn_now = name == member
        metrics[name] = Metric(losses.detach().sum() if drawn_now else 0.0, frames if drawn_now else 0.0)
    metrics["sparsity"] = Metric(sparsity, 1.0)
    if distillation is not None and distillation.scale > 0:
        divergence = torch.zeros_like(losses)
        if member == SPARSE:  # after its own pass: autocast keeps the weights it cast in that, which have gradients
            assert own.joiner_in is not None  # refused before training
            with torch.no_grad():
                languages = model.language_ids(batch.languages)
                encoded, lens = model.encode(
                    batch.features, batch.feature_lens, DENSE, contexts[DENSE], languages=languages
                )
                teacher = (model.joiner.project_encoder(encoded), own.joiner_in[1].detach())
            divergence = in_place_divergence(model, batch, own, teacher, lens, distillation.classes, distillation.delay)
            losses = losses + distillation.scale * divergence
        metrics["distillation"] = Metric(divergence.detach().sum(), frames if member == SPARSE else 0.0)
    return LossOutput(losses, frames, metrics)


@contextmanager
def sparse_dropout(model: nn.Module, sparsity: float) -> Iterator[None]:
    """Within, dropout beside masked layers drops (1 - ``sparsity``) times as much: adaptive dropout (arXiv 2110.08352), for fewer
    weights need less of it."""
    beside = [] if sparsity == 0 else list(_beside_masks(model))
    for dropout in beside:
        dropout.scale(1 - sparsity)
    try:
        yield
    finally:
        for dropout in beside:
            dropout.scale(1.0)


def _beside_masks(model: nn.Module) -> Iterator[Dropout]:
    """The dropouts of the modules that have a masked layer."""
    for module in model.modules():
        parts = list(module.children())
        if any(isinstance(part, CompressedLinear) and part.how.mask is not None for part in parts):
            yield from (part for part in parts if isinstance(part, Dropout))
