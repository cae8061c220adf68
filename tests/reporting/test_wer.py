"""Error counts against a textbook edit distance, and the files a person reads."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrkit.reporting.wer import (
    ErrorCounts,
    Scored,
    by_language,
    confidence_interval,
    confusions,
    format_alignment,
    format_confusions,
    total_chars,
    total_words,
)

words = st.lists(st.sampled_from(["a", "b", "c", "ab", "*", "é"]), max_size=8)


def textbook_distance(ref: list[str], hyp: list[str]) -> int:
    table = [[i + j if i * j == 0 else 0 for j in range(len(hyp) + 1)] for i in range(len(ref) + 1)]
    for i in range(1, len(ref) + 1):
        for j in range(1, len(hyp) + 1):
            changed = table[i - 1][j - 1] + (ref[i - 1] != hyp[j - 1])
            table[i][j] = min(changed, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


@given(words, words)
def test_words_match_the_textbook(ref: list[str], hyp: list[str]) -> None:
    scored = Scored("id", " ".join(ref), " ".join(hyp))
    assert scored.words.errors == textbook_distance(ref, hyp)
    assert scored.words.words == len(ref)
    assert len(ref) - scored.words.deletions == len(hyp) - scored.words.insertions
    assert [r for r, _ in scored.pairs if r] == ref and [h for _, h in scored.pairs if h] == hyp
    assert scored.words.errors == sum(sum(c.values()) for c in vars(confusions([scored])).values())


@given(words, words)
def test_characters_match_the_textbook(ref: list[str], hyp: list[str]) -> None:
    scored = Scored("id", "  ".join(ref), " ".join(hyp))  # white space is one space however it is written
    assert scored.chars.errors == textbook_distance(list(" ".join(ref)), list(" ".join(hyp)))
    assert scored.chars.words == len(" ".join(ref))


def test_micro_average_and_languages() -> None:
    scored = [
        Scored("1", "one two three four", "one two three", "en"),
        Scored("2", "oui", "non", "fr"),
        Scored("3", "five", "five six", "en"),
    ]
    assert total_words(scored) == ErrorCounts(6, 1, 1, 1)
    assert total_words(scored).rate == 0.5
    assert {language: total_words(part).rate for language, part in by_language(scored).items()} == {
        "en": 0.4,
        "fr": 1,
    }
    assert total_chars(scored).words == 18 + 3 + 4


def test_rates_without_reference_words() -> None:
    assert ErrorCounts().rate == 0.0
    assert math.isinf(Scored("1", "", "noise").words.rate)


def test_alignment_is_in_columns() -> None:
    scored = Scored("cut-1", "the cat sat on 日本 mat", "the bat sat upon a 日本", "en")
    heading, ref, hyp, marks = format_alignment(scored).splitlines()
    assert heading == "cut-1 [en]: 66.67 % of 6 words (2 sub, 1 ins, 1 del)"
    assert ref == "ref: the cat sat on   * 日本 mat"
    assert hyp == "hyp: the bat sat upon a 日本 ***"
    # A wide character takes two columns on the screen and one in the string.
    assert marks == "         S       S    I      D"


def test_alignment_without_errors_or_words() -> None:
    assert format_alignment(Scored("x", "same", "same")).splitlines()[1:] == ["ref: same", "hyp: same"]
    assert format_alignment(Scored("x", "", "")).splitlines()[1:] == ["ref:", "hyp:"]


def test_confusions_are_sorted_by_count() -> None:
    scored = [Scored(str(i), "a b", hyp) for i, hyp in enumerate(["a c", "a c", "a d", "a", "a b e"])]
    text = format_confusions(confusions(scored))
    assert text.splitlines() == [
        "substitutions: 3", "      2  b -> c", "      1  b -> d", "",
        "insertions: 1", "      1  e", "",
        "deletions: 1", "      1  b",
    ]  # fmt: skip


def test_interval_holds_the_rate_and_repeats() -> None:
    scored = [Scored(str(i), "a b c d", "a b c" + " d" * (i % 3 > 0)) for i in range(60)]
    low, high = confidence_interval(scored) or (1.0, 0.0)
    assert low < total_words(scored).rate < high
    assert confidence_interval(scored) == pytest.approx((low, high))
    assert confidence_interval(scored[:1]) is None
