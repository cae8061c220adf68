"""Utterances of a manifest in batches for an external recognizer, each in pieces that the recognizer takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lhotse.cut import Cut
from torch import Tensor

from asrkit.data.cut_audio import cut_samples
from asrkit.decoding.external.interface import TextRecognizer, Transcription
from asrkit.decoding.external.pauses import speech_pieces
from asrkit.frames import SAMPLE_RATE


@dataclass(frozen=True)
class Piece:
    """A stretch of a cut: begin and end in seconds, and its samples (num_samples,) at 16 kHz."""

    cut: Cut
    begin: float
    end: float
    samples: Tensor

    @classmethod
    def of(cls, cut: Cut, samples: Tensor, begin: float, end: float) -> Piece:
        """The stretch of the cut's ``samples``."""
        return cls(cut, begin, end, samples[round(begin * SAMPLE_RATE) : round(end * SAMPLE_RATE)])


def read_whole(cuts: Iterable[Cut], max_seconds: float | None) -> Iterator[Piece]:
    """Every cut as one piece, or as several at pauses where it is longer than ``max_seconds``."""
    for cut in cuts:
        samples = cut_samples(cut)
        seconds = len(samples) / SAMPLE_RATE
        if max_seconds is None or seconds <= max_seconds:
            yield Piece(cut, 0.0, seconds, samples)
        else:
            for begin, end in speech_pieces(samples, max_seconds):
                yield Piece.of(cut, samples, begin, end)


def batched(pieces: Iterable[Piece], max_duration: float) -> Iterator[list[Piece]]:
    """Neighbors together, up to ``max_duration`` seconds when padded to the longest."""
    waiting: list[Piece] = []
    for piece in pieces:
        longest = max(other.end - other.begin for other in [*waiting, piece])
        if waiting and longest * (len(waiting) + 1) > max_duration:
            yield waiting
            waiting = []
        waiting.append(piece)
    if waiting:
        yield waiting


def transcribe_pieces(
    recognizer: TextRecognizer, pieces: Sequence[Piece], languages: Sequence[str]
) -> list[Transcription]:
    """The recognizer's text of each piece."""
    return recognizer.transcribe([piece.samples for piece in pieces], languages)
