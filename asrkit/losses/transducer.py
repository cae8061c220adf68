"""Pruned transducer (RNN-T) loss of Kuang et al. 2022 (arXiv 2206.13236): k2's functions, or torch alone.

Shapes: B batch, T frames, U symbols, S prune range, V vocabulary with blank 0, J joiner dimension.
A lattice node (t, u) stands for "at frame t, u symbols emitted". Two arcs leave it: the symbol arc
to (t, u + 1) with log-probability px, and the blank arc to (t + 1, u) with py; the last blank leaves the
lattice at (T - 1, U). In the modified topology the symbol arc leads to (t + 1, u + 1): one symbol a frame at most,
as greedy and modified beam search and the runtimes decode. A pruned lattice keeps, in frame t, only the S nodes from u = starts[t] on; the full
lattice is the same with S = U + 1 and starts 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from asrkit.errors import UserError
from asrkit.extras import available, require
from asrkit.losses.lattice import Topology, sum_lattice

Backend = Literal["auto", "k2", "torch"]
Joiner = Callable[[Tensor, Tensor], Tensor]

BLANK = 0


class TransducerLoss(NamedTuple):
    """The simple and the pruned loss of each utterance, both (B,), and the pruned lattice they come from."""

    simple: Tensor
    pruned: Tensor
    ranges: Tensor  # (B, T, S)
    logits: Tensor  # (B, T, S, V)


def transducer_loss(
    encoder: Tensor,
    predictor: Tensor,
    joiner: Joiner,
    encoder_logits: Tensor,
    predictor_logits: Tensor,
    symbols: Tensor,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    *,
    prune_range: int = 5,
    lm_scale: float = 0.25,
    am_scale: float = 0.0,
    backend: Backend = "auto",
    topology: Topology = "regular",
    least_range: int | None = None,
) -> TransducerLoss:
    """Return the simple and the pruned loss of each utterance, both (B,), float32 (float64 for such inputs).

    encoder (B, T, J) and predictor (B, U + 1, J) are already projected to the joiner; joiner maps two
    (B, T, S, J) to logits (B, T, S, V) and may run under autocast. encoder_logits (B, T, V) and
    predictor_logits (B, U + 1, V) are for the simple loss. symbols int64 (B, U), padded with any valid id;
    encoder_out_lens (at least 1) and symbol_lens int64 (B,). least_range: see ``prune_ranges``.
    """
    simple, px_grad, py_grad = simple_loss(
        encoder_logits, predictor_logits, symbols, encoder_out_lens, symbol_lens, lm_scale, am_scale, backend, topology
    )
    ranges = prune_ranges(px_grad, py_grad, encoder_out_lens, symbol_lens, prune_range, backend, topology, least_range)
    logits = joiner(*gather_pruned(encoder, predictor, ranges))
    pruned = pruned_loss(logits, symbols, ranges, encoder_out_lens, symbol_lens, backend, topology)
    return TransducerLoss(simple, pruned, ranges, logits)


def fits(topology: Topology, encoder_out_lens: Tensor, symbol_lens: Tensor) -> Tensor:
    """Whether each utterance has an alignment, (B,) bool, of its frames (B,) and symbols (B,).

    One frame holds any number of symbols in the regular topology, and at most one in the modified one.
    """
    if topology == "regular":
        return encoder_out_lens >= 1
    return (encoder_out_lens >= symbol_lens) & (encoder_out_lens >= 1)


def range_needed(frames: Sequence[int], symbol_counts: Sequence[int], topology: Topology) -> int:
    """The smallest prune range with which every utterance that has an alignment gets to its last symbol in its last frame.

    Args:
        frames, symbol_counts: of each utterance.
    """
    if topology == "modified":
        return 2  # a frame moves on by one symbol at most
    pairs = zip(frames, symbol_counts, strict=True)
    return 1 + max((math.ceil(symbols / count) for count, symbols in pairs if count), default=1)


def warm_up_scales(
    step: int,
    warm_up_steps: int,
    simple_scale: float = 0.5,
    first_simple_scale: float = 1.0,
    first_pruned_scale: float = 0.1,
) -> tuple[float, float]:
    """Return the weights of the simple and the pruned loss: linear to (simple_scale, 1) over the warm-up.

    The shape and the defaults are those of icefall's zipformer recipe.
    """
    done = min(1.0, step / warm_up_steps) if warm_up_steps > 0 else 1.0
    return (
        first_simple_scale + done * (simple_scale - first_simple_scale),
        first_pruned_scale + done * (1.0 - first_pruned_scale),
    )


def simple_loss(
    encoder_logits: Tensor,
    predictor_logits: Tensor,
    symbols: Tensor,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    lm_scale: float = 0.25,
    am_scale: float = 0.0,
    backend: Backend = "auto",
    topology: Topology = "regular",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (B,) of the joiner that adds logits, and arc posteriors (B, U, T) and (B, U + 1, T).

    encoder_logits (B, T, V), predictor_logits (B, U + 1, V). The log-probabilities are interpolated with
    those of the predictor alone (weight lm_scale) and of the encoder plus the predictor's average (weight
    am_scale). The posteriors, of the symbol and the blank arcs, carry no gradient.
    """
    with _no_autocast(encoder_logits):
        encoder_logits, predictor_logits = full_precision(encoder_logits), full_precision(predictor_logits)
        if _use_k2(backend, encoder_logits.shape[1], symbols.shape[1]):
            k2 = _k2()

            loss, (px_grad, py_grad) = k2.rnnt_loss_smoothed(
                predictor_logits,
                encoder_logits,
                symbols,
                lm_only_scale=lm_scale,
                am_only_scale=am_scale,
                return_grad=True,
                rnnt_type=topology,
                **_k2_options(encoder_out_lens, symbol_lens),
            )
            return loss, px_grad[:, :, :-1] if topology == "regular" else px_grad, py_grad
        px, py = _simple_log_probs(encoder_logits, predictor_logits, symbols, lm_scale, am_scale)
        log_prob, px_grad, py_grad = _LatticeSum.apply(
            px, py, symbols.new_zeros(1, 1), symbols.shape[1], encoder_out_lens, symbol_lens, topology
        )
        px_grad, py_grad = px_grad[:, :, :-1].transpose(1, 2), py_grad.transpose(1, 2)
        return -log_prob, px_grad.contiguous(), py_grad.contiguous()


