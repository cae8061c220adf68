"""Pruned transducer (RNN-T) loss of Kuang et al. 2022 (arXiv 2206.13236): k2's functions, or torch alone.

Shapes: B batch, T frames, U symbols, S prune range, V vocabulary with blank 0, J joiner dimension.
A lattice node (t, u) stands for "at frame t, u symbols emitted". Two arcs leave it: the symbol arc to (t, u + 1)
with log-probability px, and the blank arc to (t + 1, u) with py; the last blank leaves the lattice at (T - 1, U).
A pruned lattice keeps, in frame t, only the S nodes from u = starts[t] on; the full one is S = U + 1, starts 0.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from asrkit.errors import UserError

Backend = Literal["auto", "k2", "torch"]
Joiner = Callable[[Tensor, Tensor], Tensor]

BLANK = 0
NEG_INF = float("-inf")


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
) -> tuple[Tensor, Tensor]:
    """Return the simple and the pruned loss of each utterance, both (B,), in float32 (float64 for such inputs).

    encoder (B, T, J) and predictor (B, U + 1, J) are already projected to the joiner; joiner maps two (B, T, S, J)
    to logits (B, T, S, V) and may run under autocast. encoder_logits (B, T, V) and predictor_logits (B, U + 1, V)
    feed the simple loss. symbols (B, U), padded with any valid id; encoder_out_lens and symbol_lens (B,).
    """
    simple, px_grad, py_grad = simple_loss(
        encoder_logits, predictor_logits, symbols, encoder_out_lens, symbol_lens, lm_scale, am_scale, backend
    )
    ranges = prune_ranges(px_grad, py_grad, encoder_out_lens, symbol_lens, prune_range, backend)
    logits = joiner(*gather_pruned(encoder, predictor, ranges))
    return simple, pruned_loss(logits, symbols, ranges, encoder_out_lens, symbol_lens, backend)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (B,) of the joiner that only adds logits, and its arc posteriors (B, U, T), (B, U + 1, T).

    encoder_logits (B, T, V), predictor_logits (B, U + 1, V). The log-probabilities are interpolated with those of
    the predictor alone (weight lm_scale) and of the encoder plus the predictor's average (weight am_scale).
    The posteriors, of the symbol and the blank arcs, carry no gradient.
    """
    with _no_autocast(encoder_logits):
        encoder_logits, predictor_logits = _full_precision(encoder_logits), _full_precision(predictor_logits)
        if _use_k2(backend, encoder_logits.shape[1], symbols.shape[1]):
            import k2

            loss, (px_grad, py_grad) = k2.rnnt_loss_smoothed(
                predictor_logits,
                encoder_logits,
                symbols,
                termination_symbol=BLANK,
                lm_only_scale=lm_scale,
                am_only_scale=am_scale,
                boundary=_k2_boundary(encoder_out_lens, symbol_lens),
                reduction="none",
                return_grad=True,
            )
            return loss, px_grad[:, :, :-1], py_grad
        px, py = _simple_log_probs(encoder_logits, predictor_logits, symbols, lm_scale, am_scale)
        log_prob, px_grad, py_grad = _lattice(px, py, None, encoder_out_lens, symbol_lens)
        return -log_prob, px_grad[:, :, :-1].transpose(1, 2).contiguous(), py_grad.transpose(1, 2).contiguous()


