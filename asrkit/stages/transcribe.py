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
from asrkit.decoding.nbest import Agreement, distinct
from asrkit.decoding.recognizer import Recognizer, load_recognizer
from asrkit.decoding.search import BEAMS, CTC_GRAPH, Method
from asrkit.decoding.streaming import Endpoint, Partial, StreamingRecognizer
from asrkit.decoding.transcripts import Alternative, Transcript
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
    nbest: list[Alternative] = field(default_factory=list)


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
    domain: Domain | None = None,
    nbest: int = 0,
    temperature: float = 1.0,
    warn: Callable[[str], None] = lambda line: None,
) -> Iterator[Transcript]:
    """Yield the transcript of each file, in order, each as soon as it is done.

    Memory is that of a batch of pieces, however long or many the files are. An unreadable file gives a
    transcript with an error and does not keep the others from being done.

    Args:
        variant: the active sub-models; None is the one the last stage trained.
        context: None is the first the variant was trained in.
        language: what is spoken, for a model with languages.
        domain: a decoding graph, which takes the place of ``method``, or a language model beside CTC.
        nbest: how many texts of each stretch to give; 0 gives the best one alone.
        temperature: of the confidences of words, which a search with alternatives has.
        warn: is called with a line where the model is used in a way it was not trained for.

    Raises:
        UserError: the run directory, the graph or the language model cannot be used, or options contradict each other.
    """
    domain = domain or Domain()
    name: str = method if domain.graph is None else CTC_GRAPH
    findings = domain.findings([name])
    if nbest and name != CTC_GRAPH and name not in BEAMS:
        findings.append(f"--nbest: --method {name} has no alternatives; choose beam, ctc-beam or --graph")
    if not temperature > 0:
        findings.append(f"--confidence-temperature {temperature}: must be above 0")
    recognizer = _prepare(run_path, name, beam, variant, context, language, device, threads, warn, findings)
    search = make_search(recognizer, name, beam, domain, nbest > 0)
    decoded = (
        part for batch in _batches(_parts(paths)) for part in _decode(recognizer, batch, search, nbest, temperature)
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
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Path, Partial | UserError]]:
    """Yield what is recognized in each file in turn, as soon as it is known, or why the file cannot be read.

    Args:
        paths: audio files; ``-`` is raw 16-bit little-endian mono at 16 kHz on standard input.
        variant: the active sub-models; None is the one the last stage trained.
        context: None is the first streaming one the variant was trained in.
        language: what is spoken, for a model with languages.
        endpoint: when an utterance is over.
        paced: files are read at the pace they were spoken.
        warn: is called with a line where the model is used in a way it was not trained for.
        stopped: called again and again; when it returns True, the sound ends there, and no further file begins.

    Raises:
        UserError: the run directory cannot be used.
    """
    choice = replace(context or ContextChoice(), streaming=True)
    recognizer = _prepare(run_path, method, beam, variant, choice, language, device, threads, warn)
    for path in paths:
        if stopped():
            return
        stream = StreamingRecognizer(recognizer.model, recognizer.tokenizer, method, beam, endpoint)
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
    known: Sequence[str] = (),
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
        longest = max(longest, _num_samples(part))
        if waiting and longest * (len(waiting) + 1) > BATCH_SECONDS * SAMPLE_RATE:
            yield waiting
            waiting, longest = [], _num_samples(part)
        waiting.append(part)
    if waiting:
        yield waiting


def _num_samples(part: _Part) -> int:
    return 0 if part.piece is None else len(part.piece.samples)


def _decode(
    recognizer: Recognizer, batch: list[_Part], search: Search, nbest: int, temperature: float
) -> Iterator[_Part]:
    pieces = [part.piece for part in batch if part.piece is not None]
    decoded: list[list[Hypothesis]] = []
    if pieces:
        features, lens = pad([fbank(piece.samples) for piece in pieces])
        decoded = search.run(recognizer.model.encode(features, lens))
    alternatives = iter(decoded)
    for part in batch:
        if part.piece is None:
            yield part
            continue
        texts = distinct(next(alternatives), recognizer.tokenizer)
        confidences = (
            Agreement(texts, recognizer.tokenizer).confidences(temperature).tolist() if search.n_best else None
        )
        words = timed_words(texts[0], recognizer.tokenizer, part.piece.start, confidences)
        written = [
            Alternative(recognizer.tokenizer.decode(h.tokens), round(h.score, 3)) for h in texts[: max(1, nbest)]
        ]
        yield _Part(part.number, part.path, part.piece, written[0].text, words, nbest=written[:nbest])


def _join(parts: Iterable[_Part]) -> Transcript:
    texts, words, seconds, path, error, nbest = [], [], 0.0, Path(), None, []
    for part in parts:
        path, error = part.path, part.error or error
        texts.append(part.text)
        words += [replace(word, confidence=_rounded(word.confidence)) for word in part.words]
        nbest += [part.nbest] if part.nbest else []
        if part.piece is not None:
            seconds = part.piece.start + part.piece.seconds
    if error is not None:
        return Transcript(path, error=error)
    return Transcript(path, round(seconds, 3), " ".join(text for text in texts if text), words, nbest=nbest)


def _rounded(confidence: float | None) -> float | None:
    return None if confidence is None else round(confidence, 4)
