"""Perturbations of training data, on samples and on batches of features.

Every function takes the random generator it draws from; batches build theirs from (seed, step, position in the batch),
so a resumed run perturbs exactly as the uninterrupted one. Shapes: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from asrkit.config import Share, config
from asrkit.data.features import LOG_EPS, resample
from asrkit.frames import SAMPLE_RATE, SHIFT_SAMPLES


def _in_steps(speed: float) -> float:
    if abs(100 * speed - round(100 * speed)) > 1e-6:
        raise ValueError("must be a multiple of 0.01, as speeds are drawn in steps of that")
    return speed


Fraction = Annotated[float, Field(ge=0.0, le=0.5)]


@config
class SpecAugmentConfig:
    """Masks of SpecAugment (Park et al. 2019, arXiv 1904.08779); masked values become the utterance's mean."""

    num_frequency_masks: Annotated[int, Field(ge=0)] = 2
    """Masks over frequency in each utterance."""
    frequency_mask_bins: Annotated[int, Field(ge=0, le=80)] = 27
    """Widest frequency mask, of 80 mel bins."""
    num_time_masks: Annotated[int, Field(ge=0)] = 10
    """Masks over time in each utterance, at most."""
    time_mask_frames: Annotated[int, Field(ge=0)] = 50
    """Longest time mask, in feature frames of 10 ms."""
    max_time_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.15
    """Share of an utterance that time masks may cover together."""


@config
class AugmentConfig:
    """How training data are varied.

    Speed resamples the samples (pitch and duration change together), tempo stretches the frames (duration alone), the vocal-tract
    factor warps the mel axis below 4.8 kHz (Jaitly & Hinton 2013). Used together they also vary the pitch alone.
    """

    speed: Annotated[Fraction, AfterValidator(_in_steps)] = 0.1
    """Largest change of speed, pitch included, in steps of 0.01: 0.1 draws a factor from 0.9 to 1.1 for each utterance; 0 is off."""
    tempo: Fraction = 0.0
    """Largest change of tempo, pitch kept: 0.1 draws a factor from 0.9 to 1.1; 0 is off."""
    vocal_tract: Fraction = 0.0
    """Largest warp of the frequency axis, as of longer and shorter vocal tracts: 0.1 draws a factor from 0.9 to 1.1; 0
    is off."""
    volume_db: Annotated[float, Field(ge=0.0, le=40.0)] = 6.0
    """Largest change of volume, in dB either way; 0 is off."""
    channel_db: Annotated[float, Field(ge=0.0, le=20.0)] = 0.0
    """Standard deviation, in dB, of a random smooth gain over frequency, as other microphones and rooms have; 0 is
    off."""
    silence: Annotated[float, Field(ge=0.0, le=5.0)] = 0.0
    """Longest faint noise added before and after an utterance, in seconds; 0 is off."""
    join: Share = 0.0
    """Probability that another utterance of the batch is appended, which gives words new neighbors; 0 is off."""
    noise_probability: Share = 0.0
    """Probability that noise is mixed in; 0 is off. `data.noise` says which."""
    noise_snr_db: tuple[float, float] = (10.0, 30.0)
    """Least and most signal-to-noise ratio of the noise mixed in, in dB."""
    spec_augment: SpecAugmentConfig | None = field(default_factory=SpecAugmentConfig)
    """SpecAugment; null is off."""

    @model_validator(mode="after")
    def _least_noise_first(self) -> Any:
        if self.noise_snr_db[0] > self.noise_snr_db[1]:
            raise ValueError(f"noise_snr_db: {list(self.noise_snr_db)} has the most first; write the least first")
        return self


