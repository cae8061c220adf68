"""Lattice criteria on the CTC head, by k2: the derivatives of MMI, boosted MMI, sMBR and MPE by the frames' outputs of now.

A lattice is searched with one model's outputs and scored with the current ones, so that it may be older than the weights.

Shapes: B utterances, T frames, V tokens, U symbols, A arcs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from asrkit.decoding.alignment import ctc_align
from asrkit.decoding.lattices import Lattice, dense_frames, lattice_of
from asrkit.extras import require
from asrkit.losses.sequence import mmi_derivative, overlap
from asrkit.methods.sequence.config import Criterion, LatticeConfig


def k2_for_lattices() -> ModuleType:
    """k2.

    Raises:
        UserError: it cannot be used; says how to get it.
    """
    return require("k2", for_="the lattice criteria mmi, bmmi, smbr and mpe")


def numerator_lattice(
    k2: ModuleType, symbols: Tensor, symbol_lens: Tensor, outputs: Tensor, lens: Tensor, kappa: float, beam: float
) -> Lattice:
    """The alignments of the reference, (B, U) with (B,) symbols."""
    order = lens.argsort(descending=True, stable=True)
    texts = [row[:length] for row, length in zip(symbols.tolist(), symbol_lens.tolist(), strict=True)]
    graph = k2.ctc_graph([texts[row] for row in order.tolist()], device=str(outputs.device))
    dense = dense_frames(k2, kappa * outputs.detach(), lens, order)
    fsas = k2.intersect_dense(graph, dense, beam, frame_idx_name="frame")
    return lattice_of(k2, fsas, order, torch.zeros_like(fsas.scores))


@dataclass(frozen=True)
class Outer:
    """What a lattice criterion says of a batch; nothing here has a gradient.

    objective: (B,), to be maximized; 0 for an utterance that does not count. derivative: (B, T, V) of it by the outputs.
    counts: (B,) bool, utterances with a path of the reference and one of the denominator. rejected: frames without a
    gradient because the reference has left the lattice. correct: frames whose likeliest token is the alignment's.
    arcs: of all lattices.
    """

    objective: Tensor
    derivative: Tensor
    counts: Tensor
    rejected: Tensor
    correct: Tensor
    arcs: int


def outer(
    criterion: Criterion,
    k2: ModuleType,
    lattice: Lattice,
    outputs: Tensor,
    lens: Tensor,
    symbols: Tensor,
    symbol_lens: Tensor,
    how: LatticeConfig,
    reference_scores: Tensor,
) -> Outer:
    """The objective of a lattice criterion and its derivative by the frames' outputs, with fixed lattices.

    mmi: the log posterior of the reference. bmmi: the same, with exp(-b Acc) on the denominator's arcs (Povey et al. 2008).
    smbr: the expected number of frames whose token is that of the reference's alignment. mpe: the expected token accuracy.

    Args:
        outputs: (B, T, V) log-probabilities; lens (B,). symbols (B, U), symbol_lens (B,): of the reference.
        reference_scores: (B,), the n-gram's log-probability of each reference.
    """
    outputs = outputs.detach()
    path, path_score = ctc_align(outputs, lens, symbols, symbol_lens)
    valid = torch.arange(outputs.shape[1], device=lens.device) < lens.unsqueeze(1)
    aligned = torch.where(path >= 0, symbols.gather(1, path.clamp(min=0)), 0)  # the token of each frame
    one_hot = torch.zeros_like(outputs).scatter_(2, aligned.unsqueeze(2), 1.0) * valid.unsqueeze(2)
    with torch.enable_grad():
        leaf = outputs.requires_grad_()
        bonus = None
        if criterion == "bmmi":
            bonus = -how.boost * frame_accuracy(lattice, aligned, how.blank)
        scored = lattice.scored(leaf, how.kappa, bonus)
        total = scored.get_tot_scores(use_double_scores=True, log_semiring=True)
        (occupied,) = torch.autograd.grad(total[total.isfinite()].sum(), leaf, retain_graph=True)
        counts = path_score.isfinite() & total.isfinite()
        reference = one_hot
        if criterion in ("mmi", "bmmi"):
            if how.numerator == "graph":
                beam = how.denominator.output_beam
                numerator = numerator_lattice(k2, symbols, symbol_lens, leaf, lens, how.kappa, beam)
                top = numerator.scored(leaf, how.kappa).get_tot_scores(use_double_scores=True, log_semiring=True)
                counts = counts & top.isfinite() & reference_scores.isfinite()
                (reference,) = torch.autograd.grad(top[top.isfinite()].sum(), leaf)
                reference = reference / how.kappa
            else:
                top = how.kappa * (one_hot * outputs).sum(dim=(1, 2)).double()
                counts = counts & reference_scores.isfinite()
            objective = top + reference_scores - total
            derivative = mmi_derivative(reference, occupied / how.kappa, how.kappa)
        else:
            accuracy = (
                frame_accuracy(lattice, aligned, how.blank)
                if criterion == "smbr"
                else token_accuracy(lattice, path, lens, symbols)
            )
            posterior = scored.get_arc_post(use_double_scores=True, log_semiring=True).exp()
            by_arc = posterior * accuracy
            objective = torch.zeros_like(total).index_add(0, lattice.rows, by_arc)
            (derivative,) = torch.autograd.grad(objective.sum(), leaf)
    kept = overlap(one_hot, occupied) if how.reject_frames else valid
    keep = (kept & valid & counts.unsqueeze(1)).unsqueeze(2)
    return Outer(
        torch.where(counts, objective.detach(), 0.0).to(outputs.dtype),
        torch.where(keep, derivative, 0.0),
        counts,
        (valid & counts.unsqueeze(1) & ~kept).sum(),
        ((outputs.detach().argmax(dim=2) == aligned) & valid).sum(),
        len(lattice.rows),
    )


def frame_accuracy(lattice: Lattice, aligned: Tensor, blank: float) -> Tensor:
    """1 for an arc with the token that its frame has in ``aligned`` (B, T), ``blank`` where both are blank, else 0: (A,)."""
    token = aligned[lattice.rows, lattice.frames]
    right = (token == lattice.labels) & (lattice.labels >= 0)
    return right * torch.where(token == 0, blank, 1.0)


def token_accuracy(lattice: Lattice, path: Tensor, lens: Tensor, symbols: Tensor) -> Tensor:
    """The arcs' shares (A,) in the token accuracy of paths.

    MPE counts for each token of a path -1 + 2 e if the reference has the same token there, where e is the share of that token's
    time that is overlapped (Povey and Woodland 2002). CTC tokens have no end, so a token's time lasts until the next one begins: a
    frame in which the last token begun is that of the reference brings 2 / (frames of the reference's token), and each begun
    token costs 1. A right path has as many as the reference has tokens; an inserted or left out token costs 1 or more. Their
    -1 + e for a different token is left out, because a sum over arcs would then make omissions free (our choice).

    An arc does not know where its token began, so a token that is held on could earn what a later equal one in the reference is worth. So a token
    of the reference that equals one of the two before it is worth 2 to a token that begins in its first two frames, where a token cannot begin
    twice, and nothing to others (our choice). From further away it does not pay: whoever holds on leaves out what is between.

    Args:
        path: (B, T) the index in ``symbols`` (B, U) of what each frame emits in the alignment, -1 for blank.
    """
    valid = torch.arange(path.shape[1], device=path.device) < lens.unsqueeze(1)
    current = path.cummax(dim=1).values.masked_fill(~valid, -1)  # (B, T), indices only grow
    sizes = torch.zeros(len(path), symbols.shape[1] + 1, device=path.device)
    sizes.scatter_add_(1, current + 1, torch.ones_like(current, dtype=sizes.dtype))
    expected = symbols.gather(1, current.clamp(min=0)).masked_fill(current < 0, -1)
    share = 2.0 / sizes.gather(1, current + 1).clamp(min=1)
    again = torch.zeros_like(symbols, dtype=torch.bool)
    for distance in (1, 2):
        again[:, distance:] |= symbols[:, distance:] == symbols[:, :-distance]
    again = again.gather(1, current.clamp(min=0)) & (current >= 0)
    first = F.pad(current[:, 1:] != current[:, :-1], (1, 0), value=True)
    early = first | F.pad(first[:, :-1], (1, 0))
    rows, frames, begins = lattice.rows, lattice.frames, lattice.fsas.begins
    same = (expected[rows, frames] == lattice.fsas.current) & (lattice.labels >= 0)
    begun = 2.0 * (early[rows, frames] & (begins == 1))
    return same * torch.where(again[rows, frames], begun, share[rows, frames]) - begins