def prune_ranges(
    px_grad: Tensor,
    py_grad: Tensor,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    prune_range: int,
    backend: Backend = "auto",
    topology: Topology = "regular",
    least_range: int | None = None,
) -> Tensor:
    """Return the symbol positions to keep in each frame, int64 (B, T, S), consecutive along S.

    px_grad (B, U, T) and py_grad (B, U + 1, T) are the arc posteriors of the simple loss. The first position
    maximizes the retained probability (equation 8), then is made non-decreasing, to step by less than S (by at
    most 1 in the modified topology), to start at 0 and to reach the last symbol in the last frame. S is
    prune_range, raised to least_range, with which every utterance gets there, and at most U + 1.

    Args:
        least_range: of ``range_needed``; None computes it, which waits for the device in the regular topology.

    Raises: UserError when prune_range is below 2, with which no symbol could be emitted.
    """
    if prune_range < 2:
        raise UserError(f"prune_range {prune_range} keeps no symbol arc; give 2 or more (5 is usual)")
    num_symbols, num_frames = px_grad.shape[1:]
    if least_range is None:
        read = topology == "regular"  # the other does not look at them
        frames_of, symbols_of = (lens.tolist() if read else [] for lens in (encoder_out_lens, symbol_lens))
        least_range = range_needed(frames_of, symbols_of, topology)
    width = min(max(prune_range, least_range), num_symbols + 1)
    longest_step = width - 1 if topology == "regular" else 1
    if _use_k2(backend, num_frames, num_symbols):
        k2 = _k2()
        boundary = _k2_options(encoder_out_lens, symbol_lens)["boundary"]
        # k2 knows the topology by the symbol arcs' extra frame
        px_grad = F.pad(px_grad, (0, 1)) if topology == "regular" else px_grad
        return k2.get_rnnt_prune_ranges(px_grad, py_grad, boundary, width)

    retained = py_grad.unfold(1, width, 1).transpose(2, 3).sum(2)  # blank arcs of positions p .. p + S - 1
    over_counted = F.pad(px_grad, (0, 0, 1, 0))[:, : retained.shape[1]]  # the symbol arc that enters p
    starts = (retained - over_counted).argmax(1)
    frames = torch.arange(num_frames, device=starts.device)
    last = (symbol_lens - width + 1).clamp(min=0).unsqueeze(1)
    starts = torch.where(frames < encoder_out_lens.unsqueeze(1) - 1, starts, last)
    starts = _running_min_from_the_right(starts)
    # steps of at most L: starts - L t never grows, so the same on its negative; the clamp begins at 0
    slack = _running_min_from_the_right(longest_step * frames - starts).clamp(min=0)
    starts = longest_step * frames - slack
    return starts.unsqueeze(2) + torch.arange(width, device=starts.device)


