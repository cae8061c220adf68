"""Training batches as a pure function of (seed, step, slice): perturbed features, symbols, texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from lhotse.cut import Cut
from pydantic import Field
from torch import Tensor

from asrkit.config import config
from asrkit.data.alignment import PerturbedCut, Segments
from asrkit.data.augment import (
    AugmentConfig,
    channel_curves,
    colored_noise,
    pad,
    perturb_sound,
    perturb_time,
    spec_augment,
    stretch,
    vocal_tract_warp,
)
from asrkit.data.batch import Batch, _padded_symbols
from asrkit.data.bucketing import BucketPlan
from asrkit.data.cut_audio import cut_samples, stored_features
from asrkit.data.cut_table import CutTable
from asrkit.data.features import NUM_MEL_BINS, fbank
from asrkit.data.manifests import language_of, text_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.frames import FRAME_SHIFT


@config
class AudioConfig:
    """Batches, and where their cuts come from."""

    max_duration: Annotated[float, Field(gt=0)] = 120.0
    """Seconds of audio in a step, for each process. Lower it if memory runs out."""
    num_buckets: Annotated[int, Field(ge=1)] = 20
    """Number of duration buckets; a batch holds cuts of one. More buckets mean less padding."""
    num_workers: Annotated[int, Field(ge=0)] = 1
    """Processes that load data; 0 loads it in the training process."""
    also: tuple[Path, ...] = ()
    """Further manifests to train on, such as synthetic speech."""
    repeat: Annotated[int, Field(ge=1)] = 1
    """How often the main manifest comes in an epoch for each time those of `also` do."""
    noise: Path | None = None
    """Manifest of noise recordings for augment.noise_probability; null makes Gaussian noise of a random color."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training data are varied."""

    @property
    def needs_text(self) -> bool:
        """Whether a cut without words is refused."""
        return False

    @property
    def longest(self) -> float:
        """How many times longer a perturbed cut can be; joins count with their average length."""
        return (1 + self.augment.speed) * (1 + self.augment.tempo) * (1 + self.augment.join)


@config
class DataConfig(AudioConfig):
    """Batches of audio and text, and where their cuts come from."""

    bpe_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability that a merge of word pieces is left out, which varies how words are split (arXiv 1910.13267)."""
    empty_texts: Literal["refuse", "silence"] = "refuse"
    """Cuts without words: refuse them, or train on them as sound in which nobody speaks."""

    @property
    def needs_text(self) -> bool:
        """Whether a cut without words is refused."""
        return self.empty_texts == "refuse"


class AudioBatches(torch.utils.data.Dataset[Batch]):
    """``batches[step * slices + slice]``: the perturbed batch of a step and slice, without symbols.

    With ``clean`` set, batches hold the clean features as well.
    ``annotate``, where a stage sets it, makes ``segments`` of each utterance's perturbed cuts.
    """

    annotate: Callable[[Sequence[Sequence[PerturbedCut]]], dict[str, Segments]] | None = None

    def __init__(
        self,
        table: CutTable,
        plan: BucketPlan,
        slices: int,
        settings: AudioConfig,
        noise: CutTable | None,
        seed: int,
    ) -> None:
        self.table, self.plan, self.slices = table, plan, slices
        self.settings, self.noise, self.seed = settings, noise, seed
        self.clean = False

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self.slices)
        planned = self.plan(step)
        augment = self.settings.augment
        features, clean, symbols, cuts, texts, warps, parts = [], [], [], [], [], [], []
        for position in range(part, len(planned), self.slices):
            # Seeded by the position in the whole batch, so that the number of processes does not change the data.
            random = np.random.default_rng((self.seed, 2, step, position))
            joined = [self._cut(int(planned[position]), random)]
            if random.uniform() < augment.join:
                joined.append(self._cut(int(random.choice(planned)), random))
            made = [perturbed_features(cut, augment, random, self.noise, self.clean) for cut in joined]
            parts.append(
                [PerturbedCut(cut, len(frames), *added) for cut, (frames, _, added) in zip(joined, made, strict=True)]
            )
            item = torch.cat([frames for frames, *_ in made])
            clean.append(torch.cat([untouched for _, untouched, _ in made]))
            if augment.channel_db > 0:
                item = item + channel_curves(1, NUM_MEL_BINS, augment.channel_db, random)
            warps.append(1.0 + float(random.uniform(-augment.vocal_tract, augment.vocal_tract)))
            texts.append(" ".join(filter(None, map(text_of, joined))))
            symbols.append(self._symbols(texts[-1], random))
            features.append(item)
            cuts.append(joined[0])
        batch, lens = pad(features)
        if augment.vocal_tract > 0:
            batch = vocal_tract_warp(batch, torch.tensor(warps))
        if augment.spec_augment is not None:
            random = np.random.default_rng((self.seed, 3, step, part))
            batch = spec_augment(batch, lens, augment.spec_augment, random)
        durations = [len(item) * FRAME_SHIFT for item in features]
        return Batch(
            batch,
            lens,
            [cut.id for cut in cuts],
            texts,
            [language_of(cut) for cut in cuts],
            durations,
            *_padded_symbols(symbols),
            clean=pad(clean)[0] if self.clean else torch.zeros(0),
            segments=self.annotate(parts) if self.annotate is not None else {},
        )

    def _cut(self, index: int, random: np.random.Generator) -> Cut:
        """What is used of a cut of the table."""
        return self.table[index]

    def _symbols(self, text: str, random: np.random.Generator) -> list[int]:
        """The tokens of a text."""
        return []


class TrainBatches(AudioBatches):
    """The same with the symbols of the texts."""

    settings: DataConfig

    def __init__(
        self,
        table: CutTable,
        plan: BucketPlan,
        slices: int,
        settings: DataConfig,
        tokenizer: Tokenizer,
        noise: CutTable | None,
        seed: int,
    ) -> None:
        super().__init__(table, plan, slices, settings, noise, seed)
        self.tokenizer = tokenizer

    def _symbols(self, text: str, random: np.random.Generator) -> list[int]:
        return self.tokenizer.encode(text, self.settings.bpe_dropout, seed=int(random.integers(1 << 31)))


def perturbed_features(
    cut: Cut, augment: AugmentConfig, random: np.random.Generator, noise: CutTable | None, clean: bool
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """A cut's perturbed features (T, 80); if ``clean``, those whose timing alone was perturbed, else the same again; and
    the frames of silence that came before and after.

    Raises:
        UserError: unreadable audio, or features of another dimension.
    """
    added = (0.0, 0.0)
    if cut.has_features:
        features = untouched = stored_features(cut)
    else:
        samples = cut_samples(cut)
        noise_samples = None
        if random.uniform() < augment.noise_probability:
            noise_samples = (
                colored_noise(len(samples), random)
                if noise is None
                else cut_samples(noise[int(random.integers(len(noise)))])
            )
        timed, added = perturb_time(samples, augment, random)
        features = untouched = fbank(perturb_sound(timed, augment, random, noise_samples))
        if clean:
            untouched = fbank(timed)
    if augment.tempo > 0:
        factor = 1.0 + float(random.uniform(-augment.tempo, augment.tempo))
        features, untouched = stretch(features, factor), stretch(untouched, factor)
        added = (added[0] / factor, added[1] / factor)
    return features, untouched, added
