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


def ctc_log_probs_of(log_probs: Tensor, lens: Tensor, tokens: Tensor, token_lens: Tensor) -> Tensor:
    """The log-probability of each of N hypotheses of an utterance, (B, N) differentiable; -inf where it has no path.

    Args:
        log_probs: (B, T, V); lens: (B,). tokens: (B, N, U), padded with any valid id; token_lens: (B, N).
    """
    (batch, count, size), frames = tokens.shape, log_probs.shape[1]
    columns = F.pad(tokens, (1, 0), value=BLANK)
    # The hypotheses' own columns, side by side: no copy of all log-probabilities for each.
    index = columns.flatten(1).unsqueeze(1).expand(-1, frames, -1)
    own = log_probs.gather(2, index).view(batch, frames, count, size + 1).transpose(1, 2).flatten(0, 1)
    symbols, symbol_lens, lens = tokens.flatten(0, 1), token_lens.flatten(), lens.repeat_interleave(count)
    losses = _HypothesesLoss.apply(own, columns.flatten(0, 1), lens, symbol_lens)
    within = torch.arange(1, size, device=symbols.device) < symbol_lens.unsqueeze(1)
    repeats = ((symbols[:, 1:] == symbols[:, :-1]) & within).sum(1)
    return torch.where(lens >= symbol_lens + repeats, -losses, -torch.inf).view(token_lens.shape)


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
        losses, posteriors, counted = _alignments(log_probs, columns, lens, frames, symbol_counts)
        ctx.save_for_backward(logits, norm, index, posteriors, counted)
        return losses

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


class _HypothesesLoss(torch.autograd.Function):
    """The loss from the log-probabilities of the columns themselves, (B, T, U + 1)."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, columns: Tensor, lens: Tensor, symbol_lens: Tensor) -> Tensor:
        counts = lens.tolist(), symbol_lens.tolist()
        losses, posteriors, _ = _alignments(log_probs.detach(), columns, lens, *counts)
        ctx.save_for_backward(posteriors)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (posteriors,) = ctx.saved_tensors
        return -posteriors * grad.view(-1, 1, 1), None, None, None


def _alignments(
    log_probs: Tensor, columns: Tensor, lens: Tensor, frames: Sequence[int], symbol_counts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (B,), the posteriors of blank and symbols in each frame (B, T, U + 1), and the frames (B, T) that count.

    Args:
        log_probs: (B, T, U + 1), of what ``columns`` (B, U + 1) name: blank and the symbols.
    """
    if log_probs.shape[1] == 0:
        return (
            log_probs.new_zeros(len(lens)),
            torch.zeros_like(log_probs),
            log_probs.new_zeros(len(lens), 0, dtype=torch.bool),
        )
    # A symbol is known by its first column, as equal neighbors need a blank between them.
    positions = torch.arange(columns.shape[1], device=columns.device)
    same = columns.unsqueeze(2) == columns.unsqueeze(1)
    targets = torch.where(same, positions, columns.shape[1]).amin(2)[:, 1:]
    with torch.enable_grad():
        leaf = log_probs.requires_grad_()
        # torch takes plain numbers, and does not say so. Of 0 frames torch 1.13 returns what lies before its memory.
        lengths: tuple[Any, Any] = [max(1, count) for count in frames], symbol_counts
        losses = F.ctc_loss(leaf.transpose(0, 1), targets, *lengths, reduction="none", zero_infinity=True)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    # torch returns exp(log_prob) - posterior, which is right before a log-softmax only.
    inside = torch.arange(log_probs.shape[1], device=lens.device) < lens.unsqueeze(1)
    losses = losses.detach().masked_fill(lens <= 0, 0.0)
    counted = inside & (losses > 0).unsqueeze(1)
    posteriors = (log_probs.detach().exp() - gradient).masked_fill(~counted.unsqueeze(2), 0.0)
    return losses, posteriors, counted
