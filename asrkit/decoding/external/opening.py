"""From what a user names to a recognizer: ``whisper:NAME_OR_PATH``, ``sherpa-onnx:DIR``, or a directory that asrkit wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from asrkit.decoding.external.interface import SHERPA, WHISPER, TextRecognizer


@contextmanager
def open_text_recognizer(spec: str, **options: Any) -> Iterator[TextRecognizer]:
    """The recognizer that ``spec`` names.

    Args:
        options: method (greedy, beam or ctc), beam, device and threads; what is left out is the recognizer's own default.

    Raises:
        UserError: it is not on this machine, or cannot be loaded; says what to do.
    """
    if spec.startswith(WHISPER):
        from asrkit.decoding.external.whisper import WhisperRecognizer

        recognizer: TextRecognizer = WhisperRecognizer(spec, **options)
    elif spec.startswith(SHERPA):
        from asrkit.decoding.external.sherpa import SherpaRecognizer

        recognizer = SherpaRecognizer(spec, **options)
    else:
        from asrkit.decoding.external.own import OwnRecognizer

        recognizer = OwnRecognizer(spec, **options)
    try:
        yield recognizer
    finally:
        recognizer.close()
