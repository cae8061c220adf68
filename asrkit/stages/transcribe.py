"""transcribe: audio files of any format, rate and length to text, and sound as it comes in to text that grows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch

from asrkit.data.augment import pad
from asrkit.data.features import fbank
from asrkit.decoding.choice import ContextChoice
from asrkit.decoding.domain import Domain, Search, make_search
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.live import file_blocks, pcm_blocks
from asrkit.decoding.nbest import (
    Alternative,
    PieceTexts,
    alternatives,
    bad_temperature,
    cannot_list,
    no_confidence,
    word_confidence,
)
from asrkit.decoding.recognizer import Recognizer, load_recognizer
from asrkit.decoding.search import CTC_GRAPH, Method, uses_ctc
from asrkit.decoding.streaming import Endpoint, Partial, StreamingRecognizer
from asrkit.decoding.transcripts import Transcript
from asrkit.decoding.windows import Piece, read_pieces
from asrkit.decoding.words import Word, timed_words
from asrkit.errors import UserError
from asrkit.frames import SAMPLE_RATE

BATCH_SECONDS = 120.0
STDIN = Path("-")


@dataclass(frozen=True)
class _Part:
    """A piece of a file, its text once decoded; a file that cannot be read ends in a part with its error."""

    number: int
    path: Path
    piece: Piece | None = None
    text: str = ""
    words: list[Word] = field(default_factory=list)
    error: str | None = None
    texts: list[Alternative] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        return 0 if self.piece is None else len(self.piece.samples)


def transcribe(
    run_path: Path,
    paths: Sequence[Path],
    *,
    method: Method = "greedy",
    beam: int = 4,
    variant: str | None = None,
    context: ContextChoice | None = None,
    language: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    warn: Callable[[str], None] = lambda line: None,
    domain: Domain | None = None,
    nbest: int = 0,
    temperature: float | None = None,
) -> Iterator[Transcript]:
    """Yield the transcript of each file, in order, each as soon as it is done.

    Memory is that of a batch of pieces, however long or many the files are. An unreadable file gives a
    transcript with an error and does not keep the others from being done.

    Args:
        variant: the active sub-models; None is the one the last stage trained.
        context: None is the first the variant was trained in.
        language: what is spoken, for a model with languages.
        warn: is called with a line where the model is used in a way it was not trained for.
        domain: what the search has beside the model: a graph, which takes the place of ``method``, language models and the like.
        nbest: texts of each piece to give beside the best one, by a search that has alternatives; 0: none.
        temperature: of the confidences of words, which such a search has; None is 1.

    Raises:
        UserError: the run directory cannot be used, or the options do not fit together.
    """
    domain = domain or Domain()
    name: str = method if domain.graph is None else CTC_GRAPH
    findings = [*domain.findings([name]), *cannot_list(nbest, name, beam), *bad_temperature(temperature)]
    if temperature is not None and (line := no_confidence("--confidence-temperature", name)):
        findings.append(line)
    recognizer = _prepare(run_path, name, beam, variant, context, language, device, threads, warn, findings)
    search = make_search(recognizer, name, beam, domain, nbest > 0)
    decoded = (
        part
        for batch in _batches(_parts(paths))
        for part in _decode(recognizer, batch, search, nbest, temperature or 1.0)
    )
    for _, parts in groupby(decoded, key=lambda part: part.number):
        yield _join(parts)


def transcribe_stream(
    run_path: Path,
    paths: Sequence[Path],
    *,
    method: Method = "greedy",
    beam: int = 4,
    variant: str | None = None,
    context: ContextChoice | None = None,
    language: str | None = None,
    endpoint: Endpoint | None = None,
    paced: bool = True,
    device: str = "auto",
    threads: int | None = None,
    warn: Callable[[str], None] = lambda line: None,
    domain: Domain | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Path, Partial | UserError]]:
    """Yield what is recognized in each file in turn, as soon as it is known, or why the file cannot be read.

    Args (the others are those of ``transcribe``):
        paths: audio files; ``-`` is raw 16-bit little-endian mono at 16 kHz on standard input.
        context: None is the first streaming one the variant was trained in.
        endpoint: when an utterance is over.
        paced: files are read at the pace they were spoken.
        stopped: called again and again; when it returns True, the sound ends there, and no further file begins.

    Raises:
        UserError: the run directory cannot be used.
    """
    choice, domain = replace(context or ContextChoice(), streaming=True), domain or Domain()
    name: str = method if domain.graph is None else CTC_GRAPH
    findings = domain.findings([name])
    recognizer = _prepare(run_path, name, beam, variant, choice, language, device, threads, warn, findings)
    search = make_search(recognizer, name, beam, domain, stream=True)
    for path in paths:
        if stopped():
            return
        stream = StreamingRecognizer(
            recognizer.model, recognizer.tokenizer, search.run, endpoint, search.unfinished, uses_ctc(name)
        )
        try:
            for block in pcm_blocks(0, stopped) if path == STDIN else file_blocks(path, paced, stopped):
                for partial in stream.accept(block):
                    yield path, partial
        except UserError as error:
            yield path, error
            continue
        for partial in stream.finish():
            yield path, partial


def _prepare(
    run_path: Path,
    method: str,
    beam: int,
    variant: str | None,
    context: ContextChoice | None,
    language: str | None,
    device: str,
    threads: int | None,
    warn: Callable[[str], None],
    known: Sequence[str],
) -> Recognizer:
    choice = context or ContextChoice()
    findings = [*choice.contradictions(), *known]
    if beam < 1:
        findings.append(f"--beam {beam}: must be at least 1")
    if findings:
        raise UserError.of(findings)
    if threads is not None:
        torch.set_num_threads(threads)
    recognizer = load_recognizer(run_path, device, variant, choice, [method], language)
    if recognizer.languages:
        known = ", ".join(recognizer.languages)
        raise UserError(f"{run_path}: needs the language of the recordings; give --language, one of {known}")
    for line in recognizer.warnings:
        warn(line)
    return recognizer


def _parts(paths: Sequence[Path]) -> Iterator[_Part]:
    for number, path in enumerate(paths):
        try:
            for piece in read_pieces(path):
                yield _Part(number, path, piece)
        except UserError as error:
            yield _Part(number, path, error=str(error))


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Neighbors together, up to ``BATCH_SECONDS`` when padded to the longest."""
    waiting: list[_Part] = []
    longest = 0
    for part in parts:
        longest = max(longest, part.num_samples)
        if waiting and longest * (len(waiting) + 1) > BATCH_SECONDS * SAMPLE_RATE:
            yield waiting
            waiting, longest = [], part.num_samples
        waiting.append(part)
    if waiting:
        yield waiting