def prune_ranges(
    px_grad: Tensor,
    py_grad: Tensor,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    prune_range: int,
    backend: Backend = "auto",
) -> Tensor:
    """Return the symbol positions to keep in each frame, int64 (B, T, S), consecutive along S.

    px_grad (B, U, T) and py_grad (B, U + 1, T) are the arc posteriors of the simple loss. The first position
    maximises the retained probability (equation 8), then is made non-decreasing, to step by less than S, to start
    at 0 and to reach the last symbol in the last frame. S is prune_range, raised where (S - 1) T < U, at most U + 1.

    Raises: UserError when prune_range is below 2, with which no symbol could be emitted.
    """
    if prune_range < 2:
        raise UserError(f"prune_range {prune_range} keeps no symbol arc; give 2 or more (5 is usual)")
    num_symbols, num_frames = px_grad.shape[1:]
    needed = (symbol_lens + encoder_out_lens - 1).div(encoder_out_lens.clamp(min=1), rounding_mode="floor") + 1
    width = min(max(prune_range, int(needed.max())), num_symbols + 1)
    if _use_k2(backend, num_frames, num_symbols):
        import k2

        boundary = _k2_boundary(encoder_out_lens, symbol_lens)
        return k2.get_rnnt_prune_ranges(F.pad(px_grad, (0, 1)), py_grad, boundary, width)

    kept = py_grad.unfold(1, width, 1).transpose(2, 3).sum(2)  # blank arcs of positions p .. p + S - 1
    over_counted = F.pad(px_grad, (0, 0, 1, 0))[:, : kept.shape[1]]  # the symbol arc that enters p
    starts = (kept - over_counted).argmax(1)
    frames = torch.arange(num_frames, device=starts.device)
    last = (symbol_lens - width + 1).clamp(min=0).unsqueeze(1)
    starts = torch.where(frames < encoder_out_lens.unsqueeze(1) - 1, starts, last)
    starts = _running_min_from_the_right(starts)
    # A step below S is a non-increasing starts - (S - 1) t: the same routine on its negative; clamp starts at 0.
    slack = _running_min_from_the_right((width - 1) * frames - starts).clamp(min=0)
    starts = (width - 1) * frames - slack
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
) -> Tensor:
    """Return the loss (B,) over the alignments that stay in ranges (B, T, S), from the joiner's (B, T, S, V)."""
    with _no_autocast(logits):
        if _use_k2(backend, logits.shape[1], symbols.shape[1]):
            import k2

            return k2.rnnt_loss_pruned(
                _full_precision(logits),
                symbols,
                ranges,
                termination_symbol=BLANK,
                boundary=_k2_boundary(encoder_out_lens, symbol_lens),
                reduction="none",
            )
        batch, num_frames, width = ranges.shape
        padded = F.pad(symbols, (0, 1), value=BLANK).unsqueeze(1).expand(-1, num_frames, -1)
        px, py = _ArcLogProbs.apply(logits, padded.gather(2, ranges))
        return -_lattice(px, py, ranges[:, :, 0], encoder_out_lens, symbol_lens)[0]


def full_loss(
    logits: Tensor, symbols: Tensor, encoder_out_lens: Tensor, symbol_lens: Tensor, backend: Backend = "auto"
) -> Tensor:
    """Return the loss (B,) over all alignments, from the joiner's logits (B, T, U + 1, V) on the whole lattice."""
    with _no_autocast(logits):
        if _use_k2(backend, logits.shape[1], symbols.shape[1]):
            import k2

            return k2.rnnt_loss(
                _full_precision(logits),
                symbols,
                termination_symbol=BLANK,
                boundary=_k2_boundary(encoder_out_lens, symbol_lens),
                reduction="none",
            )
        targets = F.pad(symbols, (0, 1), value=BLANK).unsqueeze(1).expand(-1, logits.shape[1], -1)
        px, py = _ArcLogProbs.apply(logits, targets)
        return -_lattice(px, py, None, encoder_out_lens, symbol_lens)[0]


