"""How well confidences of words tell which words are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asrkit.reporting.results import Confidence

BINS = 10


def expected_calibration_error(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """The mean difference between confidence and share of right words, over ``BINS`` bins of equal width, each weighted by its words.

    Source: Naeini et al. 2015 and Guo et al. 2017, equation 3; ten bins are our choice. A bin holds its upper end.
    """
    values, correct = np.asarray(confidences, dtype=float), np.asarray(right, dtype=float)
    bins = np.clip(np.ceil(values * BINS).astype(int) - 1, 0, BINS - 1)
    differences = np.bincount(bins, values - correct, BINS)
    return float(np.abs(differences).sum() / max(1, len(values)))


def summarize_confidence(
    confidences: Sequence[float], right: Sequence[bool], temperature: float, calibrated_on: str | None
) -> Confidence:
    """The numbers of result.json."""
    count = len(right)
    return Confidence(
        words=count,
        right=sum(right) / count if count else None,
        mean=sum(confidences) / count if count else None,
        ece=expected_calibration_error(confidences, right) if count else None,
        bins=BINS,
        temperature=temperature,
        calibrated_on=calibrated_on,
    )
