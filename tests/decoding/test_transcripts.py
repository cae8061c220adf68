"""What is printed and written of recordings, read back by other programs' rules."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pysubs2
import pytest

from asrkit.decoding.nbest import Alternative, PieceTexts
from asrkit.decoding.transcripts import (
    FORMATS,
    LINE,
    LINES,
    LONGEST,
    Transcript,
    cues_of,
    render,
    write_transcript,
)
from asrkit.decoding.words import Word

STRANGE = ["the", "quick", "{brown}", "fox", "&", "<the>", "lazy", "dog"]


def words_of(texts: list[str], step: float = 0.5, confidence: float | None = 0.25) -> list[Word]:
    return [Word(text, n * step, n * step + 0.3, confidence) for n, text in enumerate(texts)]


def transcript(texts: list[str], path: str = "a b.wav", **more: Any) -> Transcript:
    words = words_of(texts, **more)
    return Transcript(Path(path), words[-1].end if words else 1.0, " ".join(texts), words)


def test_a_name_is_no_path() -> None:
    """Ids of cuts may hold slashes and dots that a path would lose."""
    named = Transcript(Path("a//b/./c"), 1.0, "one", name="a//b/./c")
    assert json.loads(render([named], "json"))["path"] == "a//b/./c"
    assert render([named], "txt") == "a//b/./c: one\n"


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_subtitles_come_back_whole(form: str) -> None:
    texts = STRANGE * 6
    text = render([transcript(texts)], form)  # type: ignore[arg-type]
    file = pysubs2.SSAFile.from_string(text, format_=form, keep_unknown_html_tags=True)
    if form == "vtt":  # entities, as the standard wants them
        assert "&lt;the&gt;" in text and "&amp;" in text and "<the>" not in text
    else:
        assert text.replace("\n", " ").count("{brown}") == text.count("<the>") == 6
    assert file[0].start == 0 and file[-1].end == round(1000 * transcript(texts).words[-1].end)
    assert all(one.end <= two.start for one, two in itertools.pairwise(file))


def test_a_cue_is_short_and_ends_at_a_pause() -> None:
    words = [*words_of(["word"] * 40), Word("late", 30.0, 30.04)]
    cues = cues_of(words)
    assert " ".join(cue.text for cue in cues).split() == [word.text for word in words]
    assert all(cue.end - cue.start <= LONGEST for cue in cues)
    assert all(len(line) <= LINE for cue in cues for line in cue.text.split("\n"))
    assert all(cue.text.count("\n") < LINES for cue in cues)
    assert (cues[-1].text, cues[-1].start, cues[-1].end) == ("late", 30.0, 31.0)  # long enough to be read
    uneven = cues_of(words_of(["a" * 30, "b" * 30, "c" * 20]))  # 82 characters, which two lines cannot hold
    assert [cue.text.count("\n") for cue in uneven] == [1, 0]
    assert cues_of([]) == []
    (long,) = cues_of([Word("x" * 200, 0.0, 9.0)])
    assert long.text == "x" * 200 and long.end == 9.0


def test_nist_formats_have_their_columns() -> None:
    done = transcript(["one", "two"], confidence=None)
    assert render([done], "ctm") == "a_b 1 0.00 0.30 one\na_b 1 0.50 0.30 two\n"
    assert render([transcript(["one"])], "ctm") == "a_b 1 0.00 0.30 one 0.250\n"
    assert render([done], "stm") == "a_b 1 unknown 0.00 0.80 one two\n"
    named = Transcript(Path("x"), 1.0, "one", words_of(["one"]), name="book.1 part")
    assert render([named], "ctm").split()[0] == "book.1_part"


def test_json_says_what_is_known() -> None:
    plain = json.loads(render([transcript(["one"], confidence=None)], "json"))
    assert plain == {
        "path": "a b.wav",
        "seconds": 0.3,
        "text": "one",
        "words": [{"text": "one", "start": 0.0, "end": 0.3}],
    }
    full = Transcript(
        Path("x"),
        1.0,
        "one",
        words_of(["one"]),
        nbest=[PieceTexts(0.0, 1.0, [Alternative("one", -1.0), Alternative("on", -2.5)])],
    )
    row = json.loads(render([full], "json"))
    assert row["words"][0]["confidence"] == 0.25 and row["nbest"] == [
        {"start": 0.0, "end": 1.0, "texts": [{"text": "one", "score": -1.0}, {"text": "on", "score": -2.5}]}
    ]
    assert json.loads(render([Transcript(Path("x"), error="gone")], "json")) == {"path": "x", "error": "gone"}


def test_silence_and_errors_in_every_format(tmp_path: Path) -> None:
    silent, wrong = Transcript(Path("s.wav"), 1.0), Transcript(Path("e.wav"), error="cannot read")
    for form in FORMATS:
        assert "e.wav" not in render([wrong], form) or form == "json"
        path = write_transcript(tmp_path, silent, form)
        assert path == tmp_path / f"s.{form}" and path.read_text() == render([silent], form)
    with pytest.raises(ValueError, match="one recording"):
        render([silent, silent], "srt")
