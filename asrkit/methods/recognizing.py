"""Where somebody speaks in cuts, and what recognizers make of it, in any process: the work of `label`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from lhotse.cut import Cut

from asrkit.data.cut_audio import cut_samples
from asrkit.data.manifests import language_of
from asrkit.decoding.external.interface import TextRecognizer, Transcription
from asrkit.decoding.external.opening import open_text_recognizer
from asrkit.decoding.external.pauses import speech_pieces
from asrkit.decoding.external.utterances import Piece, batched, transcribe_pieces
from asrkit.frames import SAMPLE_RATE
from asrkit.methods.labeling import Progress

Plans = dict[str, list[tuple[float, float]]]  # by cut id, the stretches (begin, end) with speech, in seconds
Texts = dict[tuple[str, float], list[Transcription]]  # by cut id and begin, one for each recognizer
Recognized = tuple[Plans, Texts]  # a batch: the stretches found on the way to it, and its texts


@dataclass(frozen=True)
class Missing:
    """A cut, its stretches where they are known, and where those begin that have texts."""

    cut: Cut
    planned: list[tuple[float, float]] | None
    begins: frozenset[float]


def missing_parts(cuts: Sequence[Cut], done: Progress, max_duration: float) -> list[list[Missing]]:
    """The cuts that are not done, in order, in parts of at least ``max_duration`` seconds together."""
    parts: list[list[Missing]] = []
    seconds = max_duration
    for cut in cuts:
        planned = done.planned.get(cut.id)
        begins = frozenset(begin for begin, _ in planned or () if (cut.id, begin) in done.texts)
        if planned is not None and len(begins) == len(planned):
            continue
        if seconds >= max_duration:
            parts.append([])
            seconds = 0.0
        parts[-1].append(Missing(cut, planned, begins))
        seconds += cut.duration
    return parts


class PieceRecognizer:
    """Called with a part of the cuts: the stretches of those that had none, and the texts of those without, by batches.

    Every process opens its own recognizers: a fork lacks the threads of its parent's, and a pickle has none.

    Args:
        language: of cuts that name none. longest: seconds of a stretch. max_duration: seconds of padded audio at once.
    """

    def __init__(
        self,
        specs: tuple[str, ...],
        device: str,
        threads: int | None,
        language: str,
        longest: float,
        max_duration: float,
    ) -> None:
        self._arguments = (specs, device, threads, language, longest, max_duration)
        self._opened: dict[int, tuple[ExitStack, list[TextRecognizer]]] = {}  # by process; another's are never closed

    def __reduce__(self) -> tuple[type[PieceRecognizer], tuple[object, ...]]:
        return PieceRecognizer, self._arguments

    def use(self, recognizers: Sequence[TextRecognizer]) -> None:
        """Use these in this process, where they are open already."""
        self._opened[os.getpid()] = ExitStack(), list(recognizers)

    def _recognizers(self) -> list[TextRecognizer]:
        specs, device, threads, *_ = self._arguments
        if os.getpid() not in self._opened:
            stack = ExitStack()
            opened = [stack.enter_context(open_text_recognizer(spec, device=device, threads=threads)) for spec in specs]
            self._opened[os.getpid()] = stack, opened
        return self._opened[os.getpid()][1]

    def __call__(self, part: Sequence[Missing]) -> list[Recognized]:
        return list(self.batches(part))

    def batches(self, part: Sequence[Missing]) -> Iterator[Recognized]:
        """The same, each batch as soon as it is recognized: a part may be one recording of hours."""
        recognizers, (*_, language, longest, max_duration) = self._recognizers(), self._arguments
        plans: Plans = {}
        for pieces in batched(_pieces(part, longest, plans), max_duration):
            languages = [language_of(piece.cut) or language for piece in pieces]
            by_recognizer = [transcribe_pieces(recognizer, pieces, languages) for recognizer in recognizers]
            keys = [(piece.cut.id, piece.begin) for piece in pieces]
            texts = {key: list(each) for key, each in zip(keys, zip(*by_recognizer, strict=True), strict=True)}
            yield dict(plans), texts
            plans.clear()
        yield plans, {}  # of cuts in which nobody speaks


def _pieces(part: Sequence[Missing], longest: float, plans: Plans) -> Iterator[Piece]:
    """The stretches without texts; those of cuts that had none are found, and added to ``plans``."""
    for one in part:
        samples, planned = cut_samples(one.cut), one.planned
        if planned is None:
            planned = speech_pieces(samples, longest)
            if planned and len(samples) <= longest * SAMPLE_RATE:
                planned = [(0.0, len(samples) / SAMPLE_RATE)]
            plans[one.cut.id] = planned
        for begin, end in planned:
            if begin not in one.begins:
                yield Piece.of(one.cut, samples, begin, end)
