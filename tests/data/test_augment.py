"""Augmentation does what its settings say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.data.augment import AugmentConfig, perturb_sound, perturb_time, stretch
from asrkit.data.train_batches import AudioConfig
from asrkit.frames import SAMPLE_RATE


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 10**6),
)
def test_no_perturbed_cut_is_longer_than_batches_are_planned_for(
    speed: float, tempo: float, silence: float, seed: int
) -> None:
    augment, random = AugmentConfig(speed=speed, tempo=tempo, silence=silence), np.random.default_rng(seed)
    samples, _ = perturb_time(torch.zeros(SAMPLE_RATE), augment, random)
    slowest = len(stretch(torch.zeros(round(len(samples) / SAMPLE_RATE * 100), 1), 1 - tempo)) / 100
    planned = (1.0 + 2 * silence) * AudioConfig(augment=augment).longest
    assert slowest <= planned + 0.02


def test_the_slowest_speed_is_planned_for() -> None:
    """Half as fast is twice as long."""
    assert AudioConfig(augment=AugmentConfig(speed=0.5)).longest == 2
    with pytest.raises(ValueError, match="multiple of 0.01"):
        AugmentConfig(speed=0.005)
    with pytest.raises(ValueError, match="write the least first"):
        AugmentConfig(noise_snr_db=(30.0, 10.0))


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_noise_is_mixed_in_at_the_ratio_asked_for(snr_db: float) -> None:
    random = np.random.default_rng(0)
    samples, noise = torch.randn(16000), torch.randn(4000)
    settings = AugmentConfig(volume_db=0.0, noise_snr_db=(snr_db, snr_db))
    added = perturb_sound(samples, settings, random, noise) - samples
    ratio = 10 * torch.log10(samples.square().mean() / added.square().mean())
    assert float(ratio) == pytest.approx(snr_db, abs=0.01)
