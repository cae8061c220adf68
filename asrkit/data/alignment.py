"""Alignments of cuts, as lhotse keeps them in supervisions, and the frames of a batch they label.

Shapes: B utterances, T' encoder frames of 40 ms, N segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut, MixedCut
from lhotse.cut.data import DataCut
from lhotse.supervision import AlignmentItem
from torch import Tensor

from asrkit.data.text.units import Inventory
from asrkit.devices import send
from asrkit.frames import FRAME_SHIFT, count_encoder_frames, encoder_center

SILENT, UNKNOWN = -1, -2  # frames of no segment: between units, and where there is no alignment or only padding


@dataclass(frozen=True)
class Segments:
    """The units of a batch's utterances and the frames of each (arXiv 2110.10429, figure 2).

    symbols (B, N) int64, padded with 0; symbol_lens (B,). frames (B, T') int64: the segment each frame belongs to, or
    SILENT, or UNKNOWN (padding, or a part of the utterance that is not aligned). A unit that comes twice is two segments, and one
    too short for a frame of its own is still a segment.
    """

    symbols: Tensor
    symbol_lens: Tensor
    frames: Tensor

    def to(self, device: torch.device) -> Segments:
        """The same on ``device``."""
        return replace(self, **{name: send(tensor, device) for name, tensor in vars(self).items()})


def items_of(cut: Cut, unit: str) -> list[AlignmentItem] | None:
    """The alignment of a cut in a unit, in order of time, counted from the beginning of the cut; None where a supervision has
    none.

    A manifest counts an alignment's times from the beginning of the recording, as lhotse does.
    """
    tracks = [(0.0, cut)]
    if isinstance(cut, MixedCut):
        tracks = [(track.offset, track.cut) for track in cut.tracks if isinstance(track.cut, DataCut)]
    items: list[AlignmentItem] = []
    for offset, part in sorted(tracks, key=lambda track: track[0]):
        for supervision in sorted(part.supervisions, key=lambda s: s.start):
            of_supervision = (supervision.alignment or {}).get(unit)
            if not of_supervision:
                return None
            items += [item.with_offset(offset - part.start) for item in of_supervision]
    return items


def symbols_of(cut: Cut, unit: str) -> list[str] | None:
    """The units of a cut's alignment, in order; None where it has none."""
    items = items_of(cut, unit)
    return None if items is None else [item.symbol for item in items]


class PerturbedCut(NamedTuple):
    """A cut in a batch: how many feature frames perturbation made of it, the silence it added ``before`` and ``after``
    included."""

    cut: Cut
    num_frames: int
    before: float = 0.0
    after: float = 0.0


@dataclass(frozen=True)
class Annotator:
    """Makes the segments of a batch from the alignments of its cuts, one set for each name in ``inventories``.

    inventories: alignments are looked up by the inventory's unit.
    repeats: keep, every item is a segment (our choice); merge, neighbors of the same unit with no silent frame between them are
        one, as when the paper removes repeated frame labels.
    fill: silence belongs to the segment before it.
    """

    inventories: Mapping[str, Inventory]
    repeats: str = "keep"
    fill: bool = False

    def __call__(self, utterances: Sequence[Sequence[PerturbedCut]]) -> dict[str, Segments]:
        """Segments of utterances, each of one or several cuts."""
        return {name: self._segments(inventory, utterances) for name, inventory in self.inventories.items()}

    def _segments(self, inventory: Inventory, utterances: Sequence[Sequence[PerturbedCut]]) -> Segments:
        labeled = [self._label(inventory, parts) for parts in utterances]
        num_segments = max(1, *(len(ids) for ids, _ in labeled))
        symbols = torch.zeros(len(labeled), num_segments, dtype=torch.int64)
        frames = torch.full((len(labeled), max(len(row) for _, row in labeled)), UNKNOWN)
        for number, (ids, row) in enumerate(labeled):
            symbols[number, : len(ids)] = torch.from_numpy(ids)
            frames[number, : len(row)] = torch.from_numpy(row)
        return Segments(symbols, torch.tensor([len(ids) for ids, _ in labeled]), frames)

    def _label(self, inventory: Inventory, parts: Sequence[PerturbedCut]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the segments, and the segment of each encoder frame."""
        num_frames = count_encoder_frames(sum(part.num_frames for part in parts))
        centers = encoder_center(np.arange(num_frames))
        frames = np.full(num_frames, UNKNOWN, dtype=np.int64)
        ids: list[int] = []
        paused: list[int] = []  # segments that a silent frame follows; -1 is before the first
        offset = 0.0
        for cut, length, before, after in parts:
            seconds = length * FRAME_SHIFT
            inside = (centers >= offset) & (centers < offset + seconds)
            items = items_of(cut, inventory.unit)
            if items is not None:
                # Speed and tempo stretch the whole recording alike; silence comes on top.
                spoken = (length - before - after) * FRAME_SHIFT
                own = (centers[inside] - offset - before * FRAME_SHIFT) * (cut.duration / spoken)
                starts = np.array([item.start for item in items])
                index = np.searchsorted(starts, own, side="right") - 1
                covered = (index >= 0) & (own < np.array([item.end for item in items])[index])
                if self.fill:
                    covered |= index >= 0
                frames[inside] = np.where(covered, index + len(ids), SILENT)
                paused += (index[~covered] + len(ids)).tolist()
                ids += inventory.ids([item.symbol for item in items])
            offset += seconds
        numbers = np.array(ids, dtype=np.int64)
        if self.repeats == "merge" and len(numbers):
            new = np.concatenate([[True], numbers[1:] != numbers[:-1]])
            new |= np.isin(np.arange(len(numbers)) - 1, paused)
            frames = np.where(frames >= 0, (np.cumsum(new) - 1)[np.maximum(frames, 0)], frames)
            numbers = numbers[new]
        return numbers, frames
