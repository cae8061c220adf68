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

SAMPLE_RATE = 16000
NUM_MEL_BINS = 80
FRAME_SHIFT = 0.01
SHORTEST = 400  # samples of one 25 ms window; less is filled up with silence
LOG_EPS = math.log(1e-10)  # what silence is after the log; batches are padded with it


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
    if len(samples) < SHORTEST:
        samples = torch.nn.functional.pad(samples, (0, SHORTEST - len(samples)))
    return torch.as_tensor(_extractor().extract(samples, SAMPLE_RATE))


def resample(samples: Tensor, rate: int, new_rate: int = SAMPLE_RATE) -> Tensor:
    """Band-limited resampling of (num_samples,) from ``rate`` to ``new_rate`` Hz."""
    if rate == new_rate:
        return samples
    return get_or_create_resampler(rate, new_rate)(samples[None])[0]


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
    return resample(torch.from_numpy(samples.mean(axis=1)), rate)