def gather_pruned(encoder: Tensor, predictor: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Return encoder (B, T, J) and predictor (B, U + 1, J) at the kept positions, both (B, T, S, J)."""
    batch, num_positions, _ = predictor.shape
    rows = ranges + num_positions * torch.arange(batch, device=ranges.device).view(-1, 1, 1)
    # embedding rather than gather: its backward adds whole rows
    dec = F.embedding(rows, predictor.reshape(batch * num_positions, -1))
    return encoder.unsqueeze(2).expand(-1, -1, ranges.shape[2], -1), dec


def pruned_loss(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    backend: Backend = "auto",
    topology: Topology = "regular",
) -> Tensor:
    """Return the loss (B,) over the alignments within ranges (B, T, S), from the joiner's (B, T, S, V)."""
    with _no_autocast(logits):
        if _use_k2(backend, logits.shape[1], symbols.shape[1]):
            k2 = _k2()

            options = _k2_options(encoder_out_lens, symbol_lens)
            return k2.rnnt_loss_pruned(full_precision(logits), symbols, ranges, rnnt_type=topology, **options)
        px, py = arc_log_probs(logits, symbols, ranges)
        starts = ranges[:, :, 0]
        return -_LatticeSum.apply(px, py, starts, symbols.shape[1], encoder_out_lens, symbol_lens, topology)[0]


def arc_log_probs(logits: Tensor, symbols: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the symbol and the blank arc at the kept nodes: logits (B, T, S, V) -> px, py (B, T, S).

    At the position after the last symbol px is that of no particular arc.
    """
    targets = F.pad(symbols, (0, 1), value=BLANK).unsqueeze(1).expand(-1, logits.shape[1], -1)
    return _ArcLogProbs.apply(logits, targets.gather(2, ranges))  # type: ignore[no-any-return]


def full_loss(
    logits: Tensor,
    symbols: Tensor,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    backend: Backend = "auto",
    topology: Topology = "regular",
) -> Tensor:
    """Return the loss (B,) over all alignments, from the joiner's logits (B, T, U + 1, V)."""
    with _no_autocast(logits):
        if _use_k2(backend, logits.shape[1], symbols.shape[1]):
            k2 = _k2()

            options = _k2_options(encoder_out_lens, symbol_lens)
            return k2.rnnt_loss(full_precision(logits), symbols, rnnt_type=topology, **options)
        targets = F.pad(symbols, (0, 1), value=BLANK).unsqueeze(1).expand(-1, logits.shape[1], -1)
        px, py = _ArcLogProbs.apply(logits, targets)
        return arc_loss(px, py, encoder_out_lens, symbol_lens, topology)


def arc_loss(
    px: Tensor, py: Tensor, encoder_out_lens: Tensor, symbol_lens: Tensor, topology: Topology = "regular"
) -> Tensor:
    """Return the loss (B,) over all alignments, from the log-probabilities of the arcs, both (B, T, U + 1)."""
    starts = symbol_lens.new_zeros(1, 1)
    return -_LatticeSum.apply(px, py, starts, px.shape[2] - 1, encoder_out_lens, symbol_lens, topology)[0]


def _simple_log_probs(
    encoder_logits: Tensor, predictor_logits: Tensor, symbols: Tensor, lm_scale: float, am_scale: float
) -> tuple[Tensor, Tensor]:
    """Return px and py (B, T, U + 1) of the joiner that adds logits; px of the last position is unused."""
    # k2 adds the smallest float; a bound with room for its reciprocal keeps the gradients finite as well
    floor = 1e6 * torch.finfo(encoder_logits.dtype).tiny
    targets = F.pad(symbols, (0, 1), value=BLANK)
    norm, enc_symbol = _AddedLogits.apply(encoder_logits, predictor_logits, targets, floor)
    enc_blank = enc_symbol[:, :, -1:]
    pred_symbol = predictor_logits.gather(2, targets.unsqueeze(2)).transpose(1, 2)
    pred_blank = predictor_logits[:, :, BLANK].unsqueeze(1)
    pred_norm = predictor_logits.logsumexp(2).unsqueeze(1)
    sum_scale = 1.0 - lm_scale - am_scale
    px = sum_scale * (enc_symbol - norm) + ((sum_scale + lm_scale) * pred_symbol - lm_scale * pred_norm)
    py = sum_scale * (enc_blank - norm) + ((sum_scale + lm_scale) * pred_blank - lm_scale * pred_norm)
    if am_scale == 0.0:
        return px, py

    # as in k2, the predictor's average is over the batch with its padding; in the paper over the utterance
    unigram = predictor_logits.softmax(2).mean((0, 1)).clamp(min=floor)
    most = encoder_logits.detach().amax(2, keepdim=True)
    enc_norm = ((encoder_logits - most).exp() @ unigram).log().unsqueeze(2) + most
    log_unigram = unigram.log()
    px = px + am_scale * (enc_symbol - enc_norm + log_unigram[targets].unsqueeze(1))
    py = py + am_scale * (enc_blank - enc_norm + log_unigram[BLANK])
    return px, py


class _AddedLogits(torch.autograd.Function):
    """The joiner that adds logits: its normalizers, and the encoder's logits of the targets."""

    @staticmethod
    def forward(ctx: Any, enc: Tensor, pred: Tensor, targets: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """enc (B, T, V), pred (B, U + 1, V), targets (B, U + 1) -> log-sum-exp over V of their sums, and enc at targets: (B, T, U + 1).

        The normalizer of all T x U sums is a product of matrices: only (B, T, U + 1) in memory.
        """
        enc_most, pred_most = enc.amax(2, keepdim=True), pred.amax(2, keepdim=True)
        enc_probs, pred_probs = (enc - enc_most).exp_(), (pred - pred_most).exp_()
        sums = enc_probs @ pred_probs.transpose(1, 2)
        index = targets.unsqueeze(1).expand(-1, enc.shape[1], -1)
        ctx.save_for_backward(enc_probs, pred_probs, sums, index)
        ctx.floor = floor
        norm = sums.clamp(min=floor).log_().add_(enc_most).add_(pred_most.transpose(1, 2))
        return norm, enc.gather(2, index)

    @staticmethod
    def backward(ctx: Any, norm_grad: Tensor, symbol_grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        enc_probs, pred_probs, sums, index = ctx.saved_tensors
        shares = (norm_grad / sums).masked_fill_(sums < ctx.floor, 0.0)
        enc_grad = (shares @ pred_probs).mul_(enc_probs).scatter_add_(2, index, symbol_grad)
        return enc_grad, (shares.transpose(1, 2) @ enc_probs).mul_(pred_probs), None, None


class _ArcLogProbs(torch.autograd.Function):
    """Log-probabilities of a target and of blank; block by block, in cache, without a whole log-softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """logits (B, T, S, V), targets (B, T, S) -> px and py (B, T, S), float32 or float64."""
        rows, index = logits.flatten(0, 2), targets.reshape(-1, 1)
        norm = torch.cat([full_precision(rows[block]).logsumexp(1) for block in row_blocks(rows)])
        ctx.save_for_backward(logits, targets, norm)
        px = full_precision(rows.gather(1, index)).squeeze(1) - norm
        py = full_precision(rows[:, BLANK]) - norm
        return px.view_as(targets), py.view_as(targets)

    @staticmethod
    def backward(ctx: Any, px_grad: Tensor, py_grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, targets, norm = ctx.saved_tensors
        rows, index = logits.flatten(0, 2), targets.reshape(-1, 1)
        px_grad, py_grad, norm = px_grad.reshape(-1, 1), py_grad.reshape(-1, 1), norm.unsqueeze(1)
        either = -(px_grad + py_grad)
        grad = torch.empty_like(rows)
        own = grad.dtype == norm.dtype  # then a block is computed where it belongs
        for block in row_blocks(rows):
            part = torch.sub(rows[block], norm[block], out=grad[block] if own else None)
            part.exp_().mul_(either[block])
            part.scatter_add_(1, index[block], px_grad[block])
            part[:, BLANK : BLANK + 1] += py_grad[block]
            if not own:
                grad[block] = part
        return grad.view(logits.shape), None


def row_blocks(rows: Tensor) -> list[slice]:
    """Cut rows into parts that stay in a CPU's cache (2 MB of float32), or that fill a GPU (256 MB)."""
    size = max(1, (2**19 if rows.device.type == "cpu" else 2**26) // rows.shape[1])
    return [slice(first, first + size) for first in range(0, max(1, len(rows)), size)]


class _LatticeSum(torch.autograd.Function):
    """Log-probability of all paths, and its gradients, the arc posteriors, found with it."""

    @staticmethod
    def forward(ctx: Any, px: Tensor, py: Tensor, *lattice: Any) -> tuple[Tensor, Tensor, Tensor]:
        log_prob, px_post, py_post = sum_lattice(px, py, *lattice)
        ctx.save_for_backward(px_post, py_post)
        ctx.mark_non_differentiable(px_post, py_post)
        return log_prob, px_post, py_post

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        px_post, py_post = ctx.saved_tensors
        grad = grad.view(-1, 1, 1)
        return px_post * grad, py_post * grad, None, None, None, None, None


def _running_min_from_the_right(x: Tensor) -> Tensor:
    return x.flip(1).cummin(1).values.flip(1)


def _use_k2(backend: Backend, num_frames: int, num_symbols: int) -> bool:
    """True for k2; batches that k2 refuses (no symbol at all, more symbols than frames) are for torch."""
    if backend == "k2":
        _k2()
    return backend != "torch" and 1 <= num_symbols <= num_frames and _k2_available()


def _k2() -> ModuleType:
    return require("k2", for_="loss.backend=k2")


@cache
def _k2_available() -> bool:
    return available("k2")


def _k2_options(encoder_out_lens: Tensor, symbol_lens: Tensor) -> dict[str, Any]:
    zeros = torch.zeros_like(symbol_lens)
    boundary = torch.stack([zeros, zeros, symbol_lens, encoder_out_lens], dim=1)
    return {"termination_symbol": BLANK, "boundary": boundary, "reduction": "none"}


def full_precision(x: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
