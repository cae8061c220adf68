"""Batches as a pure function of (seed, step, rank): no sampler state, so resuming costs nothing.

Cuts are kept as their JSON text in one buffer: a million cuts stay a few hundred megabytes, are shared by all
loader processes without copies, and any one is reached at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from pydantic import Field
from torch import Tensor

from asrkit.config import config
from asrkit.data.alignment import Heard, Segments
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
from asrkit.data.features import FRAME_SHIFT, LOG_EPS, NUM_MEL_BINS, fbank, resample
from asrkit.data.manifests import language_of, text_of
from asrkit.data.shar import loaded
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.errors import UserError

__all__ = ["LOG_EPS", "Batch", "BucketPlan", "CutTable", "DataConfig", "TrainBatches", "evaluation_batches", "text_of"]


@dataclass(frozen=True)
class Batch:
    """Utterances padded to one length.

    features: (B, T, 80) float32, padded with log(1e-10); feature_lens: (B,) int64.
    symbols: (B, U) int64 padded with 0, symbol_lens: (B,); empty when no tokenizer was given.
    clean: (B, T, 80), the features without what changed their sound and not their timing; empty when not asked for.
    durations: seconds of audio, as perturbed. segments: what ``TrainBatches.annotate`` made, by name.
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

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        names = ("features", "feature_lens", "symbols", "symbol_lens", "clean")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved, segments={name: mine.to(device) for name, mine in self.segments.items()})


@config
class DataConfig:
    """Batching and perturbation. ``max_duration`` is seconds of audio for each process and step.

    ``also`` names further manifests to train on (synthetic speech, say); ``repeat`` is how often the main manifest
    comes in an epoch for each time these come.
    """

    max_duration: Annotated[float, Field(gt=0)] = 120.0
    num_buckets: Annotated[int, Field(ge=1)] = 20
    num_workers: Annotated[int, Field(ge=0)] = 1
    bpe_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    also: tuple[Path, ...] = ()
    repeat: Annotated[int, Field(ge=1)] = 1
    noise: Path | None = None  # a manifest of noise recordings, for augment.noise_probability
    augment: AugmentConfig = field(default_factory=AugmentConfig)


class CutTable:
    """Cuts by index, in constant time and without a Python object for each.

    Args:
        cuts: read once, in order; each has one supervision.
    """

    def __init__(self, cuts: Iterable[Cut]) -> None:
        lines, durations = [], []
        for cut in cuts:
            lines.append(json.dumps(cut.to_dict(), ensure_ascii=False).encode())
            durations.append(cut.duration)
        self.durations = np.asarray(durations)
        self._ends = np.cumsum([len(line) for line in lines])
        self._text = np.frombuffer(b"".join(lines), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.durations)

    def __getitem__(self, index: int) -> Cut:
        start = self._ends[index - 1] if index else 0
        return deserialize_item(json.loads(self._text[start : self._ends[index]].tobytes()))


