"""External recognizers behind one interface: samples in, texts with confidences out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from asrkit.config import digest
from asrkit.data.text.normalization import TextError, normalize
from asrkit.disk import sha256_of

WHISPER, SHERPA = "whisper:", "sherpa-onnx:"


@dataclass(frozen=True)
class Transcription:
    """What a recognizer makes of one utterance.

    text: as the recognizer writes it. confidence: the geometric mean of its tokens' probabilities, in 0..1; None if the recognizer gives
    none. language: the one given, or detected; "" if it does not say. no_speech: the probability that nobody speaks, if it gives one.
    """

    text: str
    confidence: float | None
    language: str
    no_speech: float | None = None


class TextRecognizer(Protocol):
    """A recognizer that need not be asrkit's.

    name: as the user wrote it. sha256: of its files. num_bytes: of the files it recognizes with. search, beam, context: as in a result.
    device, threads: where it runs. max_seconds: the longest utterance that it takes at once, or None.
    """

    name: str
    sha256: str
    num_bytes: int
    search: str
    beam: int | None
    context: str
    device: str
    threads: int
    max_seconds: float | None

    def check_language(self, language: str) -> str | None:
        """Why utterances of this language cannot be recognized; None if they can. "" is for one that is not known."""

    def transcribe(self, waves: Sequence[Tensor], languages: Sequence[str]) -> list[Transcription]:
        """Each utterance's text. waves: (num_samples,) float32 at 16 kHz; languages: "" where it is to be detected.

        Raises:
            UserError: the recognizer failed.
        """

    def close(self) -> None:
        """Give back what it holds; it cannot be used afterwards."""


def is_external(spec: str) -> bool:
    """Whether ``spec`` names an external recognizer, and not a directory that asrkit wrote."""
    return spec.startswith((WHISPER, SHERPA))


def identify(files: Sequence[Path]) -> tuple[str, int]:
    """The SHA-256 and the bytes of a recognizer's files together."""
    contents = sorted((path.name, sha256_of(path)) for path in files)
    return digest(contents), sum(path.stat().st_size for path in files)


def spoken_words(text: str, language: str) -> tuple[str, str | None]:
    """A text as words, normalized as everywhere, and why that is not certain.

    A text without words, or nothing but a note such as [music], has none. Where the words are uncertain (1984, 20 %), they are those
    of the text without what is uncertain.
    """
    try:
        return normalize(text, language), None
    except TextError as error:
        reason = error.reason
    if reason in ("no words", "non-speech"):
        return "", None
    # Letters and spaces have one reading each.
    rest = "".join(character if character.isalpha() or character in "'’" else " " for character in text)
    try:
        return normalize(rest, language), reason
    except TextError:
        return "", reason
