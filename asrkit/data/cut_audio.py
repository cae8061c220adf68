"""The samples and the features of a cut: the one way from a manifest to numbers."""

from __future__ import annotations

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from asrkit.data.cut_table import CutTable
from asrkit.data.features import NUM_MEL_BINS, fbank, resample
from asrkit.data.shar import loaded
from asrkit.errors import UserError


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
