"""The texts that a tokenizer is trained on: all of a manifest, or of a large one a sample that has every character."""

from __future__ import annotations

from functools import partial

from asrkit.data.cut_table import CutTable, spread
from asrkit.data.parallel import ALONE, every_core, in_processes

PART, MANY_PARTS = 2000, 25  # texts that are looked through at a time; from so many parts on by all cores


def tokenizer_texts(table: CutTable, most: int | None) -> list[str]:
    """At most ``most`` texts of a table, evenly spread, and the first of the others with each character that these lack.

    So a tokenizer trained on them spells all texts. None takes all.
    """
    if most is None or len(table) <= most:
        return [table.text_of(row) for row in range(len(table))]
    rows = spread(len(table), most)
    texts = [table.text_of(row) for row in rows.tolist()]
    known = frozenset("".join(texts))
    parts = [range(begin, min(begin + PART, len(table))) for begin in range(0, len(table), PART)]
    workers = every_core() if len(parts) >= MANY_PARTS else ALONE
    for others in in_processes(partial(_with_new_characters, table, known), parts, workers):
        for text in others:
            if not known.issuperset(text):
                known |= set(text)
                texts.append(text)
    return texts


def _with_new_characters(table: CutTable, known: frozenset[str], rows: range) -> list[str]:
    """The texts of some rows that have a character which neither ``known`` nor the ones before have."""
    texts = []
    for row in rows:
        if not known.issuperset(text := table.text_of(row)):
            known |= set(text)
            texts.append(text)
    return texts
