"""Training batches as a pure function of (seed, step, slice): perturbed features, symbols, texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from lhotse.cut import Cut
from pydantic import Field, model_validator
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
from asrkit.data.cut_audio import CutError, check_sound, cut_samples, stored_features
from asrkit.data.cut_table import CutTable
from asrkit.data.features import NUM_MEL_BINS, fbank
from asrkit.data.manifests import language_of, text_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.errors import UserError
from asrkit.frames import FRAME_SHIFT

MOST_IN_A_ROW = 20  # cuts that cannot be read, before training ends


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
    """How many times the main manifest is used in each pass over those of `also`."""
    noise: Path | None = None
    """Manifest of noise recordings for augment.noise_probability; null makes Gaussian noise of a random color."""
    check_first: Annotated[int, Field(ge=1)] = 5_000
    """Before training, read the audio of at most this many cuts of each manifest, spread evenly. The rest is checked while
    training, unless `asrkit data check` has read it before."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training data are varied."""

    @model_validator(mode="after")
    def _noise_is_mixed(self) -> AudioConfig:
        if self.noise is not None and self.augment.noise_probability == 0:
            raise ValueError(
                "noise: is mixed into no cut; set data.augment.noise_probability, such as 0.5, or leave it out"
            )
        return self

    @property
    def needs_text(self) -> bool:
        """Whether a cut without words is refused."""
        return False

    @property
    def longest(self) -> float:
        """How many times longer a perturbed cut can be; joins count with their average length."""
        return (1 + self.augment.join) / ((1 - self.augment.speed) * (1 - self.augment.tempo))


@config
class DataConfig(AudioConfig):
    """Batches of audio and text, and where their cuts come from."""

    bpe_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability that a merge of word pieces is left out, which varies how words are split (arXiv 1910.13267); for bpe tokenizers."""
    empty_texts: Literal["refuse", "silence"] = "refuse"
    """Cuts without words: refuse them, or train on them as sound in which nobody speaks."""

    @property
    def needs_text(self) -> bool:
        """Whether a cut without words is refused."""
        return self.empty_texts == "refuse"


class AudioBatches(torch.utils.data.Dataset[Batch]):
    """``batches[step * slices + slice]``: the perturbed batch of a step and slice, without symbols.

    With ``clean`` set, batches hold the clean features as well. With ``skip_bad`` set, a cut that cannot be read is replaced by one of
    like duration and named in ``left_out``; otherwise it ends the training.
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
        self.clean = self.skip_bad = False

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self.slices)
        planned = self.plan(step)
        augment = self.settings.augment
        features, clean, symbols, cuts, texts, warps, parts = [], [], [], [], [], [], []
        left_out: dict[str, str] = {}
        for position in range(part, len(planned), self.slices):
            # Seeded by the position in the whole batch, so that the number of processes does not change the data.
            random = np.random.default_rng((self.seed, 2, step, position))
            rows = [int(planned[position])]
            wanted = [self._cut(rows[0], random)]
            if random.uniform() < augment.join:
                rows.append(int(random.choice(planned)))
                wanted.append(self._cut(rows[1], random))
            pairs = [self._perturbed(row, cut, random, left_out) for row, cut in zip(rows, wanted, strict=True)]
            joined, made = [cut for cut, _ in pairs], [perturbed for _, perturbed in pairs]
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
            left_out=left_out,
        )

    def _perturbed(
        self, row: int, cut: Cut, random: np.random.Generator, left_out: dict[str, str]
    ) -> tuple[Cut, Perturbed]:
        """The cut of a row of the table, or one of like duration where it cannot be read, and its perturbed features.

        Raises:
            UserError: a cut that cannot be read and is not to be skipped; too many in a row.
        """
        instead = self.plan.alike(row)
        for _ in range(MOST_IN_A_ROW):
            try:
                whole = cut.duration == self.table.durations[row]  # a part of it may well be silent
                return cut, perturbed_features(cut, self.settings.augment, random, self.noise, self.clean, whole)
            except CutError as error:
                if not self.skip_bad:
                    raise UserError(
                        f"{error}; fix it, and run the same command again to go on from the last save, or add --set bad_cuts=skip; "
                        "`asrkit data check` lists all such cuts"
                    ) from error
                left_out[error.cut_id] = f"{error.kind}: {error.detail}"
                if (
                    error.cut_id == cut.id and (row := next(instead, -1)) >= 0
                ):  # else it is the noise, which is drawn again
                    cut = self._cut(row, random)
        raise UserError(
            f"{len(left_out)} cuts in a row cannot be read, the last is {list(left_out)[-1]}: {list(left_out.values())[-1]}; "
            "`asrkit data check` lists all such cuts"
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
        if settings.bpe_dropout > 0 and not tokenizer.merges:
            raise UserError(
                "data.bpe_dropout leaves out merges, which only bpe tokenizers have; set data.bpe_dropout=0"
            )
        self.tokenizer = tokenizer

    def _symbols(self, text: str, random: np.random.Generator) -> list[int]:
        if self.settings.bpe_dropout == 0:
            return self.tokenizer.encode(text)
        return self.tokenizer.encode_with_dropout(text, self.settings.bpe_dropout, random)


Perturbed = tuple[Tensor, Tensor, tuple[float, float]]  # what ``perturbed_features`` returns


def perturbed_features(
    cut: Cut,
    augment: AugmentConfig,
    random: np.random.Generator,
    noise: CutTable | None,
    clean: bool,
    refuse_silence: bool = False,
) -> Perturbed:
    """A cut's perturbed features (T, 80); if ``clean``, those whose timing alone was perturbed, else the same again; and
    the frames of silence that came before and after.

    Raises:
        CutError: unreadable audio, of the cut or the noise, or features of another dimension; silence, where that is refused.
    """
    added = (0.0, 0.0)
    if cut.has_features:
        features = untouched = stored_features(cut)
    else:
        samples = cut_samples(cut)
        if refuse_silence:
            check_sound(cut, samples)
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
