"""Labels from recognizers: which are good enough to train on, and the file that keeps what was recognized so far."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import Field, model_validator

from asrkit.config import config, differences, from_dict, to_dict
from asrkit.data.text.normalization import TextError, normalize, sentence_key
from asrkit.decoding.external.interface import Transcription
from asrkit.disk import atomic_write, cannot_write
from asrkit.errors import UserError
from asrkit.reporting.wer import ErrorCounts, align, count

NO_SPEECH, NO_SPEECH_CONFIDENCE = 0.6, 0.37  # Whisper's own rule: nobody speaks where both say so (exp(-1) = 0.37)
LONGEST_REPEAT = 8  # words
FORMAT = 1
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
MAX_LINE = 1 << 24  # bytes

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Seconds = Annotated[float, Field(ge=0.0, le=1e7)]


@dataclass(frozen=True)
class Filters:
    """What a label must satisfy.

    min_confidence: see ``Transcription``. max_disagreement: word errors of the second labeler's text against the first's, per word.
    max_rate: characters per second, spaces included. max_repeats: how often in a row the same words may come.
    """

    min_confidence: float = 0.6
    max_disagreement: float = 0.3
    max_rate: float = 25.0
    max_repeats: int = 3


NO_FILTERS = Filters(0.0, float("inf"), float("inf"), 1 << 30)


@dataclass(frozen=True)
class Threshold:
    """What a minimum confidence would keep: the share of the words, and the word errors of the labels against the given texts."""

    confidence: float
    share: float
    errors: ErrorCounts


def write_dropped(path: Path, rows: Sequence[str]) -> None:
    """The file that lists what was left out."""
    with atomic_write(path) as temporary:
        temporary.write_text("id\tbegin\tend\treason\tdetail\ttext\n" + "".join(rows), encoding="utf-8")


def errors_of(label: Label, given: str, language: str) -> ErrorCounts:
    """The errors of a label against the text that its cut had, whose case and punctuation do not count. A number that cannot be
    spelled is a word."""
    try:
        given = normalize(given, language)
    except TextError:
        given = sentence_key(given)
    return count(align(given.split(), label.words.split()))


def thresholds(labels: Sequence[tuple[float, ErrorCounts]]) -> list[Threshold]:
    """A row for each of ``THRESHOLDS``, from each label's confidence and errors; [] without reference words."""
    total = sum(errors.words for _, errors in labels)
    rows = [(limit, sum((errors for value, errors in labels if value >= limit), ErrorCounts())) for limit in THRESHOLDS]
    return [Threshold(limit, errors.words / total, errors) for limit, errors in rows] if total else []


@dataclass(frozen=True)
class Label:
    """An utterance's label as it is trained on, or why there is none.

    words: normalized; "" where they are not certain. reason, detail: why the label is dropped; "" if it is not.
    """

    words: str
    language: str
    confidence: float | None
    disagreement: float | None
    reason: str = ""
    detail: str = ""


def dropped_row(cut_id: str, begin: float, end: float, *texts: str) -> str:
    """The line of ``dropped.tsv`` about a part of a cut, from ``begin`` to ``end`` s: its reason and texts."""
    return "\t".join([cut_id, f"{begin:.2f}", f"{end:.2f}", *(" ".join(text.split()) for text in texts)]) + "\n"


def make_label(transcriptions: Sequence[Transcription], seconds: float, filters: Filters) -> Label:
    """The label of an utterance by the first recognizer; a second one is only asked whether it agrees."""
    first, *others = transcriptions
    confidence, disagreement, words = first.confidence, None, ""

    def drop(reason: str, detail: str) -> Label:
        return Label(words, first.language, confidence, disagreement, reason, detail)

    if (first.no_speech or 0.0) > NO_SPEECH and confidence is not None and confidence < NO_SPEECH_CONFIDENCE:
        return drop("no speech", f"{first.no_speech:.2f} by the recognizer")
    try:
        words = normalize(first.text, first.language)
    except TextError as error:
        return drop(error.reason, str(error))
    for other in others:
        disagreement = words_apart(words, other)
    if confidence is not None and confidence < filters.min_confidence:
        return drop("confidence", f"{confidence:.2f} < {filters.min_confidence:g}")
    if disagreement is not None and disagreement > filters.max_disagreement:
        return drop("disagreement", f"{disagreement:.2f} > {filters.max_disagreement:g}: {others[0].text}")
    if (rate := len(words) / seconds) > filters.max_rate:
        return drop("rate", f"{rate:.1f} characters per second > {filters.max_rate:g}")
    repeated, times = most_repeated(words.split())
    if times > filters.max_repeats:
        return drop("repeats", f"'{repeated}' {times} times in a row")
    return Label(words, first.language, confidence, disagreement)


def words_apart(words: str, other: Transcription) -> float:
    """Word errors of ``other`` per word of ``words``; a text without certain words agrees in nothing."""
    try:
        other_words = normalize(other.text, other.language)
    except TextError:
        other_words = ""
    return count(align(words.split(), other_words.split())).rate


