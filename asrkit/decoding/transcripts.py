"""What was recognized in recordings, as text: txt, json, srt, vtt, ctm and stm by one writer.

The times of words are those of the pieces: a model emits a piece in one frame, so a word's end is the end of the frame that
emitted its last piece, which lies somewhat before the end of its sound.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from asrkit.decoding.nbest import PieceTexts
from asrkit.decoding.words import Word
from asrkit.disk import atomic_write

Format = Literal["txt", "json", "srt", "vtt", "ctm", "stm"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUBTITLES: tuple[Format, ...] = ("srt", "vtt")  # a file of these is about one recording

# A subtitle ends at a pause, or before it has more than two lines of 42 characters or lasts longer than 6 s, and stays for at
# least a second if there is time before the next. Common practice of subtitling; the pause is our choice.
PAUSE, LONGEST, SHORTEST = 0.8, 6.0, 1.0
LINE, LINES = 42, 2


@dataclass(frozen=True)
class Transcript:
    """What was recognized in one file, or in ``error`` why it could not be read.

    name: what formats call the recording; of none, NIST's have the file's name without suffix, txt and json its path. nbest: where they were asked for, the likeliest texts of each piece that was decoded by itself.
    """

    path: Path
    seconds: float = 0.0
    text: str = ""
    words: list[Word] = field(default_factory=list)
    error: str | None = None
    name: str = ""
    nbest: list[PieceTexts] = field(default_factory=list)


@dataclass(frozen=True)
class Cue:
    """A subtitle: its words are shown from ``start`` to ``end``, in seconds."""

    start: float
    end: float
    text: str


def render(transcripts: Sequence[Transcript], form: Format) -> str:
    """The text of a file in the format; transcripts with an error are only in json.

    Raises:
        ValueError: several recordings in one file of subtitles, whose times would be ambiguous.
    """
    readable = [transcript for transcript in transcripts if transcript.error is None]
    if form == "json":
        return "".join(json.dumps(json_row(transcript), ensure_ascii=False) + "\n" for transcript in transcripts)
    if form == "txt":
        return "".join(f"{transcript.name or transcript.path}: {transcript.text}\n" for transcript in readable)
    if form == "ctm":
        return "".join(line for transcript in readable for line in _ctm_lines(transcript))
    if form == "stm":
        return "".join(_stm_line(transcript) for transcript in readable)
    if len(readable) > 1:
        raise ValueError("a file of subtitles is about one recording")
    return _subtitles(readable[0].words if readable else [], form)


def write_transcript(folder: Path, transcript: Transcript, form: Format) -> Path:
    """Write a recording's file into ``folder``, such as talk.srt; returns where it is."""
    path = folder / f"{transcript.path.stem}.{form}"
    with atomic_write(path) as temporary:
        temporary.write_text(render([transcript], form), encoding="utf-8")
    return path


def json_row(transcript: Transcript) -> dict[str, object]:
    """A transcript as one JSON object; ``confidence`` and ``nbest`` are left out where they are not known."""
    path = transcript.name or str(transcript.path)
    if transcript.error is not None:
        return {"path": path, "error": transcript.error}
    words = [{key: value for key, value in asdict(word).items() if value is not None} for word in transcript.words]
    row = {"path": path, "seconds": transcript.seconds, "text": transcript.text, "words": words}
    if transcript.nbest:
        row["nbest"] = [asdict(piece) for piece in transcript.nbest]
    return row


def cues_of(words: Sequence[Word]) -> list[Cue]:
    """Words as subtitles; see ``PAUSE`` and the lines after it."""
    groups: list[list[Word]] = []
    for word in words:
        if groups:
            group = groups[-1]
            fits = _wrapped([*group, word]).count("\n") < LINES
            near = word.start - group[-1].end < PAUSE and word.end - group[0].start <= LONGEST
        if not groups or not near or not fits:
            groups.append([])
        groups[-1].append(word)
    following = [*(group[0].start for group in groups[1:]), float("inf")][: len(groups)]
    return [
        Cue(group[0].start, max(group[-1].end, min(group[0].start + SHORTEST, after)), _wrapped(group))
        for group, after in zip(groups, following, strict=True)
    ]


def _wrapped(words: Sequence[Word]) -> str:
    """The words on as many lines as they need."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word.text) > LINE:
            lines.append("")
        lines[-1] += f"{' ' * bool(lines[-1])}{word.text}"
    return "\n".join(lines)


def _subtitles(words: Sequence[Word], form: Format) -> str:
    import pysubs2

    events = pysubs2.SSAFile()
    for cue in cues_of(words):
        # In WebVTT, & and < begin entities and tags (W3C, section 4.2.2); pysubs2 writes texts as they are.
        text = html.escape(cue.text, quote=False) if form == "vtt" else cue.text
        start, end = round(1000 * cue.start), round(1000 * cue.end)
        events.append(pysubs2.SSAEvent(start, end, text.replace("\n", "\\N")))
    return events.to_string(form, keep_ssa_tags=True)


def _ctm_lines(transcript: Transcript) -> list[str]:
    """NIST's time-marked words: recording, channel, start and length in seconds, word and, where it is known, confidence."""
    name, lines = _name(transcript), []
    for word in transcript.words:
        confidence = "" if word.confidence is None else f" {word.confidence:.3f}"
        lines.append(f"{name} 1 {word.start:.2f} {word.end - word.start:.2f} {word.text}{confidence}\n")
    return lines


def _stm_line(transcript: Transcript) -> str:
    """NIST's segment-marked text: recording, channel, speaker, start, end and text; nobody knows the speaker."""
    return f"{_name(transcript)} 1 unknown 0.00 {transcript.seconds:.2f} {transcript.text}\n"


def _name(transcript: Transcript) -> str:
    """The recording as NIST's formats name it: without spaces, which separate columns."""
    return re.sub(r"\s", "_", transcript.name or transcript.path.stem)