def _simple_log_probs(
    encoder_logits: Tensor, predictor_logits: Tensor, symbols: Tensor, lm_scale: float, am_scale: float
) -> tuple[Tensor, Tensor]:
    """Return px and py (B, T, U + 1) of the joiner that adds logits; the last symbol column is without meaning."""
    # Where k2 adds the smallest float: the bound leaves room for its reciprocal, so that no gradient overflows.
    floor = 1e6 * torch.finfo(encoder_logits.dtype).tiny
    targets = F.pad(symbols, (0, 1), value=BLANK)
    enc_max = encoder_logits.detach().amax(2, keepdim=True)
    pred_max = predictor_logits.detach().amax(2, keepdim=True)
    enc_probs = (encoder_logits - enc_max).exp()
    pred_probs = (predictor_logits - pred_max).exp()
    # the normaliser of all T x U sums of logits as a product of matrices: only (B, T, U + 1) in memory
    norm = (enc_probs @ pred_probs.transpose(1, 2)).clamp(min=floor).log() + enc_max + pred_max.transpose(1, 2)

    enc_symbol = encoder_logits.gather(2, targets.unsqueeze(1).expand(-1, encoder_logits.shape[1], -1))
    enc_blank = encoder_logits[:, :, BLANK].unsqueeze(2)
    pred_symbol = predictor_logits.gather(2, targets.unsqueeze(2)).transpose(1, 2)
    pred_blank = predictor_logits[:, :, BLANK].unsqueeze(1)
    px = enc_symbol + pred_symbol - norm
    py = enc_blank + pred_blank - norm
    if lm_scale == 0.0 and am_scale == 0.0:
        return px, py

    pred_sums = pred_probs.sum(2, keepdim=True)
    pred_norm = (pred_sums.log() + pred_max).transpose(1, 2)
    both_scale = 1.0 - lm_scale - am_scale
    px = both_scale * px + lm_scale * (pred_symbol - pred_norm)
    py = both_scale * py + lm_scale * (pred_blank - pred_norm)
    if am_scale == 0.0:
        return px, py

    # k2 averages over the whole batch, padding included; the paper over each utterance. Same numbers as k2 here.
    unigram = (pred_probs / pred_sums).mean((0, 1)).clamp(min=floor)
    enc_norm = (enc_probs @ unigram).log().unsqueeze(2) + enc_max
    log_unigram = unigram.log()
    px = px + am_scale * (enc_symbol + log_unigram[targets].unsqueeze(1) - enc_norm)
    py = py + am_scale * (enc_blank + log_unigram[BLANK] - enc_norm)
    return px, py


class _ArcLogProbs(torch.autograd.Function):
    """Log-probabilities of a target and of blank, without keeping or differentiating a whole log-softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """logits (B, T, S, V), targets (B, T, S) -> two (B, T, S), in float32 or float64."""
        values = _full_precision(logits)
        norm = values.logsumexp(3)
        ctx.save_for_backward(logits, targets, norm)
        px = values.gather(3, targets.unsqueeze(3)).squeeze(3) - norm
        return px, values[..., BLANK] - norm

    @staticmethod
    def backward(ctx: Any, px_grad: Tensor, py_grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, targets, norm = ctx.saved_tensors
        grad = (_full_precision(logits) - norm.unsqueeze(3)).exp_().mul_(-(px_grad + py_grad).unsqueeze(3))
        grad.scatter_add_(3, targets.unsqueeze(3), px_grad.unsqueeze(3))
        grad[..., BLANK] += py_grad
        return grad.to(logits.dtype), None


def _lattice(
    px: Tensor, py: Tensor, starts: Tensor | None, encoder_out_lens: Tensor, symbol_lens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probability (B,) of all paths, differentiable, and the posteriors of px and py (B, T, S).

    starts (B, T) is the first symbol position of each frame, non-decreasing; None for a full lattice.
    """
    if starts is None:
        starts = symbol_lens.new_zeros(px.shape[:2])
    return _LatticeFunction.apply(px, py, starts, encoder_out_lens, symbol_lens)


