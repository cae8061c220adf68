"""The tests of differences: against slow references, hand-computed examples, and equally good systems."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrkit.reporting.compare import error_spans
from asrkit.reporting.significance import Estimate, holm, mapsswe, paired_bootstrap, segment_errors

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from compare_null import trial

NOTHING = ""
Case = tuple[np.ndarray, np.ndarray, np.ndarray]


def slow_bootstrap(first: np.ndarray, second: np.ndarray, words: np.ndarray, draws: int, seed: int) -> float:
    """The standard error of the difference, drawn one group at a time, with Python's own generator."""
    import random

    generator = random.Random(seed)
    groups, differences = len(words), []
    for _ in range(draws):
        drawn = [generator.randrange(groups) for _ in range(groups)]
        means = []
        for errors in (first, second):
            seeds = len(errors)
            weights = [1.0] * seeds
            if seeds > 1:
                times = [0] * seeds
                for _ in range(seeds):
                    times[generator.randrange(seeds)] += 1
                weights = [1 + (count - 1) * math.sqrt(seeds / (seeds - 1)) for count in times]
            means.append(sum(weight * errors[k][g] for k, weight in enumerate(weights) for g in drawn) / seeds)
        differences.append((means[1] - means[0]) / sum(words[g] for g in drawn))
    return float(np.std(differences)) * math.sqrt(groups / (groups - 1))


def some_errors(groups: int, seeds: tuple[int, int], spread: float = 0.0) -> Case:
    random = np.random.default_rng(5)
    words = random.integers(3, 20, groups)
    systems = []
    for count, rate in zip(seeds, (0.3, 0.25), strict=True):
        rates = np.clip(rate + spread * random.standard_normal((count, 1)), 0.02, 0.9)
        systems.append(random.binomial(words, rates * np.ones((count, groups))).astype(float))
    return systems[0], systems[1], words


@pytest.mark.parametrize(("seeds", "spread"), [((1, 1), 0.0), ((3, 2), 0.05)])
def test_the_bootstrap_is_that_of_loops(seeds: tuple[int, int], spread: float) -> None:
    first, second, words = some_errors(40, seeds, spread)
    fast = paired_bootstrap(first, second, words, draws=20_000)
    slow = slow_bootstrap(first, second, words, draws=2000, seed=1)
    assert fast.standard_error == pytest.approx(slow, rel=0.06)  # four deviations of 2000 draws
    rates = [errors.sum() / len(errors) / words.sum() for errors in (first, second)]
    assert fast.difference == pytest.approx(rates[1] - rates[0])


def test_the_standard_error_is_that_of_the_textbook() -> None:
    """The rate's deviation by linearization (Cochran, 1977, 2.46), which the bootstrap of many groups has to meet."""
    first, second, words = some_errors(2000, (1, 1))
    changes = (second - first)[0]
    residuals = changes - changes.sum() / words.sum() * words
    textbook = math.sqrt(2000 / 1999 * float((residuals**2).sum())) / words.sum()
    estimate = paired_bootstrap(first, second, words, draws=20_000)
    assert estimate.standard_error == pytest.approx(textbook, rel=0.03)
    assert estimate.degrees == 1999


def test_blocks_change_nothing_but_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, words = some_errors(50, (1, 1))
    whole = paired_bootstrap(first, second, words)
    monkeypatch.setattr("asrkit.reporting.significance.BLOCK", 1000)
    blocks = paired_bootstrap(first, second, words)
    assert blocks.standard_error == pytest.approx(whole.standard_error, rel=0.03)


def test_seeds_that_differ_widen_the_interval() -> None:
    """Two seeds know their spread by 2 degrees of freedom in all, 8 seeds by 14."""
    narrow = paired_bootstrap(*some_errors(500, (8, 8), 0.0))
    wide = paired_bootstrap(*some_errors(500, (8, 8), 0.1))
    assert wide.standard_error > 3 * narrow.standard_error
    assert 5 < wide.degrees < 30
    assert paired_bootstrap(*some_errors(500, (2, 2), 0.1)).degrees < 5