def perturb_time(
    samples: Tensor, settings: AugmentConfig, random: np.random.Generator
) -> tuple[Tensor, tuple[float, float]]:
    """Speed and silence of one recording: (num_samples,) -> (other num_samples,) at 16 kHz, and the feature frames of
    silence that came before and after."""
    before, after = 0, 0
    if settings.speed > 0:
        # Steps of 1 % keep the resampling filters few and short.
        span = round(settings.speed * 100)
        percent = 100 + int(random.integers(-span, span + 1))
        samples = resample(samples, SAMPLE_RATE * percent // 100, SAMPLE_RATE)
    if settings.silence > 0:
        before, after = (random.uniform(0.0, settings.silence, size=2) * SAMPLE_RATE).astype(int)
        level = 10.0 ** (float(random.uniform(-80.0, -45.0)) / 20.0)
        faint = torch.from_numpy(level * random.standard_normal(before + after).astype(np.float32))
        samples = torch.cat([faint[:before], samples, faint[before:]])
    return samples, (before / SHIFT_SAMPLES, after / SHIFT_SAMPLES)


def perturb_sound(
    samples: Tensor, settings: AugmentConfig, random: np.random.Generator, noise: Tensor | None
) -> Tensor:
    """Noise and volume of one recording, which leave time as it is: (num_samples,) -> (num_samples,)."""
    if noise is not None:
        samples = add_noise(samples, noise, float(random.uniform(*settings.noise_snr_db)), random)
    if settings.volume_db > 0:
        samples = samples * 10.0 ** (float(random.uniform(-settings.volume_db, settings.volume_db)) / 20.0)
    return samples


def colored_noise(length: int, random: np.random.Generator) -> Tensor:
    """Gaussian noise whose spectrum falls by a random 0 (white) to 6 dB (brown) an octave: (length,)."""
    white = torch.from_numpy(random.standard_normal(length).astype(np.float32))
    frequency = torch.arange(length // 2 + 1).clamp(min=1)
    return torch.fft.irfft(torch.fft.rfft(white) * frequency ** -float(random.uniform(0.0, 1.0)), n=length)


def channel_curves(batch: int, num_bins: int, deviation_db: float, random: np.random.Generator) -> Tensor:
    """Random gains over the mel axis, smooth (six cosines of falling weight), in the log of energy: (B, F)."""
    order = np.arange(6)
    basis = np.cos(np.pi * order[:, None] * (np.arange(num_bins) + 0.5) / num_bins)
    weights = random.standard_normal((batch, len(order))) / (1 + order)
    nepers = deviation_db * np.log(10.0) / 10.0
    return torch.from_numpy((weights @ basis * nepers).astype(np.float32))


def add_noise(samples: Tensor, noise: Tensor, snr_db: float, random: np.random.Generator) -> Tensor:
    """Mix ``noise`` (any length, repeated or cut) under ``samples`` at ``snr_db`` of mean power."""
    start = int(random.integers(len(noise)))
    noise = noise.roll(-start).repeat(-(-len(samples) // len(noise)))[: len(samples)]
    power, noise_power = samples.square().mean(), noise.square().mean()
    if noise_power == 0 or power == 0:
        return samples
    return samples + noise * torch.sqrt(power / noise_power / 10.0 ** (snr_db / 10.0))


def stretch(features: Tensor, factor: float) -> Tensor:
    """Change the tempo by ``factor`` through linear interpolation in time: (T, F) -> (about T / factor, F)."""
    num_frames = max(1, round(len(features) / factor))
    return torch.nn.functional.interpolate(features.t()[None], size=num_frames, mode="linear", align_corners=False)[
        0
    ].t()


def vocal_tract_warp(features: Tensor, factors: Tensor, high_hz: float = 4800.0) -> Tensor:
    """Warp the frequency axis of log-mel features piecewise linearly, one factor for each utterance.

    Below ``high_hz * min(factor, 1) / factor`` a frequency f moves to factor * f; above, the rest of the band is
    squeezed or stretched so that the Nyquist frequency stays (Jaitly & Hinton 2013, as Kaldi's --vtln-warp).

    Args:
        features: (B, T, F).
        factors: (B,) around 1.
    """
    num_bins, nyquist = features.shape[-1], SAMPLE_RATE / 2
    low_mel, high_mel = _mel(torch.tensor(20.0)), _mel(torch.tensor(nyquist - 400.0))
    centers = low_mel + (high_mel - low_mel) * torch.arange(1, num_bins + 1) / (num_bins + 1)
    hertz = 700.0 * (torch.exp(centers / 1127.0) - 1.0)
    factors = factors[:, None]
    edge = high_hz * factors.clamp(max=1.0) / factors
    above = nyquist - (nyquist - edge * factors) / (nyquist - edge) * (nyquist - hertz)
    source = torch.where(hertz < edge, hertz * factors, above)  # (B, F): where each bin reads from
    position = ((_mel(source) - low_mel) / (high_mel - low_mel) * (num_bins + 1) - 1).clamp(0, num_bins - 1)
    lower = position.floor().clamp(max=num_bins - 2)
    weight = (position - lower).unsqueeze(-1)
    bins = torch.arange(num_bins)
    matrix = (bins == lower.unsqueeze(-1)) * (1 - weight) + (bins == lower.unsqueeze(-1) + 1) * weight
    return features @ matrix.transpose(1, 2).to(features.dtype)


def _mel(hertz: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(hertz / 700.0)


def spec_augment(
    features: Tensor, feature_lens: Tensor, settings: SpecAugmentConfig, random: np.random.Generator
) -> Tensor:
    """Mask bands and stretches of each utterance with its mean, the whole batch at once: (B, T, F) -> (B, T, F).

    The number of time masks grows with the utterance (one for each ``time_mask_frames`` / ``max_time_fraction``
    frames), so that at most ``max_time_fraction`` of it can be hidden, at most ``num_time_masks``.
    """
    batch, num_frames, num_bins = features.shape
    hidden = torch.zeros(batch, num_frames, num_bins, dtype=torch.bool)
    lens = feature_lens.numpy()
    if settings.num_frequency_masks and settings.frequency_mask_bins:
        widest, extent = (np.full(batch, limit) for limit in (settings.frequency_mask_bins, num_bins))
        hidden |= _spans(settings.num_frequency_masks, widest, extent, num_bins, random).any(1)[:, None, :]
    if settings.num_time_masks and settings.time_mask_frames and settings.max_time_fraction > 0:
        budget = settings.max_time_fraction * lens
        counts = np.clip(np.ceil(budget / settings.time_mask_frames), 1, settings.num_time_masks)
        widest = np.minimum(settings.time_mask_frames, budget // counts).astype(np.int64)
        masks = _spans(settings.num_time_masks, widest, lens, num_frames, random)
        masks &= torch.from_numpy(np.arange(settings.num_time_masks) < counts[:, None])[..., None]
        hidden |= masks.any(1)[:, :, None]
    real = (torch.arange(num_frames) < feature_lens[:, None]).unsqueeze(-1)
    mean = (features * real).sum((1, 2)) / (feature_lens.clamp(min=1) * num_bins)
    return torch.where(hidden & real, mean[:, None, None], features)


def _spans(count: int, widest: np.ndarray, extent: np.ndarray, size: int, random: np.random.Generator) -> Tensor:
    """(B, count, size) bool: of each row ``count`` stretches, each of a width in 0..widest, anywhere within 0..extent.

    Both ends are included: the widest stretch there is, and the last place of the extent. widest, extent: (B,) int.
    """
    width = random.integers(np.minimum(widest, extent)[:, None] + 1, size=(len(widest), count))
    start = random.integers(extent[:, None] - width + 1)[..., None]
    position = np.arange(size)
    return torch.from_numpy((position >= start) & (position < start + width[..., None]))


def pad(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack (T_i, F) into (B, max T, F), padded with ``LOG_EPS``; and their lengths (B,)."""
    lens = torch.tensor([len(item) for item in features])
    batch = features[0].new_full((len(features), int(lens.max()), features[0].shape[1]), LOG_EPS)
    for row, item in enumerate(features):
        batch[row, : len(item)] = item
    return batch, lens
