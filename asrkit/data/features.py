"""Kaldi log-mel features, as lhotse computes them and as kaldi-native-fbank does on the device."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from lhotse import Fbank, FbankConfig
from lhotse.augmentation.torchaudio import get_or_create_resampler
from torch import Tensor

from asrkit.errors import UserError
from asrkit.frames import SAMPLE_RATE, SHIFT_SAMPLES, WINDOW_SAMPLES

NUM_MEL_BINS = 80
AFTER = (
    WINDOW_SAMPLES + SHIFT_SAMPLES
) // 2  # 280 samples that a frame sees from its own first one on; 120 lie before it
MOST_FILTERS = 50_000_000  # of a resampler: 22,255 Hz needs 14 million
LOG_EPS = math.log(1e-10)  # batches are padded with it: -23.03, below everything that sound gives
SILENCE = math.log(2.0**-23)  # -15.94, what digital silence gives: lhotse and kaldi-native-fbank floor energies there


@cache
def _extractor() -> Fbank:
    return Fbank(FbankConfig(sampling_rate=SAMPLE_RATE, num_mel_bins=NUM_MEL_BINS))


def fbank(samples: Tensor) -> Tensor:
    """Log-mel energies of one recording.

    Args:
        samples: (num_samples,) float32 in [-1, 1] at 16 kHz.

    Returns:
        (T, 80) float32, one frame each 10 ms.
    """
    if len(samples) < WINDOW_SAMPLES:
        samples = torch.nn.functional.pad(samples, (0, WINDOW_SAMPLES - len(samples)))
    return torch.as_tensor(_extractor().extract(samples, SAMPLE_RATE))


class OnlineFbank:
    """``fbank`` of a recording that comes in blocks: the same frames, each as soon as the samples it sees are there.

    Frame i sees the samples 160 i - 120 to 160 i + 279; beyond the ends of a recording they are reflected.
    """

    def __init__(self) -> None:
        self._samples = torch.zeros(0)  # from sample 160 * _first on
        self._first = 0
        self._done = 0  # frames given out

    def accept(self, samples: Tensor) -> Tensor:
        """The next block (num_samples,) to the frames (T, 80) it completes, perhaps none."""
        self._samples = torch.cat([self._samples, samples])
        return self._frames(self._first + (len(self._samples) - AFTER) // SHIFT_SAMPLES + 1)

    def finish(self) -> Tensor:
        """The frames (T, 80) that reach over the recording's end."""
        missing = 0 if self._first else max(0, WINDOW_SAMPLES - len(self._samples))
        self._samples = torch.nn.functional.pad(self._samples, (0, missing))
        return self._frames(self._first + (len(self._samples) + SHIFT_SAMPLES // 2) // SHIFT_SAMPLES)

    def _frames(self, end: int) -> Tensor:
        """The frames from the last given out to ``end``."""
        if end <= self._done:
            return torch.zeros(0, NUM_MEL_BINS)
        frames = torch.as_tensor(_extractor().extract(self._samples, SAMPLE_RATE))
        frames = frames[self._done - self._first : end - self._first]
        # A frame before the next one is kept: what the extractor reflects at its beginning is then never looked at.
        self._samples = self._samples[(end - 1 - self._first) * SHIFT_SAMPLES :]
        self._done, self._first = end, end - 1
        return frames


def can_resample(rate: int) -> bool:
    """Whether the filters from ``rate`` to 16 kHz take no more than some hundred megabytes: 44,101 Hz would take gigabytes."""
    return rate > 0 and rate * SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE) ** 2 <= MOST_FILTERS


def resample(samples: Tensor, rate: int, new_rate: int = SAMPLE_RATE) -> Tensor:
    """Band-limited resampling of (num_samples,) from ``rate`` to ``new_rate`` Hz."""
    if rate == new_rate:
        return samples
    return get_or_create_resampler(rate, new_rate)(samples[None])[0]


class OnlineResample:
    """``resample`` to 16 kHz of a recording that comes in blocks: the same samples, each as soon as those it is made of are
    there.

    Of each ``old`` samples the resampler makes ``new``, from these and fewer than ``reach`` on either side; beyond the ends of
    a recording it hears silence.
    """

    def __init__(self, rate: int) -> None:
        self.rate, common = rate, math.gcd(rate, SAMPLE_RATE)
        self.old, self.new = rate // common, SAMPLE_RATE // common
        # Its filter reaches over 6 samples of the lower rate, and a little more as it cuts off below half of that.
        self.margin = 0 if rate == SAMPLE_RATE else math.ceil(8 / min(self.old, self.new))  # in groups of ``old``
        self.reach = self.margin * self.old
        self._samples = torch.zeros(self.reach)

    def accept(self, samples: Tensor) -> Tensor:
        """The next block (num_samples,) to the samples at 16 kHz it completes, perhaps none."""
        self._samples = torch.cat([self._samples, samples])
        groups = (len(self._samples) - 2 * self.reach) // self.old
        if groups <= 0:
            return torch.zeros(0)
        completed = resample(self._samples, self.rate)[self.margin * self.new :][: groups * self.new]
        self._samples = self._samples[groups * self.old :]
        return completed

    def finish(self) -> Tensor:
        """The samples that reach over the recording's end."""
        return resample(self._samples, self.rate)[self.margin * self.new :]


def load_samples(path: Path) -> Tensor:
    """Read an audio file as (num_samples,) float32 mono at 16 kHz.

    Raises:
        UserError: the file is missing, cannot be decoded, or holds no samples.
    """
    import soundfile

    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: cannot read audio ({error})") from error
    if len(samples) == 0:
        raise UserError(f"{path}: the audio is empty")
    if not can_resample(rate):
        raise UserError(
            f"{path}: {rate} samples a second take too much memory to resample; convert it with another program"
        )
    return resample(torch.from_numpy(samples.mean(axis=1)), rate)
