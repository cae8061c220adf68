"""Is a difference between two systems more than chance? The tests, on plain arrays.

Errors are numbers of errors, words of reference words. A group is what is resampled: an utterance, or all that one
speaker says. Differences are the second system's rate less the first's: below 0, the second is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
FEW_SEGMENTS = 50  # below that Gillick and Cox do not trust the normal distribution
MIN_CORRECT = 2  # words that both systems recognize between two segments, as in NIST's SCTK
BLOCK = 4_000_000  # numbers drawn at once, which bounds the memory

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Estimate:
    """A difference of rates, its standard error, and the degrees of freedom of Student's t that it is judged by."""

    difference: float
    standard_error: float
    degrees: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """What holds the true difference in ``level`` of test sets."""
        from scipy.stats import t

        reach = float(t.ppf((1 + level) / 2, self.degrees)) * self.standard_error
        return self.difference - reach, self.difference + reach

    @property
    def p_value(self) -> float:
        """How often equal systems differ by as much or more, in either direction."""
        from scipy.stats import t

        return min(1.0, 2 * float(t.sf(abs(_ratio(self.difference, self.standard_error)), self.degrees)))

    def equivalence_p_value(self, margin: float) -> float:
        """Two one-sided tests (Schuirmann, 1987): how often systems ``margin`` apart look as alike as these, or more."""
        from scipy.stats import t

        return float(t.sf(_ratio(margin - abs(self.difference), self.standard_error), self.degrees))


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, words: np.ndarray, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """The difference of two rates with its standard error, by drawing groups, and seeds, with replacement.

    Groups are drawn for both systems at once (Bisani and Ney, 2004). Where a system was trained with several seeds, these
    are drawn too, independently of the groups and of the other system's seeds; that it errs on the safe side is Owen's
    result on crossed draws (2007). Draws among few vary too little by a factor of sqrt((n - 1) / n), which is put right
    for seeds and groups (Hesterberg, 2015, section 4.1), and the interval is Student's.

    Args:
        first, second: (seeds, groups), errors. The numbers of seeds may differ.
        words: (groups,).

    Raises:
        ValueError: fewer than two groups have words.
    """
    groups = len(words)
    if np.count_nonzero(words) < 2:
        raise ValueError("fewer than two groups have words")
    random = np.random.default_rng(seed)
    drawn = []
    for size in _blocks(draws, max(1, BLOCK // groups)):
        times = _counts(random, size, groups)
        total = times @ words
        changed = _over_seeds(random, times @ second.T) - _over_seeds(random, times @ first.T)
        drawn.append(changed[total > 0] / total[total > 0])
    error = float(np.concatenate(drawn).std()) * math.sqrt(groups / (groups - 1))
    difference = float(second.sum(1).mean() - first.sum(1).mean()) / float(words.sum())
    return Estimate(difference, error, _degrees(first, second, words, error))


def _blocks(total: int, largest: int) -> Iterator[int]:
    for start in range(0, total, largest):
        yield min(largest, total - start)


def _counts(random: np.random.Generator, draws: int, size: int) -> np.ndarray:
    """(draws, size) float64: how often each of ``size`` things comes when as many are drawn with replacement."""
    numbers = random.integers(size, size=(draws, size)) + size * np.arange(draws)[:, None]
    return np.bincount(numbers.ravel(), minlength=draws * size).reshape(draws, size).astype(np.float64)


def _over_seeds(random: np.random.Generator, errors: np.ndarray) -> np.ndarray:
    """(draws, seeds) to (draws,): the mean over seeds, these drawn too where there are several."""
    draws, seeds = errors.shape
    if seeds == 1:
        return errors[:, 0]
    weights = (_counts(random, draws, seeds) - 1) * math.sqrt(seeds / (seeds - 1)) + 1
    return (errors * weights).sum(1) / seeds


def _degrees(first: np.ndarray, second: np.ndarray, words: np.ndarray, error: float) -> float:
    """Degrees of freedom of a sum of variances known from few groups and from few seeds (Welch and Satterthwaite)."""
    parts = []
    for errors in (first, second):
        if len(errors) > 1:
            rates = errors.sum(1) / words.sum()
            parts.append((float(rates.var(ddof=1)) / len(rates), len(rates) - 1))
    rest = max(0.0, error**2 - sum(variance for variance, _ in parts))
    parts.append((rest, len(words) - 1))
    whole = sum(variance for variance, _ in parts)
    if whole == 0:
        return len(words) - 1
    return whole**2 / sum(variance**2 / degrees for variance, degrees in parts)


@dataclass(frozen=True)
class SegmentTest:
    """MAPSSWE: the number of segments with errors, the test statistic W (below 0: the second is better), the p-value.

    ``exact``: p is that of all exchanges of the two systems, not of the normal distribution.
    """

    segments: int
    statistic: float
    p_value: float
    exact: bool


def mapsswe(differences: np.ndarray) -> SegmentTest:
    """The matched-pairs sentence-segment word error test (Gillick and Cox, 1989), two-sided.

    With 50 segments or more, W = mean / (deviation / sqrt(n)) is held against the normal distribution, as in NIST's SCTK.
    With fewer, which its authors rule out, p is exact instead: if the systems were equally good, each segment's difference
    could as well have the other sign, and the share of all 2^n choices of signs with as large a sum is counted.

    Args:
        differences: (segments,) integers, errors of the second system less errors of the first in each segment.
    """
    count, total = len(differences), int(differences.sum())
    if not differences.any():
        return SegmentTest(count, 0.0, 1.0, count < FEW_SEGMENTS)
    deviation = float(differences.std(ddof=1)) if count > 1 else 0.0
    statistic = _ratio(total / count, deviation / math.sqrt(count))
    if count < FEW_SEGMENTS:
        return SegmentTest(count, statistic, _signs_p_value(differences), True)
    return SegmentTest(count, statistic, math.erfc(abs(statistic) / math.sqrt(2)), False)


def _signs_p_value(differences: np.ndarray) -> float:
    """The share of all choices of signs whose sum is as far from 0 as this one, or farther."""
    reach = int(np.abs(differences).sum())
    chances = np.zeros(2 * reach + 1)  # of the sums from -reach to reach
    chances[reach] = 1.0
    for size in np.abs(differences).tolist():
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(int(differences.sum()))
    return min(1.0, float(chances[far].sum()))


def segment_errors(first: Spans, second: Spans) -> list[tuple[int, int]]:
    """Errors of both systems in each segment of an utterance; segments without any error are left out.

    A segment ends where both systems recognize two or more words in a row, or with the utterance: what is spoken beyond
    that does not depend on its errors any more, so segments are independent where words are not.

    Args:
        first, second: the reference words each error covers, (i, i + 1) of word i, (i, i) of an insertion before it.
    """
    errors = sorted([(*span, 0) for span in first] + [(*span, 1) for span in second])
    segments: list[list[int]] = []
    end = -MIN_CORRECT
    for start, stop, system in errors:
        if start - end >= MIN_CORRECT:
            segments.append([0, 0])
        segments[-1][system] += 1
        end = max(end, stop)
    return [(one, other) for one, other in segments]


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm, 1979): below 0.05, having tried many does not explain any of them."""
    corrected, least, count = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        least = max(least, min(1.0, (count - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def _ratio(value: float, error: float) -> float:
    """A value in standard errors; infinite where there is no error, 0 of 0."""
    return value / error if error else math.copysign(math.inf, value) if value else 0.0