class _LatticeFunction(torch.autograd.Function):
    """Sum over all paths, whose gradient, the arc posteriors, is found with it."""

    @staticmethod
    def forward(ctx: Any, px: Tensor, py: Tensor, *lattice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_prob, px_post, py_post = _forward_backward(px, py, *lattice)
        ctx.save_for_backward(px_post, py_post)
        ctx.mark_non_differentiable(px_post, py_post)
        return log_prob, px_post, py_post

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        px_post, py_post = ctx.saved_tensors
        grad = grad.view(-1, 1, 1)
        return px_post * grad, py_post * grad, None, None, None


def _forward_backward(
    px: Tensor, py: Tensor, starts: Tensor, encoder_out_lens: Tensor, symbol_lens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk the lattice by anti-diagonals t + u = k, from its start and, in the same batch, from its end.

    At most S nodes of a diagonal are kept, of consecutive u, so node (t, u) lives in slot u mod S of step k:
    a blank arc keeps the slot, a symbol arc goes to the next one (circularly). T + U steps, each of 2 B x S nodes.
    """
    batch, num_frames, width = px.shape
    num_steps = num_frames + int(symbol_lens.max()) if batch else 0
    row = 2 * batch * width
    device = px.device

    # which arcs exist: inside the utterance, and leading to a node that is kept
    t = torch.arange(num_frames, device=device).view(1, -1, 1)
    u = starts.unsqueeze(2) + torch.arange(width, device=device)
    frames, last_u = encoder_out_lens.view(-1, 1, 1), symbol_lens.view(-1, 1, 1)
    next_starts = F.pad(starts[:, 1:], (0, 1)).unsqueeze(2)
    has_px = (t < frames) & (u < last_u)
    has_px[:, :, -1] = False
    has_py = (t < frames - 1) & (u <= last_u) & (u >= next_starts)

    # where the arcs' values go, seen from the start (by the node they lead to) and from the end (by their own);
    # arcs that do not exist go to step 0, which nothing reads
    own = torch.arange(batch, device=device).view(-1, 1, 1) * width
    slot, step = u.remainder(width), t + u
    node = step * row + own + slot
    node_from_end = (frames - 1 + last_u - step) * row + own + batch * width + (width - 1 - slot)
    px_from_start = (step + 1) * row + own + (u + 1).remainder(width)
    arcs = px.new_full((2, num_steps * row), NEG_INF)
    for arc, value, exists, target in ((0, px, has_px, px_from_start), (1, py, has_py, node + row)):
        value = value.masked_fill(~exists, NEG_INF)
        arcs[arc].scatter_(0, target.where(exists, target.new_zeros(())).flatten(), value.flatten())
        arcs[arc].scatter_(0, node_from_end.where(exists, target.new_zeros(())).flatten(), value.flatten())
    arcs = arcs.view(2, num_steps, 2 * batch, width)

    # slots 1 .. S hold the sums; slot 0 repeats slot S, so that "the slot before" is a view
    sums = px.new_full((num_steps, 2 * batch, width + 1), NEG_INF)
    sums[0, :batch, 1] = 0.0
    end_slot = width - symbol_lens.remainder(width)
    sums[0, batch:].scatter_(1, end_slot.unsqueeze(1), 0.0)
    sums[0, :, 0] = sums[0, :, -1]
    for k in range(1, num_steps):
        torch.add(arcs[0, k], sums[k - 1, :, :-1], out=arcs[0, k])
        torch.add(arcs[1, k], sums[k - 1, :, 1:], out=arcs[1, k])
        torch.logaddexp(arcs[0, k], arcs[1, k], out=sums[k, :, 1:])
        sums[k, :, 0] = sums[k, :, -1]

    alpha = sums[:, :, 1:].reshape(-1)
    last_step = (encoder_out_lens - 1 + symbol_lens).clamp(min=0)
    end_node = last_step * row + own.flatten() + symbol_lens.remainder(width)
    total = alpha[end_node].masked_fill(encoder_out_lens < 1, NEG_INF)
    scale = torch.where(total.isfinite(), total, torch.zeros_like(total)).view(-1, 1, 1)
    inside = (t < frames) & (u <= last_u)
    node_log_prob = alpha[torch.where(inside, node, 0)] - scale
    arcs = arcs.view(2, -1)
    from_end = torch.where(inside, node_from_end, 0)
    px_post = (node_log_prob + arcs[0][from_end]).clamp_(max=0.0).exp_().masked_fill_(~has_px, 0.0)
    py_post = (node_log_prob + arcs[1][from_end]).clamp_(max=0.0).exp_().masked_fill_(~has_py, 0.0)

    # the last blank arc leaves the lattice and is in every path
    b = torch.arange(batch, device=device)
    last_t = (encoder_out_lens - 1).clamp(min=0)
    last_s = symbol_lens - starts[b, last_t]
    py_post[b, last_t, last_s] = total.isfinite().to(px.dtype)
    return total + py[b, last_t, last_s], px_post, py_post


def _running_min_from_the_right(x: Tensor) -> Tensor:
    return x.flip(1).cummin(1).values.flip(1)


def _use_k2(backend: Backend, num_frames: int, num_symbols: int) -> bool:
    """True for k2; lattices that k2 refuses (no symbol at all, more symbols than frames) are for torch."""
    if backend == "torch" or not 1 <= num_symbols <= num_frames:
        return False
    return backend == "k2" or importlib.util.find_spec("k2") is not None


def _k2_boundary(encoder_out_lens: Tensor, symbol_lens: Tensor) -> Tensor:
    zeros = torch.zeros_like(symbol_lens)
    return torch.stack([zeros, zeros, symbol_lens, encoder_out_lens], dim=1).to(torch.int64)


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