class BucketPlan:
    """Which cuts make the batch of a step: every cut once an epoch, cuts of like duration together.

    The cuts, sorted by duration, are parted into buckets of equal audio. A bucket's batch size and number of
    batches are fixed, its order is drawn from (seed, epoch): so a step's epoch, and with it the batch, is known
    without replaying anything.

    Args:
        durations: (N,) seconds.
        max_duration: most seconds in a batch of all slices together, the longest perturbation included.
        slices: processes times accumulated parts; each gets an equal share of every batch.
    """

    def __init__(self, durations: np.ndarray, max_duration: float, num_buckets: int, slices: int, seed: int) -> None:
        order = np.argsort(durations, kind="stable")
        passed = np.cumsum(durations[order])
        bucket = np.minimum((passed / passed[-1] * num_buckets).astype(int), num_buckets - 1)
        self._buckets = [order[bucket == i] for i in np.unique(bucket)]
        self._batches = []
        for members in self._buckets:
            size = max(1, int(max_duration / slices / durations[members].max())) * slices
            self._batches.append(-(-len(members) // size))
        self.steps_per_epoch = int(sum(self._batches))
        self._slices, self._seed = slices, seed
        self._epoch, self._plan = -1, []  # type: tuple[int, list[np.ndarray]]

    def __call__(self, step: int) -> np.ndarray:
        """Indices of the cuts of ``step`` (from 0); their number is a multiple of ``slices``."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng((self._seed, 1, epoch))
            plan = []
            for members, count in zip(self._buckets, self._batches, strict=True):
                plan += np.array_split(random.permutation(members), count)
            self._plan = [plan[i] for i in random.permutation(len(plan))]
            self._epoch = epoch
        chosen = self._plan[place]
        # A batch that its slices cannot share evenly repeats its first cuts.
        return np.resize(chosen, -(-len(chosen) // self._slices) * self._slices)


class TrainBatches(torch.utils.data.Dataset[Batch]):
    """``batches[step * slices + slice]``: the perturbed batch of a step and slice.

    Args:
        rank: added to the number of the accumulated part, gives the slice.

    With ``clean`` set, batches hold the clean features as well.
    ``annotate``, where a stage sets it, makes ``segments`` of each utterance's cuts as they are heard.
    """

    annotate: Callable[[Sequence[Sequence[Heard]]], dict[str, Segments]] | None = None

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
        self.table, self.plan, self.slices = table, plan, slices
        self.settings, self.tokenizer, self.noise, self.seed = settings, tokenizer, noise, seed
        self.clean = False

    def __getitem__(self, place: int) -> Batch:
        step, part = divmod(place, self.slices)
        chosen = self.plan(step)
        mine = range(part, len(chosen), self.slices)
        augment = self.settings.augment
        features, clean, symbols, cuts, texts, warps, parts = [], [], [], [], [], [], []
        for position in mine:
            # Seeded by the place in the whole batch, so that the number of processes does not change the data.
            random = np.random.default_rng((self.seed, 2, step, position))
            joined = [self.table[int(chosen[position])]]
            if random.uniform() < augment.join:
                joined.append(self.table[int(random.choice(chosen))])
            made = [perturbed_features(cut, augment, random, self.noise, self.clean) for cut in joined]
            parts.append([Heard(cut, len(mine), *added) for cut, (mine, _, added) in zip(joined, made, strict=True)])
            item = torch.cat([mine for mine, *_ in made])
            clean.append(torch.cat([untouched for _, untouched, _ in made]))
            if augment.channel_db > 0:
                item = item + channel_curves(1, NUM_MEL_BINS, augment.channel_db, random)
            warps.append(1.0 + float(random.uniform(-augment.vocal_tract, augment.vocal_tract)))
            texts.append(" ".join(text_of(cut) for cut in joined))
            symbols.append(
                self.tokenizer.encode(texts[-1], self.settings.bpe_dropout, seed=int(random.integers(1 << 31)))
            )
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


def cut_samples(cut: Cut) -> Tensor:
    """The audio of a cut: (num_samples,) float32, mono, 16 kHz.

    Raises:
        UserError: the audio cannot be read; names the cut.
    """
    try:
        samples = torch.from_numpy(np.ascontiguousarray(loaded(cut, "recording").load_audio())).float()
    except Exception as error:  # lhotse raises many kinds
        raise UserError(
            f"cut {cut.id}: cannot read its audio ({' '.join(str(error).split())[:200]}); run `asrkit data check`"
        ) from error
    return resample(samples.mean(dim=0), cut.sampling_rate)


def cut_features(cut: Cut) -> Tensor:
    """(T, 80) features of a cut: precomputed when the manifest has them, else from its audio.

    Raises:
        UserError: unreadable audio, or features of another dimension.
    """
    return _stored_features(cut) if cut.has_features else fbank(cut_samples(cut))


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
        features = untouched = _stored_features(cut)
    else:
        samples = cut_samples(cut)
        hum = None
        if random.uniform() < augment.noise_probability:
            hum = (
                colored_noise(len(samples), random)
                if noise is None
                else cut_samples(noise[int(random.integers(len(noise)))])
            )
        timed, added = perturb_time(samples, augment, random)
        features = untouched = fbank(perturb_sound(timed, augment, random, hum))
        if clean:
            untouched = fbank(timed)
    if augment.tempo > 0:
        factor = 1.0 + float(random.uniform(-augment.tempo, augment.tempo))
        features, untouched = stretch(features, factor), stretch(untouched, factor)
        added = (added[0] / factor, added[1] / factor)
    return features, untouched, added


def _stored_features(cut: Cut) -> Tensor:
    try:
        features = torch.from_numpy(loaded(cut, "features").load_features())
    except Exception as error:  # lhotse raises many kinds
        raise UserError(f"cut {cut.id}: cannot read its features ({' '.join(str(error).split())[:200]})") from error
    if features.shape[1] != NUM_MEL_BINS:
        raise UserError(
            f"cut {cut.id}: features have {features.shape[1]} bins, not {NUM_MEL_BINS}; compute them with 80 or drop them"
        )
    return features


def evaluation_batches(cuts: CutSet | Sequence[Cut], max_duration: float) -> Iterator[Batch]:
    """Every cut once, unperturbed, longest together first; batches of at most ``max_duration`` padded seconds."""
    waiting: list[Cut] = []
    for cut in sorted(cuts, key=lambda cut: (-cut.duration, cut.id)):
        if waiting and waiting[0].duration * (len(waiting) + 1) > max_duration:
            yield _plain_batch(waiting)
            waiting = []
        waiting.append(cut)
    if waiting:
        yield _plain_batch(waiting)


def _plain_batch(cuts: list[Cut]) -> Batch:
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


def feature_statistics(table: CutTable, max_cuts: int = 2000) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each mel bin over (at most, evenly chosen) ``max_cuts`` cuts: (80,), (80,)."""
    chosen = np.unique(np.linspace(0, len(table) - 1, min(max_cuts, len(table))).astype(int))
    count, total, squares = (
        0,
        torch.zeros(NUM_MEL_BINS, dtype=torch.float64),
        torch.zeros(NUM_MEL_BINS, dtype=torch.float64),
    )
    for index in chosen:
        features = cut_features(table[int(index)]).double()
        count += len(features)
        total += features.sum(0)
        squares += features.square().sum(0)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=1e-4).sqrt().float()


def loader(batches: Any, places: Sequence[int], num_workers: int) -> Any:
    """A DataLoader over the given places, in order, prefetching in ``num_workers`` processes (0: in this one)."""
    # Without worker processes torch 2 wants no prefetch_factor, and torch 1 its default.
    options: dict[str, Any] = {"prefetch_factor": 4} if num_workers else {}
    return torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=places,
        num_workers=num_workers,
        worker_init_fn=_single_thread,
        generator=torch.Generator(),  # else it draws from the one that seeds dropout
        **options,
    )


def _single_thread(worker: int) -> None:
    torch.set_num_threads(1)
