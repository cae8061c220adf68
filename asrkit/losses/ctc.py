"""CTC loss (Graves et al. 2006) from logits, without a log-softmax over the vocabulary in memory.

Shapes: B batch, T frames, U symbols, V vocabulary with blank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asrkit.losses.transducer import BLANK, full_precision, row_blocks


def ctc_loss(
    logits: Tensor,
    symbols: Tensor,
    lens: Tensor,
    symbol_lens: Tensor,
    counts: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Tensor:
    """Return the loss of each utterance, (B,) float32 (float64 for such logits); 0 for one without an alignment.

    logits (B, T, V); symbols int64 (B, U), padded with any valid id; lens and symbol_lens int64 (B,). torch's own loss is computed on
    the log-probabilities of an utterance's own symbols and of blank, which are all it depends on.

    Args:
        counts: lens and symbol_lens as plain numbers, which torch needs: without them, it waits for the device to read them.
    """
    counts = counts or (lens.tolist(), symbol_lens.tolist())
    return _CtcLoss.apply(logits, symbols, lens, *counts)  # type: ignore[no-any-return]


class _CtcLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, symbols: Tensor, lens: Tensor, frames: Sequence[int], symbol_counts: Sequence[int]
    ) -> Tensor:
        rows = logits.flatten(0, 1)
        norm = torch.cat([full_precision(rows[block]).logsumexp(1) for block in row_blocks(rows)]).view(
            logits.shape[:2]
        )
        columns = F.pad(symbols, (1, 0), value=BLANK)
        index = columns.unsqueeze(1).expand(-1, logits.shape[1], -1)
        log_probs = full_precision(logits.gather(2, index)) - norm.unsqueeze(2)
        # A symbol is known by its first column, as equal neighbors need a blank between them.
        positions = torch.arange(columns.shape[1], device=columns.device)
        same = columns.unsqueeze(2) == columns.unsqueeze(1)
        targets = torch.where(same, positions, columns.shape[1]).amin(2)[:, 1:]
        with torch.enable_grad():
            leaf = log_probs.requires_grad_()
            lengths: tuple[Any, Any] = frames, symbol_counts  # torch takes plain numbers, and does not say so
            losses = F.ctc_loss(leaf.transpose(0, 1), targets, *lengths, reduction="none", zero_infinity=True)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        # torch returns exp(log_prob) - posterior, which is right before a log-softmax only.
        inside = torch.arange(logits.shape[1], device=lens.device) < lens.unsqueeze(1)
        counted = inside & (losses.detach() > 0).unsqueeze(1)
        posteriors = (log_probs.detach().exp() - gradient).masked_fill(~counted.unsqueeze(2), 0.0)
        ctx.save_for_backward(logits, norm, index, posteriors, counted)
        return losses.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, norm, index, posteriors, counted = ctx.saved_tensors
        scale = (counted * grad.unsqueeze(1)).reshape(-1, 1).to(norm.dtype)
        rows, norm = logits.flatten(0, 1), norm.reshape(-1, 1)
        index, shares = index.flatten(0, 1), -posteriors.flatten(0, 1) * scale
        result = torch.empty_like(rows)
        own = result.dtype == norm.dtype  # then a block is computed where it belongs
        for block in row_blocks(rows):
            part = torch.sub(rows[block], norm[block], out=result[block] if own else None)
            part.exp_().mul_(scale[block]).scatter_add_(1, index[block], shares[block])
            if not own:
                result[block] = part
        return result.view(logits.shape), None, None, None, None
