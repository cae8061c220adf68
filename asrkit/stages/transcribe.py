"""transcribe: audio files of any format, rate and length to text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch

from asrkit.data.augment import pad
from asrkit.data.features import SAMPLE_RATE, fbank
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.recogniser import Recogniser, load_recogniser
from asrkit.decoding.search import Method, decode
from asrkit.decoding.windows import Piece, read_pieces
from asrkit.decoding.words import Word, timed_words
from asrkit.errors import UserError

BATCH_SECONDS = 120.0


@dataclass(frozen=True)
class Transcript:
    """What was heard in one file, or in ``error`` why nothing could be."""

    path: Path
    seconds: float = 0.0
    text: str = ""
    words: list[Word] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class _Part:
    """A piece of a file, its text once decoded; a file that cannot be read ends in a part with its error."""

    number: int
    path: Path
    piece: Piece | None = None
    text: str = ""
    words: list[Word] = field(default_factory=list)
    error: str | None = None


def transcribe(
    run_path: Path,
    paths: Sequence[Path],
    *,
    method: Method = "greedy",
    beam: int = 4,
    device: str = "auto",
    threads: int | None = None,
) -> Iterator[Transcript]:
    """Yield the transcript of each file, in order, each as soon as it is done.

    Memory is that of a batch of pieces, however long or many the files are. An unreadable file gives a
    transcript with an error and does not keep the others from being done.

    Raises:
        UserError: the run directory cannot be used.
    """
    if beam < 1:
        raise UserError(f"--beam {beam}: must be at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    recogniser = load_recogniser(run_path, device)
    decoded = (part for batch in _batches(_parts(paths)) for part in _decode(recogniser, batch, method, beam))
    for _, parts in groupby(decoded, key=lambda part: part.number):
        yield _join(parts)


def _parts(paths: Sequence[Path]) -> Iterator[_Part]:
    for number, path in enumerate(paths):
        try:
            for piece in read_pieces(path):
                yield _Part(number, path, piece)
        except UserError as error:
            yield _Part(number, path, error=str(error))


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Neighbours together, up to ``BATCH_SECONDS`` when padded to the longest."""
    waiting: list[_Part] = []
    longest = 0
    for part in parts:
        longest = max(longest, _num_samples(part))
        if waiting and longest * (len(waiting) + 1) > BATCH_SECONDS * SAMPLE_RATE:
            yield waiting
            waiting, longest = [], _num_samples(part)
        waiting.append(part)
    if waiting:
        yield waiting


def _num_samples(part: _Part) -> int:
    return 0 if part.piece is None else len(part.piece.samples)


def _decode(recogniser: Recogniser, batch: list[_Part], method: Method, beam: int) -> Iterator[_Part]:
    pieces = [part.piece for part in batch if part.piece is not None]
    found: list[Hypothesis] = []
    if pieces:
        features, lens = pad([fbank(piece.samples) for piece in pieces])
        found = decode(recogniser.model, features, lens, method, beam)
    hypotheses = iter(found)
    for part in batch:
        if part.piece is None:
            yield part
            continue
        hypothesis = next(hypotheses)
        words = timed_words(hypothesis, recogniser.tokenizer, part.piece.start)
        text = recogniser.tokenizer.decode(hypothesis.tokens)
        yield _Part(part.number, part.path, part.piece, text, words)


def _join(parts: Iterable[_Part]) -> Transcript:
    texts, words, seconds, path, error = [], [], 0.0, Path(), None
    for part in parts:
        path, error = part.path, part.error or error
        texts.append(part.text)
        words += part.words
        if part.piece is not None:
            seconds = part.piece.start + part.piece.seconds
    if error is not None:
        return Transcript(path, error=error)
    return Transcript(path, round(seconds, 3), " ".join(text for text in texts if text), words)
