"""The utterances of a test set as the page's script reads them, and the errors by word, speaker, language and length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lhotse.cut import Cut

from asrkit.frames import encoder_center
from asrkit.reporting.compare import LENGTHS, length_of
from asrkit.reporting.page.sounds import file_of, said_words
from asrkit.reporting.page.systems import Measured, TestSet
from asrkit.reporting.wer import NOTHING, Pairs, Scored, confusions

MOST_UTTERANCES = 5000  # on the page; those with most errors
MOST_CONFUSIONS = 30


def for_script(tests: TestSet, cuts: Mapping[str, Cut], embedded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A test set as plain data. An utterance's ``hyps`` has for each system what ``encode`` gives."""
    errors = np.array([system.errors for system in tests.systems])  # (systems, utterances)
    count = errors.shape[1]
    kept = sorted(np.argsort(-errors.sum(0), kind="stable")[:MOST_UTTERANCES].tolist())
    return {
        "name": tests.name,
        "left_out": count - len(kept),
        "systems": [{"label": one.label, "main": one.main} for one in tests.systems],
        "utterances": [_utterance(index, tests, cuts, embedded) for index in kept],
    }


def _utterance(
    index: int, tests: TestSet, cuts: Mapping[str, Cut], embedded: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    first = tests.systems[0].system.utterances[index]
    cut = cuts.get(first.cut_id)
    row: dict[str, Any] = {
        "id": first.cut_id,
        "language": first.language,
        "speaker": first.speaker,
        "ref": first.ref.split(),
        "hyps": [encode(one.system.utterances[index].pairs) for one in tests.systems],
        "errors": [one.system.utterances[index].words.errors for one in tests.systems],
    }
    late = [_mean(one.system.utterances[index].late_ms) for one in tests.systems]
    if any(value is not None for value in late):
        row["late"] = late
    if cut is not None:
        row |= {"seconds": round(cut.duration, 3), **file_of(cut)}
    if cut is not None and first.cut_id in embedded:
        row |= embedded[first.cut_id]
        row["said"] = said_words(cut)
        row["emitted"] = [emitted(one.system.utterances[index]) for one in tests.systems]
    return row


def encode(pairs: Pairs) -> list[Any]:
    """An alignment beside its reference words: 1 where the word was recognized, 0 where it was lost, another word in its place;
    [word] is one too many."""
    return [[hyp] if ref == NOTHING else 0 if hyp == NOTHING else 1 if ref == hyp else hyp for ref, hyp in pairs]


def emitted(utterance: Scored) -> list[tuple[str, float]]:
    """The word pieces of a hypothesis and the second that the encoder frame that emitted each stands for."""
    times = [round(float(encoder_center(frame)), 3) for frame in utterance.frames]
    return list(zip(utterance.pieces, times, strict=False))


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 1) if values else None


def confusion_tables(one: Measured) -> list[tuple[str, list[tuple[str, str, int]]]]:
    """Of a system: what was taken for what, what was lost, what was invented, as (word, recognized, times), most frequent first."""
    found = confusions(one.system.utterances)
    substituted = [(ref, hyp, times) for (ref, hyp), times in _most(found.substitutions)]
    return [
        ("taken for another", substituted),
        ("lost", [(word, "", times) for word, times in _most(found.deletions)]),
        ("too many", [("", word, times) for word, times in _most(found.insertions)]),
    ]


def _most(counts: Counter[Any]) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_CONFUSIONS]


def group_tables(systems: Sequence[Measured]) -> list[tuple[str, list[tuple[str, int, list[float | None]]]]]:
    """(what, rows of (name, reference words, WER of each system)), for lengths, and for speakers and languages where there are several."""
    kinds: list[tuple[str, Callable[[Scored], str]]] = [
        ("length", length_of),
        ("speaker", lambda utterance: utterance.speaker),
        ("language", lambda utterance: utterance.language),
    ]
    tables = []
    for kind, name in kinds:
        found = {name(utterance) for utterance in systems[0].system.utterances} if systems else set()
        names = sorted(found, key=lambda one: (LENGTHS.index(one) if one in LENGTHS else 0, one))
        if len(names) > 1:
            tables.append((f"by {kind}", [_group(systems, name, group) for group in names]))
    return tables


def _group(
    systems: Sequence[Measured], name: Callable[[Scored], str], group: str
) -> tuple[str, int, list[float | None]]:
    members = [[utterance for utterance in one.system.utterances if name(utterance) == group] for one in systems]
    words = sum(utterance.words.words for utterance in members[0])
    rates = [sum(utterance.words.errors for utterance in own) / words if words else None for own in members]
    return group or "unknown", words, rates
