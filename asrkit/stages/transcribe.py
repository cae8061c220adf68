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
from asrkit.decoding.fusion import Fusion, FusionRequest, load_fusion
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.live import file_blocks, pcm_blocks
from asrkit.decoding.nbest import Alternative, PieceTexts, alternatives, cannot_list
from asrkit.decoding.recognizer import Recognizer, load_recognizer
from asrkit.decoding.search import Method, cannot_fuse, search
from asrkit.decoding.streaming import Endpoint, Partial, StreamingRecognizer
from asrkit.decoding.transducer import beam_hypotheses
from asrkit.decoding.windows import Piece, read_pieces
from asrkit.decoding.words import Word, timed_words
from asrkit.errors import UserError
from asrkit.frames import SAMPLE_RATE

BATCH_SECONDS = 120.0
STDIN = Path("-")


@dataclass(frozen=True)
class Transcript:
    """What was recognized in one file, or in ``error`` why it could not be read."""

    path: Path
    seconds: float = 0.0
    text: str = ""
    words: list[Word] = field(default_factory=list)
    error: str | None = None
    nbest: list[PieceTexts] = field(default_factory=list)


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
    fusion: FusionRequest | None = None,
    nbest: int = 0,
) -> Iterator[Transcript]:
    """Yield the transcript of each file, in order, each as soon as it is done.

    Memory is that of a batch of pieces, however long or many the files are. An unreadable file gives a
    transcript with an error and does not keep the others from being done.

    Args:
        variant: the active sub-models; None is the one the last stage trained.
        context: None is the first the variant was trained in.
        language: what is spoken, for a model with languages.
        warn: is called with a line where the model is used in a way it was not trained for.
        fusion: what else a beam search heeds; None: nothing.
        nbest: texts of each piece to give beside the best one, by a beam search; 0: none.

    Raises:
        UserError: the run directory cannot be used, or the options do not fit together.
    """
    how = _prepare(run_path, method, beam, variant, context, language, device, threads, warn, fusion, nbest)
    decoded = (part for batch in _batches(_parts(paths)) for part in _decode(how, batch))
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
    fusion: FusionRequest | None = None,
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
    choice = replace(context or ContextChoice(), streaming=True)
    how = _prepare(run_path, method, beam, variant, choice, language, device, threads, warn, fusion, 0)
    for path in paths:
        if stopped():
            return
        model, tokenizer = how.recognizer.model, how.recognizer.tokenizer
        stream = StreamingRecognizer(model, tokenizer, method, beam, endpoint, how.fusion)
        try:
            for block in pcm_blocks(0, stopped) if path == STDIN else file_blocks(path, paced, stopped):
                for partial in stream.accept(block):
                    yield path, partial
        except UserError as error:
            yield path, error
            continue
        for partial in stream.finish():
            yield path, partial


@dataclass(frozen=True)
class _How:
    """The recognizer, and how it searches."""

    recognizer: Recognizer
    method: Method
    beam: int
    fusion: Fusion | None
    nbest: int


def _prepare(
    run_path: Path,
    method: Method,
    beam: int,
    variant: str | None,
    context: ContextChoice | None,
    language: str | None,
    device: str,
    threads: int | None,
    warn: Callable[[str], None],
    fusion: FusionRequest | None,
    nbest: int,
) -> _How:
    choice = context or ContextChoice()
    findings = choice.contradictions()
    if beam < 1:
        findings.append(f"--beam {beam}: must be at least 1")
    if fusion is not None and method != "beam":
        findings.append(cannot_fuse(method))
    findings += cannot_list(nbest, method, beam)
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
    fused = None if fusion is None else load_fusion(fusion, recognizer.tokenizer, recognizer.device)
    return _How(recognizer, method, beam, fused, nbest)


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


def _decode(how: _How, batch: list[_Part]) -> Iterator[_Part]:
    recognizer = how.recognizer
    pieces = [part.piece for part in batch if part.piece is not None]
    decoded: list[list[Hypothesis]] = []
    if pieces:
        features, lens = pad([fbank(piece.samples) for piece in pieces])
        special_ids = recognizer.tokenizer.special_ids
        encoded = recognizer.model.encode(features, lens)
        options = (how.beam, special_ids, how.fusion)
        if how.nbest:
            decoded = beam_hypotheses(recognizer.model, encoded.joiner_in, encoded.lens, *options)
        else:
            decoded = [[found] for found in search(recognizer.model, encoded, how.method, *options)]
    hypotheses = iter(decoded)
    for part in batch:
        if part.piece is None:
            yield part
            continue
        several = next(hypotheses)
        hypothesis = several[0]
        words = timed_words(hypothesis, recognizer.tokenizer, part.piece.start)
        text = recognizer.tokenizer.decode(hypothesis.tokens)
        texts = alternatives(several, recognizer.tokenizer, how.nbest)
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