def _decode(
    recognizer: Recognizer, batch: list[_Part], search: Search, nbest: int, temperature: float
) -> Iterator[_Part]:
    pieces = [part.piece for part in batch if part.piece is not None]
    decoded: list[list[Hypothesis]] = []
    if pieces:
        features, lens = pad([fbank(piece.samples) for piece in pieces])
        decoded = search.run(recognizer.model.encode(features, lens))
    hypotheses = iter(decoded)
    for part in batch:
        if part.piece is None:
            yield part
            continue
        several, tokenizer = next(hypotheses), recognizer.tokenizer
        confidences = None
        if search.confident:
            values = word_confidence(several, tokenizer).confidences(temperature).tolist()
            confidences = [round(value, 4) for value in values]
        words = timed_words(several[0], tokenizer, part.piece.start, confidences)
        text = tokenizer.decode(several[0].tokens)
        texts = alternatives(several, tokenizer, nbest)
        yield _Part(part.number, part.path, part.piece, text, words, texts=texts)


def _join(parts: Iterable[_Part]) -> Transcript:
    texts, words, nbest, seconds, path, error = [], [], [], 0.0, Path(), None
    for part in parts:
        path, error = part.path, part.error or error
        texts.append(part.text)
        words += part.words
        if part.piece is not None:
            seconds = part.piece.start + part.piece.seconds
            nbest += [PieceTexts(round(part.piece.start, 3), round(seconds, 3), part.texts)] if part.texts else []
    if error is not None:
        return Transcript(path, error=error)
    return Transcript(path, round(seconds, 3), " ".join(text for text in texts if text), words, nbest=nbest)
