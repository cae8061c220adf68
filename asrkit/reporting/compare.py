"""Two systems on the same utterances: how much they differ, whether that is significant, and where it comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from asrkit.config import config
from asrkit.errors import UserError
from asrkit.reporting.results import Count
from asrkit.reporting.significance import Estimate, holm, mapsswe, paired_bootstrap, segment_errors
from asrkit.reporting.wer import NOTHING, Pairs, Scored

Unit = Literal["speaker", "utterance", "language"]
UNITS: tuple[Unit, ...] = get_args(Unit)
LEVEL = 0.05  # of a p-value below which a difference is called significant
LENGTHS = ("no words", "1-5 words", "6-10 words", "11-20 words", "21 words or more")
LISTED = 10  # words and utterances most improved, and most worsened


@dataclass(frozen=True)
class System:
    """What is compared: a name, and its utterances for each training seed, in one order."""

    name: str
    seeds: tuple[tuple[Scored, ...], ...]

    @property
    def utterances(self) -> tuple[Scored, ...]:
        return self.seeds[0]

    @cached_property
    def errors(self) -> np.ndarray:
        """(seeds, utterances, 3): substitutions, insertions, deletions."""
        counts = [[utterance.words for utterance in seed] for seed in self.seeds]
        rows = [[(count.substitutions, count.insertions, count.deletions) for count in seed] for seed in counts]
        return np.array(rows, dtype=np.float64).reshape(len(self.seeds), len(self.utterances), 3)

    @cached_property
    def words(self) -> np.ndarray:
        """(utterances,): reference words."""
        return np.array([utterance.words.words for utterance in self.utterances])


@config
class Part:
    """Errors of both systems in a part of the test set; means over the seeds where there are several."""

    name: str
    words: Count
    baseline_errors: float
    errors: float

    @property
    def change(self) -> float:
        return self.errors - self.baseline_errors


@config
class Equivalence:
    """Whether two systems are the same within ``margin``: two one-sided tests, and the 90 % interval they look at."""

    margin: float
    interval_90: tuple[float, float]
    p: float
    shown: bool


@config
class Comparison:
    """A system against the baseline. Rates are fractions; differences are the system's less the baseline's.

    by, groups: what was resampled for the interval, and how many of them there are.
    interval_95, p_bootstrap: by paired bootstrap. p_mapsswe, segments: None where there are several seeds.
    p_holm: ``p_value``, corrected for the number of systems compared.
    significant: p_holm is below 0.05, and the interval leaves out 0.
    wins, losses, ties: utterances with fewer, more, as many errors.
    substitutions, insertions, deletions: change, over all reference words.
    """

    system: str
    baseline: str
    seeds: Count
    baseline_seeds: Count
    utterances: Count
    words: Count
    wer: float
    baseline_wer: float
    difference: float
    by: Unit
    groups: Count
    interval_95: tuple[float, float]
    p_bootstrap: float
    p_mapsswe: float | None
    segments: Count | None
    p_holm: float
    significant: bool
    equivalence: Equivalence | None
    wins: Count
    losses: Count
    ties: Count
    substitutions: float
    insertions: float
    deletions: float
    speakers: list[Part]
    languages: list[Part]
    lengths: list[Part]
    improved_words: list[Part]
    worsened_words: list[Part]
    improved_utterances: list[Part]
    worsened_utterances: list[Part]

    @property
    def p_value(self) -> float:
        """The one that decides: MAPSSWE's, or with several seeds that of the bootstrap."""
        return self.p_bootstrap if self.p_mapsswe is None else self.p_mapsswe


def group_of(utterance: Scored, by: Unit) -> str:
    """The speaker, language or id of an utterance; empty where it is unknown."""
    return {"speaker": utterance.speaker, "utterance": utterance.cut_id, "language": utterance.language}[by]


def default_unit(utterances: Sequence[Scored]) -> Unit:
    """speaker where all are known and there are several, because one speaker's utterances are alike; else utterance."""
    unknown = any(not utterance.speaker for utterance in utterances)
    speakers = {utterance.speaker for utterance in utterances if utterance.words.words}
    return "speaker" if len(speakers) > 1 and not unknown else "utterance"


