"""Word and character errors: counts, alignments a person can read, confusions.

Rates are micro-averaged: errors of all utterances over reference words of all utterances. Words are what
white space separates. Characters include one space between words, so a wrong word boundary is an error too.
Texts are compared as they are, without folding case or dropping punctuation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rich.cells import cell_len

NOTHING = ""  # stands for the missing side of an insertion or deletion: no word and no character is empty

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class ErrorCounts:
    """Errors against ``words`` reference words (or characters, where those are counted); can be added."""

    words: int = 0
    substitutions: int = 0
    insertions: int = 0
    deletions: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per reference word; infinite where there are only insertions."""
        if self.words == 0:
            return float("inf") if self.errors else 0.0
        return self.errors / self.words

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.words + other.words,
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
        )


def align(ref: Sequence[str], hyp: Sequence[str]) -> Pairs:
    """Pair the symbols of two sequences with the fewest errors; the missing side of a pair is ``NOTHING``."""
    from kaldialign import align as kaldi_align

    return kaldi_align(ref, hyp, NOTHING)


def count(pairs: Pairs) -> ErrorCounts:
    """The errors of an alignment."""
    insertions = sum(ref == NOTHING for ref, _ in pairs)
    deletions = sum(hyp == NOTHING for _, hyp in pairs)
    different = sum(ref != hyp for ref, hyp in pairs)
    return ErrorCounts(len(pairs) - insertions, different - insertions - deletions, insertions, deletions)


@dataclass(frozen=True)
class Scored:
    """One utterance's reference and hypothesis, aligned.

    Where these are known: ``pieces`` and ``frames``, each emitted word piece and its encoder frame; ``late_ms``, how late each
    rightly recognized word was known; ``confidence``, of each recognized word.
    """

    cut_id: str
    ref: str
    hyp: str
    language: str = ""
    speaker: str = ""
    pieces: tuple[str, ...] = ()
    frames: tuple[int, ...] = ()
    late_ms: tuple[float, ...] = ()
    confidence: tuple[float, ...] = ()

    @cached_property
    def pairs(self) -> Pairs:
        return align(self.ref.split(), self.hyp.split())

    @cached_property
    def words(self) -> ErrorCounts:
        return count(self.pairs)

    @cached_property
    def chars(self) -> ErrorCounts:
        return count(align(list(" ".join(self.ref.split())), list(" ".join(self.hyp.split()))))


def total_words(utterances: Iterable[Scored]) -> ErrorCounts:
    """Word errors of all utterances together."""
    return sum((utterance.words for utterance in utterances), ErrorCounts())


def total_chars(utterances: Iterable[Scored]) -> ErrorCounts:
    """Character errors of all utterances together."""
    return sum((utterance.chars for utterance in utterances), ErrorCounts())


def by_language(utterances: Iterable[Scored]) -> dict[str, list[Scored]]:
    """Utterances of each language, languages in alphabetical order."""
    groups: dict[str, list[Scored]] = {}
    for utterance in utterances:
        groups.setdefault(utterance.language, []).append(utterance)
    return dict(sorted(groups.items()))


def confidence_interval(utterances: Sequence[Scored]) -> tuple[float, float] | None:
    """95 % interval of the word error rate over utterances drawn with replacement (Bisani and Ney, 2004).

    It covers the choice of test utterances, not of the training seed. None where fewer than two have reference words.
    """
    from kaldialign import bootstrap_wer_ci

    if sum(utterance.words.words > 0 for utterance in utterances) < 2:
        return None
    refs, hyps = [u.ref.split() for u in utterances], [u.hyp.split() for u in utterances]
    interval = bootstrap_wer_ci(refs, hyps, replications=1000, seed=0)
    low, high = float(interval["ci95min"]), float(interval["ci95max"])
    if not math.isfinite(high):  # so few have words that a draw was without any
        return None
    # It is the mean and 1.96 deviations of the draws, which near 0 reaches below it.
    return max(0.0, low), high


@dataclass
class Confusions:
    """How often which word was taken for which, was invented, or was lost."""

    substitutions: Counter[tuple[str, str]] = field(default_factory=Counter)
    insertions: Counter[str] = field(default_factory=Counter)
    deletions: Counter[str] = field(default_factory=Counter)


def confusions(utterances: Iterable[Scored]) -> Confusions:
    """Count the word errors of all utterances by what was confused."""
    confused = Confusions()
    for utterance in utterances:
        for ref, hyp in utterance.pairs:
            if ref == hyp:
                continue
            if ref == NOTHING:
                confused.insertions[hyp] += 1
            elif hyp == NOTHING:
                confused.deletions[ref] += 1
            else:
                confused.substitutions[ref, hyp] += 1
    return confused


def _mark(ref: str, hyp: str) -> str:
    if ref == hyp:
        return ""
    return "I" if ref == NOTHING else "D" if hyp == NOTHING else "S"


def format_summary(counts: ErrorCounts, unit: str = "words") -> str:
    """One line for a person: ``12.50 % of 8 words (1 sub, 0 ins, 0 del)``, or ``no words (0 sub, 2 ins, 0 del)``."""
    kinds = f"{counts.substitutions} sub, {counts.insertions} ins, {counts.deletions} del"
    rate = f"{100 * counts.rate:.2f} % of {counts.words}" if counts.words else "no"
    return f"{rate} {unit} ({kinds})"


def format_alignment(utterance: Scored) -> str:
    """Four lines: a heading, reference and hypothesis in columns, and S, I or D under each error."""
    columns: list[tuple[str, str, str]] = []
    for ref, hyp in utterance.pairs:
        width = max(cell_len(ref), cell_len(hyp), 1)
        # A missing word shows as stars as wide as the word it lacks.
        shown = [word or "*" * width for word in (ref, hyp)] + [_mark(ref, hyp)]
        columns.append(tuple(text + " " * (width - cell_len(text)) for text in shown))  # type: ignore[arg-type]
    rows = [" ".join(cells).rstrip() for cells in zip(*columns, strict=True)] or ["", "", ""]
    heading = utterance.cut_id + (f" [{utterance.language}]" if utterance.language else "")
    lines = [f"{heading}: {format_summary(utterance.words)}"]
    lines += [f"{name} {row}".rstrip() for name, row in zip(("ref:", "hyp:", "    "), rows, strict=True)]
    return "\n".join(lines if utterance.words.errors else lines[:3]) + "\n"


def format_confusions(confused: Confusions) -> str:
    """All confusions, most frequent first, one a line: count, reference, recognized word."""
    sections = [
        ("substitutions", [(n, f"{ref} -> {hyp}") for (ref, hyp), n in confused.substitutions.items()]),
        ("insertions", [(n, word) for word, n in confused.insertions.items()]),
        ("deletions", [(n, word) for word, n in confused.deletions.items()]),
    ]
    lines = []
    for title, entries in sections:
        lines.append(f"{title}: {sum(n for n, _ in entries)}")
        lines += [f"{n:7d}  {text}" for n, text in sorted(entries, key=lambda entry: (-entry[0], entry[1]))]
        lines.append("")
    return "\n".join(lines)
