"""How often `asrkit compare` calls two equally good systems different: 5 % is right, and more is too much.

Two systems are drawn that miss every word with the same probability, which differs from utterance to utterance; one
utterance in fifty is lost as a whole, by either system at random, as recognizers do lose them. With --speakers, each
system is also better for some speakers and worse for others, by a standard deviation of 4 points; on average they are equal.
With --long, so many utterances hold half of the words, as three of the demo's 55 test prompts do.

The columns: the usual percentile interval of the bootstrap (not used), the interval of `compare` over utterances and over
speakers, MAPSSWE, and what `compare` calls certain: interval over utterances (or speakers) and MAPSSWE together.

    python benchmarks/compare_null.py
    python benchmarks/compare_null.py --utterances 60 200 --long 3
    python benchmarks/compare_null.py --speakers 5 20 --utterances 200
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np

from asrkit.reporting.significance import mapsswe, paired_bootstrap, segment_errors

LEVEL = 0.05
SPEAKER_DEVIATION = 0.04


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", nargs="+", type=int, default=[20, 50, 60, 200, 2000])
    parser.add_argument(
        "--speakers", nargs="*", type=int, default=[], help="numbers of speakers; none: they do not matter"
    )
    parser.add_argument("--long", type=int, default=0, help="utterances that hold half of the words")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=1000, help="of each bootstrap")
    options = parser.parse_args()
    columns = ("percentile", "bootstrap", "speakers", "MAPSSWE", "certain", "by speaker")
    print(f"{'utterances':>10} {'speakers':>8} |", *(f"{column:>14}" for column in columns))
    for utterances in options.utterances:
        for speakers in options.speakers or [0]:
            p = np.array(
                [trial(seed, utterances, speakers, options.draws, options.long) for seed in range(options.trials)]
            )
            below = p < LEVEL
            rates = [*below.T, below[:, 1] & below[:, 3], below[:, 2] & below[:, 3]]
            cells = [
                _rate(rejected) if speakers or index not in (2, 5) else "-" for index, rejected in enumerate(rates)
            ]
            print(f"{utterances:10} {speakers or '-':>8} |", *(f"{cell:>14}" for cell in cells), flush=True)


def _rate(rejected: np.ndarray) -> str:
    rate = float(rejected.mean())
    return f"{100 * rate:.1f} ± {196 * math.sqrt(rate * (1 - rate) / len(rejected)):.1f} %"


def trial(seed: int, utterances: int, speakers: int, draws: int, long: int = 0) -> tuple[float, float, float, float]:
    """P-values: by the percentiles of the draws, the bootstrap over utterances, over speakers (1 without), MAPSSWE."""
    random = np.random.default_rng(seed)
    words, spans = equal_systems(random, utterances, speakers, long)
    errors = np.array([[len(utterance) for utterance in system] for system in spans], dtype=float)
    by_utterance = paired_bootstrap(errors[:1], errors[1:], words, draws, seed).p_value
    by_speaker = 1.0
    if speakers:
        index = np.arange(utterances) % speakers
        first, second, total = (np.bincount(index, weights=row)[None] for row in (*errors, words))
        by_speaker = paired_bootstrap(first, second, total[0], draws, seed).p_value
    pairs = [segment_errors(one, other) for one, other in zip(*spans, strict=True)]
    differences = np.array([second - first for utterance in pairs for first, second in utterance], dtype=int)
    changes = errors[1] - errors[0]
    return percentile_p_value(random, changes, draws), by_utterance, by_speaker, mapsswe(differences).p_value


def percentile_p_value(random: np.random.Generator, changes: np.ndarray, draws: int) -> float:
    """What the interval between percentiles of the draws would say, the usual one, which asrkit does not take."""
    totals = changes[random.integers(len(changes), size=(draws, len(changes)))].sum(axis=1)
    return min(1.0, 2 * min(float((totals <= 0).mean()), float((totals >= 0).mean())))


def equal_systems(
    random: np.random.Generator, utterances: int, speakers: int = 0, long: int = 0
) -> tuple[np.ndarray, Sequence[Sequence[Sequence[tuple[int, int]]]]]:
    """(utterances,) words of each, and the spans of the errors of two equally good systems: system, utterance, error."""
    words = np.ceil(random.lognormal(math.log(10), 0.7, utterances)).astype(int)
    if long:
        words[:long] = np.ceil(words[long:].sum() / long)
    difficulty = random.beta(1.5, 6, utterances)
    spans: list[list[list[tuple[int, int]]]] = [[], []]
    better = random.normal(0, SPEAKER_DEVIATION, speakers) if speakers else np.zeros(1)
    for number, (count, chance) in enumerate(zip(words.tolist(), difficulty.tolist(), strict=True)):
        for system, sign in zip(spans, (-0.5, 0.5), strict=True):
            lost = random.random() < 0.02
            missed = random.random(count) < (1.0 if lost else chance + sign * better[number % len(better)])
            system.append([(int(word), int(word) + 1) for word in np.flatnonzero(missed)])
    return words, spans


if __name__ == "__main__":
    main()
