"""Lattices of CTC outputs by k2: the likely paths through a graph, with scores that may be renewed.

A lattice is searched with one model's outputs and may be scored with others.

Shapes: B utterances, T frames, V tokens, A arcs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor


class Beams(Protocol):
    """How far a lattice is pruned; see the settings of the same names."""

    @property
    def search_beam(self) -> float: ...
    @property
    def output_beam(self) -> float: ...
    @property
    def min_active(self) -> int: ...
    @property
    def max_active(self) -> int: ...


@dataclass(frozen=True)
class Lattice:
    """Paths of frames of B utterances, as arcs; k2 sums over the paths.

    fsas: k2's FsaVec of B lattices. rows, frames, labels: (A,) int64, the utterance, frame and token of each arc; arcs into the
        final state have the label -1. graph: (A,), the part of an arc's score that comes from the graph.
    """

    fsas: Any
    rows: Tensor
    frames: Tensor
    labels: Tensor
    graph: Tensor

    def scored(self, outputs: Tensor, kappa: float, bonus: Tensor | None = None) -> Any:
        """The lattices with the scores kappa * outputs (B, T, V) + graph + ``bonus`` (A,), differentiable."""
        acoustic = outputs[self.rows, self.frames, self.labels.clamp(min=0)]
        scores = self.graph + kappa * torch.where(self.labels >= 0, acoustic, 0.0)
        fsas = self.fsas.clone()
        fsas.scores = scores if bonus is None else scores + bonus
        return fsas

    def posteriors(self, scored: Any, tokens: Tensor) -> Tensor:
        """The probability that a path of the lattices has the token of ``tokens`` (B, T) in a frame, (B, T) float64, by what ``scored``
        returned: a frame's add up to 1 over all tokens, and to 0 beyond the end of an utterance or where it has no path."""
        of_arcs = scored.get_arc_post(use_double_scores=True, log_semiring=True).exp()
        these = (self.labels >= 0) & (self.labels == tokens[self.rows, self.frames])
        found = of_arcs.new_zeros(tokens.shape)
        return found.index_put_((self.rows[these], self.frames[these]), of_arcs[these], accumulate=True)


def graph_lattice(k2: ModuleType, graph: Any, outputs: Tensor, lens: Tensor, kappa: float, how: Beams) -> Lattice:
    """The likely paths of utterances through ``graph``, an acceptor of frames with the
    attribute ``lm``: outputs (B, T, V) log-probabilities, lens (B,) at least 1.
    The lattice of an utterance without any has no arcs."""
    order = lens.argsort(descending=True, stable=True)
    dense = dense_frames(k2, kappa * outputs.detach(), lens, order)
    fsas = k2.intersect_dense_pruned(
        graph, dense, how.search_beam, how.output_beam, how.min_active, how.max_active, frame_idx_name="frame"
    )
    return lattice_of(k2, fsas, order, fsas.lm)


def dense_frames(k2: ModuleType, outputs: Tensor, lens: Tensor, order: Tensor) -> Any:
    """Frames as k2 takes them, the longest utterance first."""
    segments = torch.stack([order, torch.zeros_like(order), lens[order]], dim=1)
    return k2.DenseFsaVec(outputs.float(), segments.to(torch.int32).cpu())


def lattice_of(k2: ModuleType, fsas: Any, order: Tensor, graph: Tensor) -> Lattice:
    """What k2 made of utterances in ``order``, in their own order again; ``graph``: (A,), see ``Lattice``."""
    back = order.argsort()
    fsas.graph_scores = graph.detach()
    fsas = k2.index_fsa(fsas, back.to(torch.int32))
    shape = fsas.arcs.shape()
    rows = shape.row_ids(1).long()[shape.row_ids(2).long()]
    labels = fsas.labels.long()
    frames = torch.where(labels >= 0, fsas.frame.long(), 0)  # the last arcs lie beyond the last frame
    return Lattice(fsas, rows, frames, labels, fsas.graph_scores)
