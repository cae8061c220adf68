"""What one transducer teaches another on a common lattice, node by node, and through CTC and the encoder.

Shapes: B batch, T frames, U symbols, S prune range, V vocabulary with blank 0, C classes (3 or V), J joiner dimension,
D encoder dim. Node (t, u): at frame t, u symbols emitted. A full lattice is a pruned one with S = U + 1 that starts at 0.
Source: Panchapagesan et al. 2020 (arXiv 2011.06110), equations 3 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from asrkit.losses.transducer import BLANK, Joiner, row_blocks

Classes = Literal["three", "all"]
Direction = Literal["forward", "reverse"]
LastRow = Literal["two", "drop"]
Distance = Literal["mse", "l2", "l1", "cosine"]
_SMALLEST = 1e-7  # probability of a class that is not there, or is lost in rounding


def node_divergence(
    student: Tensor,
    teacher: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    classes: Classes = "three",
) -> Tensor:
    """Sum over an utterance's kept nodes of KL(teacher || student), (B,), float32 (float64 for such inputs).

    Both logits are (B, T, S, V), at the nodes of the same ``ranges`` (B, T, S); symbols (B, U). The teacher gets no
    gradient. ``three``: of each node the next symbol, the blank and all the rest are compared (equation 7); ``all``: the
    whole vocabulary (equation 3). Nodes beyond the utterance's frames or symbols count nothing; after the last symbol
    only the blank and the rest are compared.
    """
    student_log_probs, teacher_log_probs = (
        node_log_probs(logits, symbols, ranges, symbol_lens, classes) for logits in (student, teacher.detach())
    )
    return divergence(student_log_probs, teacher_log_probs, counted_nodes(ranges, encoder_out_lens, symbol_lens))


def node_log_probs(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    symbol_lens: Tensor,
    classes: Classes = "three",
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities (B, T, S, C) of the classes at each node, of joiner logits (B, T, S, V) over ``temperature``."""
    if temperature != 1.0:
        logits = logits / temperature
    if classes == "all":
        return _precise(logits).log_softmax(dim=-1)
    last = ranges >= symbol_lens.view(-1, 1, 1)
    targets = F.pad(symbols, (0, 1), value=BLANK).unsqueeze(1).expand(-1, logits.shape[1], -1).gather(2, ranges)
    symbol, blank, rest = _ThreeLogProbs.apply(logits, targets.masked_fill(last, BLANK))
    return torch.stack([symbol.masked_fill(last, math.log(_SMALLEST)), blank, rest], dim=-1)


def three_classes(symbol: Tensor, blank: Tensor, ranges: Tensor, symbol_lens: Tensor) -> Tensor:
    """Log-probabilities (B, T, S, 3) of next symbol, blank and rest, where only those of the two arcs, (B, T, S) each, are known.

    After the last symbol there is no next one, and the first class is the same smallest number for every model. The rest is what
    the two leave of 1, and at least 1e-7: below that it is their rounding. ``node_log_probs`` has no such bound.
    """
    last = ranges >= symbol_lens.view(-1, 1, 1)
    known = torch.where(last, blank, torch.logaddexp(symbol, blank))
    rest = (-torch.expm1(known)).clamp(min=_SMALLEST).log()
    return torch.stack([symbol.masked_fill(last, math.log(_SMALLEST)), blank, rest], dim=-1)


