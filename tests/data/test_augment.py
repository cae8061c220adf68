"""Augmentation does what its settings say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asrkit.data.augment import AugmentConfig, perturb_sound


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_noise_is_mixed_in_at_the_ratio_asked_for(snr_db: float) -> None:
    random = np.random.default_rng(0)
    samples, noise = torch.randn(16000), torch.randn(4000)
    settings = AugmentConfig(volume_db=0.0, noise_snr_db=(snr_db, snr_db))
    added = perturb_sound(samples, settings, random, noise) - samples
    ratio = 10 * torch.log10(samples.square().mean() / added.square().mean())
    assert float(ratio) == pytest.approx(snr_db, abs=0.01)