def test_interval_and_p_value_agree() -> None:
    from scipy.stats import norm

    certain = Estimate(-0.02, 0.01, 1e9)
    assert certain.interval() == pytest.approx((-0.02 - 0.0196, -0.02 + 0.0196), abs=1e-5)
    assert certain.p_value == pytest.approx(2 * norm.sf(2.0))
    edge = Estimate(0.01, 0.01 / 2.776445, 4)  # Student's t of 4 degrees, 95 %
    assert edge.p_value == pytest.approx(0.05, abs=1e-6)
    assert edge.interval()[0] == pytest.approx(0.0, abs=1e-8)


def test_equivalence_is_the_90_percent_interval_within_the_margin() -> None:
    estimate = Estimate(0.004, 0.003, 50)
    low, high = estimate.interval(0.9)
    assert max(abs(low), abs(high)) == high
    assert estimate.equivalence_p_value(high) == pytest.approx(0.05)
    assert estimate.equivalence_p_value(high + 1e-4) < 0.05 < estimate.equivalence_p_value(high - 1e-4)
    assert Estimate(0.0, 0.0, 50).equivalence_p_value(0.01) == 0.0


# The example of NIST's SCTK (doc/mtchprs.htm): four segments, in which A makes 2, 0, 1, 1 errors and B 0, 1, 2, 0.
REFERENCE = "it was the best of times it was the worst of times it was"
SYSTEM_A = ["it ITS", "was ", "the the", "best best", "of of", "times times", "it it", "was IS", "the the"]
SYSTEM_A += ["worst worst", "of of", "times times", " OR", "it it", "was was"]
SYSTEM_B = ["it it", "was was", "the the", "best best", "of ", "times times", "it it", "was WON", "the the"]
SYSTEM_B += ["worst TEST", "of of", "times times", "it it", "was was"]


def pairs(aligned: list[str]) -> list[tuple[str, str]]:
    return [(ref, hyp) for ref, _, hyp in (pair.partition(" ") for pair in aligned)]


def test_the_segments_of_the_example_of_sctk() -> None:
    for system in (SYSTEM_A, SYSTEM_B):
        assert " ".join(ref for ref, _ in pairs(system) if ref) == REFERENCE
    segments = segment_errors(error_spans(pairs(SYSTEM_A)), error_spans(pairs(SYSTEM_B)))
    assert segments == [(2, 0), (0, 1), (1, 2), (1, 0)]
    # By hand: Z = -2, 1, 1, -1, mean -1/4, deviation 1.5, W = -1/4 / (1.5 / 2) = -1/3.
    test = mapsswe(np.array([second - first for first, second in segments]))
    assert test.segments == 4 and test.statistic == pytest.approx(-1 / 3)
    assert test.exact and test.p_value == 1.0  # 2, 1, 1 and 1 with any signs are never nearer to 0 than 1


def test_many_segments_are_held_against_the_normal_distribution() -> None:
    """60 segments of 1 and 30 of -1: mean 1/3, deviation sqrt(90 * 8/9 / 89), W = 3.34."""
    test = mapsswe(np.array([1] * 60 + [-1] * 30))
    statistic = (1 / 3) / math.sqrt(90 * (8 / 9) / 89 / 90)
    assert not test.exact and test.statistic == pytest.approx(statistic)
    assert test.p_value == pytest.approx(math.erfc(statistic / math.sqrt(2)))
    assert mapsswe(np.array([1] * 60)).p_value == 0.0


