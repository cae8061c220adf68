"""Modified Kneser-Ney smoothing, interpolated, by array operations.

Source: Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", section 3 and equations 20 to 26;
where they leave it open, as KenLM does (Heafield et al. 2013): n-grams that begin with <s> keep their counts, unigrams are
interpolated with equal probabilities of all words, <unk> and </s>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asrkit.models.ngram.arpa import BEGIN, END, NEVER, UNKNOWN, Arpa, Section

DEGENERATE = np.array([0.0, 0.5, 1.0, 1.5])  # KenLM's --discount_fallback, for counts that give no discounts
BEGIN_ID, END_ID, UNKNOWN_ID, FIRST_ID = 0, 1, 2, 3


@dataclass(frozen=True)
class _Table:
    """The n-grams of one order that occur, G of them; ``history`` and ``suffix`` are rows of the order below: all but the last
    word, and all but the first."""

    last: np.ndarray
    history: np.ndarray
    suffix: np.ndarray
    counts: np.ndarray
    begins: np.ndarray  # whether the first word is <s>


def estimate(
    sentences: Sequence[np.ndarray], words: Sequence[str], order: int, cutoffs: Sequence[int] = ()
) -> tuple[Arpa, list[str]]:
    """The model of sentences, each an array of indices into ``words``, -1 for one that is not among them.

    Args:
        words: the vocabulary; those that never occur have the probability of an unseen word.
        cutoffs: by order from 1 on, the count up to which an n-gram is left out; they must not decrease, and the last one
            counts for higher orders. Its probability goes to the back-off. Words are never left out.

    Returns:
        The model, and a line for each order whose counts are too few or too even for discounts of its own: it gets 0.5, 1, 1.5.
    """
    stream = _stream(sentences)
    tables = _count(stream, len(words) + FIRST_ID, order)
    limits = [0, *(cutoffs[min(n, len(cutoffs)) - 1] if cutoffs else 0 for n in range(2, order + 1))]
    notes: list[str] = []
    sections: list[Section] = []
    below = np.zeros(0)  # probabilities of the order below, by row
    kept_below = np.zeros(0, dtype=np.int64)  # its row in the model, by row
    for n, table in enumerate(tables, start=1):
        adjusted = _adjusted(table, tables[n] if n < order else None)
        discounts = _discounts(adjusted)
        if discounts is None:
            discounts = DEGENERATE
            notes.append(f"the {n}-grams are too few or too regular to estimate discounts; they get 0.5, 1 and 1.5")
        rest = adjusted - discounts[np.minimum(adjusted, 3)]
        kept = table.counts > limits[n - 1]
        if n == 1:
            total = adjusted.sum()
            missing = 1.0 - rest.sum() / total
            below = rest / total + missing / (len(adjusted) - 1)  # <s> is never predicted
            log_probs = np.log(below)
            log_probs[BEGIN_ID] = NEVER * np.log(10)
            kept[:] = True
            rows = np.arange(len(adjusted), dtype=np.int32)[:, None]
        else:
            size = len(below)
            totals = np.bincount(table.history, adjusted, size)
            passed = np.bincount(table.history[kept], rest[kept], size)
            with np.errstate(invalid="ignore", divide="ignore"):
                backoffs = 1.0 - passed / totals
            followed = (
                np.bincount(table.history[kept], minlength=size) > 0
            )  # only what is kept is, as cutoffs never decrease
            below = rest / totals[table.history] + backoffs[table.history] * below[table.suffix]
            log_probs = np.log(below[kept])
            sections[-1].backoffs[kept_below[followed]] = np.log(backoffs[followed])
            rows = np.column_stack(
                [sections[-1].words[kept_below[table.history[kept]]], table.last[kept].astype(np.int32)]
            )
        kept_below = np.where(kept, np.cumsum(kept) - 1, -1)
        sections.append(Section(rows, log_probs, np.zeros(len(rows))))
    return Arpa([BEGIN, END, UNKNOWN, *words], sections), notes


def _stream(sentences: Sequence[np.ndarray]) -> np.ndarray:
    """All sentences in a row, each from <s> to </s>, as the model's indices."""
    parts: list[np.ndarray] = []
    for sentence in sentences:
        shifted = np.where(sentence < 0, UNKNOWN_ID, sentence + FIRST_ID)
        parts += [np.array([BEGIN_ID]), shifted, np.array([END_ID])]
    return np.concatenate(parts).astype(np.int64)


def _count(stream: np.ndarray, num_words: int, order: int) -> list[_Table]:
    """The n-grams of each order. Each position of the stream has the number of the n-gram that ends there, -1 for none; those of
    order n + 1 are numbered by (the n-gram that ends one earlier, the word)."""
    begins_here = stream == BEGIN_ID
    ends = stream.copy()  # the unigram that ends at each position
    counts = np.bincount(stream, minlength=num_words)
    every = np.arange(num_words)
    nothing = np.zeros(num_words, dtype=np.int64)
    tables = [_Table(every, nothing, nothing, counts, every == BEGIN_ID)]
    for _ in range(1, order):
        before = np.concatenate([[-1], ends[:-1]])
        valid = (before >= 0) & ~begins_here
        keys = before[valid] * num_words + stream[valid]
        unique, first, numbers, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        history = unique // num_words
        longer = np.full_like(ends, -1)
        longer[valid] = numbers
        tables.append(_Table(unique % num_words, history, ends[valid][first], counts, tables[-1].begins[history]))
        ends = longer
    return tables


def _adjusted(table: _Table, above: _Table | None) -> np.ndarray:
    """The counts that Kneser-Ney smoothing takes: at the highest order how often an n-gram occurs; below, how many words it
    occurs after, but for those that begin a sentence. That of the unigram <s>, which is never predicted, is 0."""
    if above is None:
        adjusted = table.counts.copy()
    else:
        adjusted = np.where(table.begins, table.counts, np.bincount(above.suffix, minlength=len(table.counts)))
    adjusted[table.begins & (table.last == BEGIN_ID)] = 0
    return adjusted


def _discounts(adjusted: np.ndarray) -> np.ndarray | None:
    """What is taken from counts of 0, 1, 2, and 3 or more, (4,); None where the counts of counts give none."""
    n1, n2, n3, n4 = (int((adjusted == count).sum()) for count in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return None
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    fits = (discounts[1:] > 0).all() and (discounts[1:] <= np.array([1, 2, 3])).all()
    return discounts if fits else None