def check_groups(utterances: Sequence[Scored], by: Unit) -> None:
    """Refuse to draw groups that are unknown, or fewer than two.

    Raises:
        UserError: what is missing.
    """
    groups = {group_of(utterance, by) for utterance in utterances if utterance.words.words}
    if by != "utterance" and any(not group_of(utterance, by) for utterance in utterances):
        raise UserError(
            f"--by {by}: not every utterance names its {by}; evaluate a manifest that does, or take another"
        )
    if len(groups) < 2:
        raise UserError(f"--by {by}: the test set has {len(groups)} with words, and chance needs at least 2 to show")


def reference_differences(one: Sequence[Scored], other: Sequence[Scored]) -> list[str]:
    """What differs between the references of two evaluations, a line for each cut."""
    first, second = ({utterance.cut_id: utterance.ref for utterance in side} for side in (one, other))
    lines = []
    for cut_id in {**first, **second}:
        if cut_id not in second:
            lines.append(f"cut {cut_id} is only in the first")
        elif cut_id not in first:
            lines.append(f"cut {cut_id} is only in the second")
        elif first[cut_id] != second[cut_id]:
            lines.append(f"cut {cut_id}: {first[cut_id]!r} and {second[cut_id]!r}")
    return lines


def compare(
    baseline: System, systems: Sequence[System], by: Unit | None = None, margin: float | None = None
) -> list[Comparison]:
    """Each of ``systems`` against ``baseline``; p-values are corrected for their number.

    All of them have the same utterances in the same order.

    Args:
        by: what is resampled for the interval; None is ``default_unit``.
        margin: test for equivalence within this difference of rates.

    Raises:
        UserError: fewer than two groups have words, or they are not known.
    """
    unit = by or default_unit(baseline.utterances)
    check_groups(baseline.utterances, unit)
    return corrected([_compare(baseline, system, unit, margin) for system in systems])


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with their p-values corrected for their number, and what is significant by these."""
    corrected_p_values = holm([row.p_value for row in comparisons])
    return [
        replace(row, p_holm=p, significant=p < LEVEL and not row.interval_95[0] <= 0 <= row.interval_95[1])
        for row, p in zip(comparisons, corrected_p_values, strict=True)
    ]


def _compare(baseline: System, system: System, by: Unit, margin: float | None) -> Comparison:
    utterances, words = baseline.utterances, baseline.words
    groups, index = np.unique([group_of(utterance, by) for utterance in utterances], return_inverse=True)
    estimate = paired_bootstrap(
        _grouped(baseline.errors.sum(2), index, len(groups)),
        _grouped(system.errors.sum(2), index, len(groups)),
        _grouped(words[None], index, len(groups))[0],
    )
    before, after = baseline.errors.mean(0), system.errors.mean(0)  # (utterances, 3)
    changes = (after - before).sum(1)
    kinds = (after - before).sum(0) / words.sum()
    single = len(baseline.seeds) == len(system.seeds) == 1
    segments = mapsswe(_segment_differences(utterances, system.utterances)) if single else None

    def parts(name: Callable[[Scored], str]) -> list[Part]:
        return _parts([name(utterance) for utterance in utterances], words, before.sum(1), after.sum(1))

    by_word = _word_parts(baseline, system)
    by_utterance = parts(lambda utterance: utterance.cut_id)
    return Comparison(
        system=system.name,
        baseline=baseline.name,
        seeds=len(system.seeds),
        baseline_seeds=len(baseline.seeds),
        utterances=len(utterances),
        words=int(words.sum()),
        wer=float(after.sum() / words.sum()),
        baseline_wer=float(before.sum() / words.sum()),
        difference=estimate.difference,
        by=by,
        groups=len(groups),
        interval_95=estimate.interval(),
        p_bootstrap=estimate.p_value,
        p_mapsswe=None if segments is None else segments.p_value,
        segments=None if segments is None else segments.segments,
        p_holm=1.0,
        significant=False,
        equivalence=None if margin is None else _equivalence(estimate, margin),
        wins=int((changes < 0).sum()),
        losses=int((changes > 0).sum()),
        ties=int((changes == 0).sum()),
        substitutions=float(kinds[0]),
        insertions=float(kinds[1]),
        deletions=float(kinds[2]),
        speakers=parts(lambda utterance: utterance.speaker),
        languages=parts(lambda utterance: utterance.language),
        lengths=sorted(parts(length_of), key=lambda part: LENGTHS.index(part.name)),
        improved_words=_most(by_word, -1),
        worsened_words=_most(by_word, 1),
        improved_utterances=_most(by_utterance, -1),
        worsened_utterances=_most(by_utterance, 1),
    )


def _grouped(values: np.ndarray, index: np.ndarray, groups: int) -> np.ndarray:
    """(rows, utterances) to (rows, groups): sums."""
    return np.stack([np.bincount(index, weights=row, minlength=groups) for row in values])


def _equivalence(estimate: Estimate, margin: float) -> Equivalence:
    p = estimate.equivalence_p_value(margin)
    return Equivalence(margin=margin, interval_90=estimate.interval(0.9), p=p, shown=p < LEVEL)


def _segment_differences(first: Sequence[Scored], second: Sequence[Scored]) -> np.ndarray:
    """(segments,) integers: errors of the second less those of the first."""
    differences = [
        errors - baseline_errors
        for one, other in zip(first, second, strict=True)
        for baseline_errors, errors in segment_errors(error_spans(one.pairs), error_spans(other.pairs))
    ]
    return np.array(differences, dtype=np.int64)


def error_spans(pairs: Pairs) -> list[tuple[int, int]]:
    """The reference words that each error of an alignment covers: (i, i + 1) of word i, (i, i) of an insertion before it."""
    spans, position = [], 0
    for ref, hyp in pairs:
        stop = position + (ref != NOTHING)
        if ref != hyp:
            spans.append((position, stop))
        position = stop
    return spans


def _parts(names: Sequence[str], words: np.ndarray, before: np.ndarray, after: np.ndarray) -> list[Part]:
    """The parts by their names, in the order of these; none where no name is known."""
    unique, index = np.unique(names, return_inverse=True)
    if list(unique) == [""]:
        return []
    totals = _grouped(np.stack([words, before, after]), index, len(unique))
    return [
        Part(name=str(name), words=int(count), baseline_errors=float(old), errors=float(new))
        for name, count, old, new in zip(unique, *totals, strict=True)
    ]


def length_of(utterance: Scored) -> str:
    """Its number of reference words, as one of ``LENGTHS``."""
    limits = (0, 5, 10, 20)  # the most words of each length but the last
    return LENGTHS[sum(utterance.words.words > limit for limit in limits)]


def _word_parts(baseline: System, system: System) -> list[Part]:
    """How often each reference word was missed (substituted or deleted); a word that was inserted has a + before it."""
    occurrences = Counter(word for utterance in baseline.utterances for word in utterance.ref.split())
    before, after = _word_errors(baseline), _word_errors(system)
    return [
        Part(name=word, words=occurrences[word], baseline_errors=before.get(word, 0.0), errors=after.get(word, 0.0))
        for word in sorted({**before, **after})
    ]


def _word_errors(system: System) -> dict[str, float]:
    """Errors by word, as ``_word_parts`` names them; the mean over the seeds."""
    errors = Counter(
        ref if ref != NOTHING else f"+{hyp}"
        for seed in system.seeds
        for utterance in seed
        for ref, hyp in utterance.pairs
        if ref != hyp
    )
    return {word: count / len(system.seeds) for word, count in errors.items()}


def _most(parts: Sequence[Part], sign: int) -> list[Part]:
    """The parts that changed most, for the worse (1) or the better (-1)."""
    changed = [part for part in parts if sign * part.change > 0]
    return sorted(changed, key=lambda part: (-sign * part.change, part.name))[:LISTED]
