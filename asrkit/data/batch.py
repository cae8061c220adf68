"""Utterances in one padded batch, and the plain batches of evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from lhotse.cut import Cut
from torch import Tensor

from asrkit.data.alignment import Segments
from asrkit.data.augment import (
    pad,
)
from asrkit.data.cut_audio import cut_features
from asrkit.data.manifests import language_of, text_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.devices import send
from asrkit.errors import clip
from asrkit.frames import count_encoder_frames


@dataclass(frozen=True)
class Batch:
    """Utterances padded to one length.

    features: (B, T, 80) float32, padded with log(1e-10); feature_lens: (B,) int64.
    symbols: (B, U) int64 padded with 0, symbol_lens: (B,); empty when no tokenizer was given.
    clean: (B, T, 80), the features without what changed their sound and not their timing; empty when not asked for.
    durations: seconds of audio, as perturbed. segments: what ``TrainBatches.annotate`` made, by name.
    encoder_frames, symbol_counts: of each utterance, plain numbers, so that nothing waits for the device to know them.
    left_out: the cuts that could not be read, which others stand in for, and why.
    """

    features: Tensor
    feature_lens: Tensor
    cut_ids: list[str]
    texts: list[str]
    languages: list[str]
    durations: list[float]
    symbols: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    symbol_lens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    segments: dict[str, Segments] = field(default_factory=dict)
    encoder_frames: list[int] = field(default_factory=list)
    symbol_counts: list[int] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Anew as long as they are known here, because a copy of the batch may have other lengths.
        if self.feature_lens.device.type == "cpu" or not self.encoder_frames:
            frames = [count_encoder_frames(length) for length in self.feature_lens.tolist()]
            object.__setattr__(self, "encoder_frames", frames)
        if self.symbol_lens.device.type == "cpu" or not self.symbol_counts:
            object.__setattr__(self, "symbol_counts", self.symbol_lens.tolist())

    @property
    def num_encoder_frames(self) -> int:
        """Of all utterances."""
        return sum(self.encoder_frames)

    def part(self, begin: int, end: int) -> Batch:
        """Some of the utterances, padded as before; without ``segments``."""
        rows = slice(begin, end)
        every = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in ("segments", "left_out")}
        return Batch(**every)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        names = ("features", "feature_lens", "symbols", "symbol_lens", "clean")
        moved: dict[str, Any] = {name: send(getattr(self, name), device) for name in names}
        return replace(self, **moved, segments={name: segments.to(device) for name, segments in self.segments.items()})


def evaluation_batches(cuts: Sequence[Cut], max_duration: float) -> Iterator[Batch]:
    """Every cut once, unperturbed, longest together first; batches of at most ``max_duration`` padded seconds."""
    return map(plain_batch, evaluation_parts(cuts, max_duration))


def evaluation_parts(cuts: Iterable[Cut], max_duration: float) -> list[list[Cut]]:
    """The cuts of each of the ``evaluation_batches``."""
    parts: list[list[Cut]] = []
    for cut in sorted(cuts, key=lambda cut: (-cut.duration, cut.id)):
        if not parts or parts[-1][0].duration * (len(parts[-1]) + 1) > max_duration:
            parts.append([])
        parts[-1].append(cut)
    return parts


def named(cuts: Sequence[Cut]) -> str:
    """The cuts of a batch, for a message."""
    return (
        f"cut {clip(cuts[0].id)} and {len(cuts) - 1} more of its length" if len(cuts) > 1 else f"cut {clip(cuts[0].id)}"
    )


def plain_batch(cuts: Sequence[Cut]) -> Batch:
    """The cuts, unperturbed, in one batch."""
    features, lens = pad([cut_features(cut) for cut in cuts])
    return Batch(
        features,
        lens,
        [cut.id for cut in cuts],
        [text_of(cut) for cut in cuts],
        [language_of(cut) for cut in cuts],
        [cut.duration for cut in cuts],
    )


def with_symbols(batch: Batch, tokenizer: Tokenizer) -> Batch:
    """The same batch with the tokens of its texts."""
    symbols, symbol_lens = _padded_symbols([tokenizer.encode(text) for text in batch.texts])
    return replace(batch, symbols=symbols, symbol_lens=symbol_lens)


def _padded_symbols(symbols: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(B, U) int64 padded with 0, and (B,)."""
    symbol_lens = torch.tensor([len(item) for item in symbols])
    padded = torch.zeros(len(symbols), int(symbol_lens.max()), dtype=torch.int64)
    for row, ids in enumerate(symbols):
        padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return padded, symbol_lens
