"""Which labels are trained on, and the file that keeps what was recognized."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrkit.decoding.external.interface import Transcription
from asrkit.errors import UserError
from asrkit.methods.labeling import Filters, Label, errors_of, make_label, most_repeated, open_progress, thresholds
from asrkit.reporting.wer import ErrorCounts


def by(
    text: str, confidence: float | None = 0.9, language: str = "en", no_speech: float | None = None
) -> Transcription:
    return Transcription(text, confidence, language, no_speech)


@pytest.mark.parametrize(
    ("texts", "seconds", "reason", "detail"),
    [
        ([by("Please hold the line.")], 2.0, "", ""),
        ([by("Please hold the line.", None)], 2.0, "", ""),
        ([by("Please hold the line.", 0.59)], 2.0, "confidence", "0.59 < 0.6"),
        ([by("Thank you.", 0.3, no_speech=0.9)], 2.0, "no speech", "0.90"),
        ([by("Thank you.", 0.8, no_speech=0.9)], 2.0, "", ""),
        ([by("It was 1984.")], 2.0, "number with several readings", "1984"),
        ([by("[Music]")], 2.0, "non-speech", "Music"),
        ([by("...")], 2.0, "no words", "..."),
        ([by("Please hold the line.")], 0.5, "rate", "40.0 characters per second > 25"),
        ([by("no no no no")], 2.0, "repeats", "'no' 4 times"),
        ([by("so we go so we go so we go so we go")], 9.0, "repeats", "'so we go' 4 times"),
        ([by("please hold the line"), by("Please hold a line!", 0.1)], 2.0, "", ""),
        ([by("please hold the line"), by("please fold a line")], 2.0, "disagreement", "0.50 > 0.3: please fold a line"),
        ([by("please hold the line"), by("1984")], 2.0, "disagreement", "1.00"),
    ],
)  # fmt: skip
def test_filters(texts: Sequence[Transcription], seconds: float, reason: str, detail: str) -> None:
    made = make_label(texts, seconds, Filters())
    assert made.reason == reason and detail in made.detail
    if len(texts) == 2:
        assert made.disagreement is not None


def repeated_slowly(words: list[str]) -> int:
    """How often in a row any words come, looked for at every position."""
    best = min(1, len(words))
    for size in range(1, 9):
        for begin in range(len(words)):
            times, part = 0, words[begin : begin + size]
            while len(part) == size and words[begin + times * size : begin + (times + 1) * size] == part:
                times += 1
            best = max(best, times)
    return best


@given(st.lists(st.sampled_from("ab"), max_size=12))
def test_repeats_are_those_of_a_slow_search(words: list[str]) -> None:
    repeated, times = most_repeated(words)
    assert times == repeated_slowly(words)
    assert not words or " ".join([repeated] * times) in " ".join(words)


def test_thresholds() -> None:
    rows = thresholds([(0.95, ErrorCounts(6, 1)), (0.55, ErrorCounts(4, 0, 0, 4))])
    assert [(row.confidence, row.share, row.errors.rate) for row in rows if row.confidence in (0.5, 0.6)] == [
        (0.5, 1.0, 0.5),
        (0.6, 0.6, pytest.approx(1 / 6)),
    ]
    assert thresholds([]) == []


def test_a_label_is_held_against_the_words_of_the_text() -> None:
    label = Label("hello world", "en", 0.9, None)
    assert errors_of(label, "Hello, World.", "en") == ErrorCounts(2)
    assert errors_of(label, "Hello, World 1984.", "en").errors == 1  # a number that cannot be spelled is a word


INPUTS: dict[str, Any] = {"manifest": "a", "recognizers": [["b", "beam", 5]]}


def test_what_was_recognized_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "x.texts.jsonl"
    with open_progress(path, INPUTS) as progress:
        progress.plan("one", [(0.0, 1.5), (2.0, 3.25)])
        progress.add({("one", 0.0): [by("Hé.")], ("one", 2.0): [by("b", None), by("c", 0.5, "", 0.25)]})
        progress.plan("two", [])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "three", "pie')  # killed in the middle of a line
    with open_progress(path, INPUTS) as again:
        assert again.planned == {"one": [(0.0, 1.5), (2.0, 3.25)], "two": []} == progress.planned
        assert again.texts == progress.texts
        again.plan("three", [(0.0, 1.0)])
        with pytest.raises(UserError, match="another process is labeling there"), open_progress(path, INPUTS):
            pass
    assert path.read_bytes().startswith(whole) and json.loads(path.read_bytes().splitlines()[-1])["id"] == "three"
    with (
        pytest.raises(UserError, match=r"another labeling \(manifest: a -> b\)"),
        open_progress(path, INPUTS | {"manifest": "b"}),
    ):
        pass


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[]", "3", '{"id": "x", "pieces": "y"}', '{"id": "x", "begin": -1, "texts": []}', '{"id": "x", "pieces": [[1]]}',
     '{"id": "x", "begin": 0, "texts": []}', '{"id": "x", "pieces": [[2, 2]]}',
     '{"id": "x", "begin": 0, "texts": [{"text": "y", "confidence": 7, "language": ""}]}', "[" * 5000],
)  # fmt: skip
def test_damaged_lines_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.texts.jsonl"
    with open_progress(path, INPUTS):
        pass
    path.write_text(path.read_text() + line + "\n")
    with (
        pytest.raises(UserError, match=r"x\.texts\.jsonl:2: is not a line that asrkit label wrote"),
        open_progress(path, INPUTS),
    ):
        pass


def test_a_header_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.texts.jsonl"
    path.write_text('{"other": 1}\n')
    with pytest.raises(UserError, match=":1: is not a line"), open_progress(path, INPUTS):
        pass
    path.write_text('{"format": 1')  # killed while its first line was written
    with open_progress(path, INPUTS) as progress:
        assert progress.planned == {}
