"""Batches of audio whose frames are partly hidden, to predict them from the rest (arXiv 2006.11477), as a pure function of
(seed, step, slice)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Literal

import numpy as np
import torch
from lhotse.cut import Cut
from pydantic import Field
from torch import Tensor

from asrkit.config import Advanced, Positive, config
from asrkit.data.augment import AugmentConfig
from asrkit.data.batch import Batch, evaluation_batches
from asrkit.data.bucketing import BucketPlan
from asrkit.data.cut_table import CutTable
from asrkit.data.spans import drawn_distractors, hidden_frames
from asrkit.data.train_batches import AudioBatches, AudioConfig
from asrkit.devices import send
from asrkit.frames import count_encoder_frames


@config
class PretrainDataConfig(AudioConfig):
    """Batches, and where their cuts come from. Nothing is varied by default, as in arXiv 2006.11477."""

    crop: Annotated[float, Field(gt=0)] = 15.6
    """Seconds of a longer cut that are used at a time, drawn at random: 15.6 s are the 250,000 samples of the paper's
    Base model. Less of it makes steps cheaper where attention is used."""
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(speed=0.0, volume_db=0.0, spec_augment=None))
    """How training data are varied."""


@config
class MaskConfig:
    """What is hidden of an utterance, and what a hidden frame has to be distinguished from (arXiv 2006.11477, sections 3.1 and 3.2)."""

    probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.13
    """Share of the encoder frames of 40 ms that begin a hidden span: as many a second as the paper's 0.065 of frames of
    20 ms. Spans overlap, so that half of the frames are hidden."""
    length: Annotated[int, Field(ge=2)] = 5
    """Encoder frames of 40 ms in a span: 200 ms, as the paper's 10 frames of 20 ms."""
    distractors: Positive = 100
    """Other frames of the same utterance that each hidden frame has to be distinguished from."""
    distractors_from: Advanced[Literal["hidden", "all"]] = "hidden"
    """Which frames distractors are drawn from: the hidden ones (the paper's), or all of the utterance."""


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """Utterances with hidden frames; M of each, whatever their lengths.

    hidden (B, M) int64: which encoder frames, ascending. distractors (B, M, K) int64: what each is distinguished from, by index among
    ``hidden``, or among all frames, as ``MaskConfig.distractors_from`` says.
    """

    hidden: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    distractors: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.int64))

    def to(self, device: torch.device) -> MaskedBatch:
        """The same batch with its tensors on ``device``."""
        moved = super().to(device)
        assert isinstance(moved, MaskedBatch)
        return replace(moved, hidden=send(self.hidden, device), distractors=send(self.distractors, device))


def masked(batch: Batch, settings: MaskConfig, random: np.random.Generator) -> MaskedBatch:
    """The batch with hidden frames and distractors."""
    lens = np.array([count_encoder_frames(length) for length in batch.feature_lens.tolist()])
    hidden = hidden_frames(lens, settings.probability, settings.length, random)
    own, sizes = hidden, lens
    if settings.distractors_from == "hidden":
        own = torch.arange(hidden.shape[1]).expand(hidden.shape)
        sizes = np.full(len(lens), hidden.shape[1])
    plain = {each.name: getattr(batch, each.name) for each in fields(Batch)}
    return MaskedBatch(**plain, hidden=hidden, distractors=drawn_distractors(own, sizes, settings.distractors, random))


class MaskedBatches(AudioBatches):
    """``batches[step * slices + slice]``: the perturbed, masked batch of a step and slice; texts are ignored."""

    def __init__(
        self,
        table: CutTable,
        plan: BucketPlan,
        slices: int,
        settings: PretrainDataConfig,
        mask: MaskConfig,
        noise: CutTable | None,
        seed: int,
    ) -> None:
        super().__init__(table, plan, slices, settings, noise, seed)
        self._mask, self._crop = mask, settings.crop

    def __getitem__(self, index: int) -> MaskedBatch:
        step, part = divmod(index, self.slices)
        return masked(super().__getitem__(index), self._mask, np.random.default_rng((self.seed, 4, step, part)))

    def _cut(self, index: int, random: np.random.Generator) -> Cut:
        cut = self.table[index]
        if cut.duration <= self._crop:
            return cut
        return cropped(cut, self._crop, float(random.uniform(0.0, cut.duration - self._crop)))


def cropped(cut: Cut, seconds: float, start: float) -> Cut:
    """``seconds`` of a longer cut from ``start`` on (rounded to a sample); a shorter one as it is."""
    if cut.duration <= seconds:
        return cut
    rate = cut.sampling_rate
    return cut.truncate(offset=int(start * rate) / rate, duration=seconds, preserve_id=True)


def held_out_batches(
    cuts: Sequence[Cut], data: PretrainDataConfig, mask: MaskConfig, seed: int
) -> Iterator[MaskedBatch]:
    """Every cut once, unperturbed, its beginning where it is longer than the crop; always the same frames are hidden."""
    beginnings = [cropped(cut, data.crop, 0.0) for cut in cuts]
    for number, batch in enumerate(evaluation_batches(beginnings, data.max_duration)):
        yield masked(batch, mask, np.random.default_rng((seed, 5, number)))