def most_repeated(words: Sequence[str]) -> tuple[str, int]:
    """The words, up to ``LONGEST_REPEAT`` of them, that come most often in a row, and how often."""
    best, times = "", 0
    for size in range(1, min(LONGEST_REPEAT, len(words)) + 1):
        run = 1  # words at ``index`` and before that equal those ``size`` before them, in whole repetitions
        matching = 0
        for index in range(size, len(words)):
            matching = matching + 1 if words[index] == words[index - size] else 0
            run = 1 + matching // size
            if run > times:
                best, times = " ".join(words[index - size + 1 : index + 1]), run
    return (best, times) if times else (words[0] if words else "", min(1, len(words)))


@config
class _Planned:
    """A line of the file: a cut, and its stretches in which somebody speaks."""

    id: str
    """Of the cut."""
    pieces: list[tuple[Seconds, Seconds]]
    """Begin and end of each stretch."""

    @model_validator(mode="after")
    def _have_length(self) -> Any:
        if any(begin >= end for begin, end in self.pieces):
            raise ValueError("a stretch ends before it begins")
        return self


@config
class _Text:
    """A ``Transcription`` in the file."""

    text: str
    """As the recognizer writes it."""
    confidence: Probability | None
    """Of its tokens."""
    language: str
    """Given or detected."""
    no_speech: Probability | None = None
    """That nobody speaks."""


@config
class _Recognized:
    """A line of the file: the texts of one stretch of a cut, one for each recognizer."""

    id: str
    """Of the cut."""
    begin: Seconds
    """Of the stretch."""
    texts: Annotated[list[_Text], Field(min_length=1)]
    """One for each recognizer."""


@dataclass
class Progress:
    """What is done so far. planned: the stretches (begin, end) of each cut; texts: by cut and begin, one for each recognizer."""

    file: BinaryIO
    planned: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    texts: dict[tuple[str, float], list[Transcription]] = field(default_factory=dict)

    def plan(self, cut_id: str, pieces: Sequence[tuple[float, float]]) -> None:
        """Write down a cut's stretches."""
        self.planned[cut_id] = list(pieces)
        self._write([to_dict(_Planned(id=cut_id, pieces=list(pieces)))])

    def add(self, recognized: Mapping[tuple[str, float], Sequence[Transcription]]) -> None:
        """Write down the texts of a batch; they are on disk afterwards."""
        self.texts |= {key: list(texts) for key, texts in recognized.items()}
        lines = [
            _Recognized(id=cut_id, begin=begin, texts=[_Text(**vars(text)) for text in texts])
            for (cut_id, begin), texts in recognized.items()
        ]
        self._write([to_dict(line) for line in lines])
        os.fsync(self.file.fileno())

    def _write(self, rows: Sequence[Any]) -> None:
        self.file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        self.file.flush()


@contextmanager
def open_progress(path: Path, inputs: Mapping[str, Any]) -> Iterator[Progress]:
    """The file of what was recognized so far, to go on with; it is made if it does not exist.

    Args:
        inputs: what the texts depend on: manifest, recognizers, language, longest utterance.

    Raises:
        UserError: it has texts of other inputs, is damaged, or another process writes to it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - closed below
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{path}: another process is labeling there; wait for it, or choose another --out"
            ) from error
        progress = Progress(file)
        file.seek(0)
        if not (header := file.readline(MAX_LINE)).endswith(b"\n"):
            file.truncate(0)  # new, or killed while its first line was written
            progress._write([{"format": FORMAT, "inputs": dict(inputs)}])
        else:
            _check_header(path, header, inputs)
            _read_lines(path, progress)
        file.seek(0, os.SEEK_END)
        yield progress


def _check_header(path: Path, line: bytes, inputs: Mapping[str, Any]) -> None:
    try:
        header = json.loads(line)
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}")
        changed = differences(header["inputs"], dict(inputs))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, 1, error) from error
    if changed:
        raise UserError(
            f"{path}: has the texts of another labeling ({'; '.join(changed)}); choose another --out, or delete the file"
        )


def _read_lines(path: Path, progress: Progress) -> None:
    """Read what is there; a last line that was not written to its end is cut off."""
    number, end = 1, progress.file.tell()
    while (line := progress.file.readline(MAX_LINE)).endswith(b"\n"):
        number += 1
        try:
            row = json.loads(line)
            if "pieces" in row:
                planned = from_dict(_Planned, row, f"line {number}")
                progress.planned[planned.id] = [(begin, end) for begin, end in planned.pieces]
            else:
                recognized = from_dict(_Recognized, row, f"line {number}")
                texts = [Transcription(**to_dict(text)) for text in recognized.texts]
                progress.texts[recognized.id, recognized.begin] = texts
        except (ValueError, TypeError, RecursionError, UserError) as error:
            raise _damaged(path, number, error) from error
        end = progress.file.tell()
    if len(line) == MAX_LINE:
        raise _damaged(path, number + 1, ValueError("a line too long"))
    progress.file.truncate(end)


def _damaged(path: Path, number: int, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"{path}:{number}: is not a line that asrkit label wrote ({reason}); delete the file and label again"
    )