class _ThreeLogProbs(torch.autograd.Function):
    """Log-probabilities of a target, of blank, and of all other classes together; block by block, as those of the loss.

    The rest is the logsumexp of the other logits, so it stays exact, and keeps its gradient, however small it is. Where the target
    is the blank, it is the rest beside the blank alone.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits (B, T, S, V), targets (B, T, S) -> three times (B, T, S), float32 or float64."""
        rows, index = logits.flatten(0, 2), targets.reshape(-1, 1)
        norms, others = [], []
        for block in row_blocks(rows):
            part = _precise(rows[block])
            norms.append(part.logsumexp(1))
            part = part.scatter(1, index[block], -torch.inf)
            part[:, BLANK] = -torch.inf
            others.append(part.logsumexp(1))
        norm, other = torch.cat(norms), torch.cat(others)
        ctx.save_for_backward(logits, targets, norm, other)
        symbol = _precise(rows.gather(1, index)).squeeze(1) - norm
        blank = _precise(rows[:, BLANK]) - norm
        return symbol.view_as(targets), blank.view_as(targets), (other - norm).view_as(targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Each class's gradient goes to its logits by their share of the class, and is taken from all by their share of 1."""
        logits, targets, norm, other = ctx.saved_tensors
        rows, index = logits.flatten(0, 2), targets.reshape(-1, 1)
        symbol_grad, blank_grad, rest_grad = (grad.reshape(-1, 1) for grad in grads)
        total, norm, other = symbol_grad + blank_grad + rest_grad, norm.unsqueeze(1), other.unsqueeze(1)
        grad = torch.empty_like(rows)
        for block in row_blocks(rows):
            logit = _precise(rows[block])
            part = (logit - other[block]).exp_().mul_(rest_grad[block])
            part.scatter_(1, index[block], 0.0)
            part[:, BLANK] = 0.0
            part -= (logit - norm[block]).exp_().mul_(total[block])
            part.scatter_add_(1, index[block], symbol_grad[block])
            part[:, BLANK : BLANK + 1] += blank_grad[block]
            grad[block] = part
        return grad.view(logits.shape), None


def counted_nodes(ranges: Tensor, encoder_out_lens: Tensor, symbol_lens: Tensor, last_row: LastRow = "two") -> Tensor:
    """Which nodes of ``ranges`` (B, T, S) are an utterance's own; ``drop`` leaves out those after the last symbol."""
    frames = torch.arange(ranges.shape[1], device=ranges.device).view(1, -1, 1)
    lens = symbol_lens.view(-1, 1, 1)
    row = ranges < lens if last_row == "drop" else ranges <= lens
    return (frames < encoder_out_lens.view(-1, 1, 1)) & row


def divergence(student: Tensor, teacher: Tensor, nodes: Tensor, direction: Direction = "forward") -> Tensor:
    """Sum over the ``nodes`` (B, T, S) of KL(teacher || student), (B,), of log-probabilities (B, T, S, C).

    ``reverse`` is KL(student || teacher): it seeks one of the teacher's answers where forward covers them all.
    """
    if direction == "reverse":
        student, teacher = teacher, student
    return (teacher.exp() * (teacher - student)).sum(dim=-1).masked_fill(~nodes, 0.0).sum(dim=(1, 2))


def full_lattice_divergence(
    encoder: Tensor,
    predictor: Tensor,
    joiner: Joiner,
    expected: Callable[[slice, Tensor], Tensor],
    symbols: Tensor,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    *,
    classes: Classes = "three",
    temperature: float = 1.0,
    direction: Direction = "forward",
    last_row: LastRow = "two",
    chunk: int = 8,
) -> Tensor:
    """The ``divergence`` (B,) over every node of the lattice, ``chunk`` frames at a time.

    Logits are made anew in the backward pass, so that memory holds those of one chunk, whatever the vocabulary.

    Args:
        encoder, predictor: of the student, (B, T, J) and (B, U + 1, J), already projected to the ``joiner``.
        expected: (frames, ranges (B, c, U + 1)) -> the teacher's ``node_log_probs`` (B, c, U + 1, C) of those frames.
    """
    rows = torch.arange(predictor.shape[1], device=encoder.device)

    def part(encoded: Tensor, predictor: Tensor, first: int) -> Tensor:
        size = encoded.shape[1]
        ranges = rows.expand(len(encoded), size, -1)
        logits = joiner(encoded.unsqueeze(2), predictor.unsqueeze(1))
        with torch.no_grad():
            teacher = expected(slice(first, first + size), ranges)
        with torch.autocast(logits.device.type, enabled=False):
            student = node_log_probs(logits, symbols, ranges, symbol_lens, classes, temperature)
            nodes = counted_nodes(ranges, encoder_out_lens - first, symbol_lens, last_row)
            return divergence(student, teacher, nodes, direction)

    parts = [
        checkpoint(
            part, encoder[:, first : first + chunk], predictor, first, use_reentrant=False, preserve_rng_state=False
        )
        for first in range(0, encoder.shape[1], chunk)
    ]
    return torch.stack(parts).sum(dim=0)


def frame_divergence(
    student: Tensor,
    teacher: Tensor,
    encoder_out_lens: Tensor,
    direction: Direction = "forward",
    temperature: float = 1.0,
) -> Tensor:
    """Sum over an utterance's frames of KL(teacher || student), (B,), of CTC log-probabilities (B, T, V).

    Both are those of the logits over ``temperature`` (log-probabilities are logits less a constant).
    """
    if temperature != 1.0:
        student, teacher = ((x / temperature).log_softmax(dim=-1) for x in (student, teacher))
    return divergence(student.unsqueeze(2), teacher.unsqueeze(2), _own_frames(student, encoder_out_lens), direction)


def encoder_distance(student: Tensor, teacher: Tensor, encoder_out_lens: Tensor, kind: Distance = "mse") -> Tensor:
    """Sum over an utterance's frames of how far (B, T, D) encoder frames are from the teacher's, (B,).

    mse: the mean of the squared differences; l2: their Euclidean length; l1: the mean of their sizes; cosine: one less the cosine.
    """
    student, teacher = _precise(student), _precise(teacher.detach())
    if kind == "cosine":
        far = 1 - torch.cosine_similarity(student, teacher, dim=-1)
    elif kind == "l1":
        far = (student - teacher).abs().mean(dim=-1)
    else:
        squared = (student - teacher).square()
        # The root's slope is infinite where the two are equal.
        far = squared.mean(dim=-1) if kind == "mse" else (squared.sum(dim=-1) + 1e-12).sqrt()
    return far.masked_fill(~_own_frames(student, encoder_out_lens).squeeze(2), 0.0).sum(dim=1)


def delayed(encoder_out: Tensor, encoder_out_lens: Tensor, delay: int) -> Tensor:
    """Encoder frames (B, T, D) moved ``delay`` frames later within each utterance; at its ends the nearest is repeated."""
    if delay == 0:
        return encoder_out
    frames = (torch.arange(encoder_out.shape[1], device=encoder_out.device) - delay).clamp(min=0)
    frames = torch.minimum(frames, encoder_out_lens.unsqueeze(1) - 1).clamp(min=0)
    return encoder_out.gather(1, frames.unsqueeze(2).expand(-1, -1, encoder_out.shape[2]))


def mean_log_probs(parts: list[Tensor]) -> Tensor:
    """The logarithm of the mean of several models' probabilities."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).logsumexp(dim=0) - math.log(len(parts))


def _own_frames(x: Tensor, encoder_out_lens: Tensor) -> Tensor:
    frames = torch.arange(x.shape[1], device=x.device)
    return (frames < encoder_out_lens.unsqueeze(1)).unsqueeze(2)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