@given(st.lists(st.integers(-3, 3), max_size=9))
def test_few_segments_are_held_against_all_exchanges(differences: list[int]) -> None:
    total, sizes = abs(sum(differences)), [abs(value) for value in differences]
    sums = [
        abs(sum(sign * size for sign, size in zip(signs, sizes, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(sizes))
    ]
    test = mapsswe(np.array(differences, dtype=int))
    assert test.exact
    assert test.p_value == pytest.approx(sum(value >= total for value in sums) / len(sums))


def slow_segments(ref: list[str], first: list[tuple[str, str]], second: list[tuple[str, str]]) -> list[tuple[int, int]]:
    """Walk over slots and words: a run of two words without any error, in either, closes a segment."""
    columns: list[list[int]] = [[0, 0] for _ in range(2 * len(ref) + 1)]  # slot, word, slot, ..., slot
    for system, aligned in enumerate((first, second)):
        position = 0
        for one, other in aligned:
            if one == NOTHING:
                columns[2 * position][system] += 1
            else:
                columns[2 * position + 1][system] += one != other
                position += 1
    segments, current, right = [], [0, 0], 0
    for index, column in enumerate(columns):
        if any(column):
            right = 0
            current = [total + errors for total, errors in zip(current, column, strict=True)]
        elif index % 2:
            right += 1
        if right == 2 and any(current):
            segments.append(current)
            current = [0, 0]
    segments += [current] if any(current) else []
    return [(one, other) for one, other in segments]


edits = st.lists(st.sampled_from(["right", "right", "right", "substituted", "deleted", "inserted"]), max_size=25)


def edited(ref: list[str], kinds: list[str]) -> list[tuple[str, str]]:
    """An alignment of the reference with these errors, as many as there are words for."""
    aligned, waiting = [], list(ref)
    for kind in kinds:
        if kind == "inserted":
            aligned.append((NOTHING, "x"))
        elif waiting:
            word = waiting.pop(0)
            aligned.append((word, {"right": word, "substituted": "x", "deleted": NOTHING}[kind]))
    return [*aligned, *((word, word) for word in waiting)]


@given(edits, edits)
def test_segments_are_those_of_a_walk(one: list[str], other: list[str]) -> None:
    ref = [f"w{index}" for index in range(12)]
    first, second = edited(ref, one), edited(ref, other)
    assert segment_errors(error_spans(first), error_spans(second)) == slow_segments(ref, first, second)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm's own example
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def rejected(utterances: int, trials: int) -> np.ndarray:
    """How often equally good systems are called different: by the bootstrap, and by MAPSSWE."""
    p_values = np.array([trial(seed, utterances, 0, 400) for seed in range(trials)])
    return (p_values[:, [1, 3]] < 0.05).mean(axis=0)


@pytest.mark.slow
@pytest.mark.parametrize(("utterances", "trials"), [(200, 600), (2000, 200)])
def test_equally_good_systems_are_called_different_five_times_in_a_hundred(utterances: int, trials: int) -> None:
    """Within three deviations of the binomial; docs/compare.md has other sizes."""
    tolerance = 3 * math.sqrt(0.05 * 0.95 / trials)
    assert rejected(utterances, trials) == pytest.approx([0.05, 0.05], abs=tolerance)


cases = st.integers(2, 12).flatmap(
    lambda groups: st.tuples(
        st.lists(st.integers(1, 9), min_size=groups, max_size=groups),
        st.lists(st.integers(0, 9), min_size=groups, max_size=groups),
        st.lists(st.integers(0, 9), min_size=groups, max_size=groups),
    )
)


@given(cases)
def test_exchanged_systems_have_the_opposite_difference(case: tuple[list[int], list[int], list[int]]) -> None:
    words, one, other = (np.array(values) for values in case)
    forward = paired_bootstrap(one[None], other[None], words, draws=200)
    back = paired_bootstrap(other[None], one[None], words, draws=200)
    assert forward.difference == -back.difference
    assert (forward.standard_error, forward.p_value) == (back.standard_error, back.p_value)
    assert forward.interval() == pytest.approx(tuple(-end for end in reversed(back.interval())))
    there, again = mapsswe(other - one), mapsswe(one - other)
    assert there.statistic == -again.statistic and there.p_value == pytest.approx(again.p_value)


@given(cases)
def test_a_system_does_not_differ_from_itself(case: tuple[list[int], list[int], list[int]]) -> None:
    words, errors, _ = (np.array(values) for values in case)
    estimate = paired_bootstrap(errors[None], errors[None], words, draws=200)
    assert estimate.difference == 0 and estimate.p_value == 1 and estimate.interval() == (0, 0)
    assert mapsswe(errors - errors).p_value == 1
