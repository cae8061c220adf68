"""A run directory or an exported model of asrkit as a recognizer of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from asrkit.data.augment import pad
from asrkit.data.features import fbank
from asrkit.decoding.external.interface import Transcription
from asrkit.decoding.recognizer import load_recognizer
from asrkit.decoding.search import Method, decode


class OwnRecognizer:
    """A model of asrkit, in its default variant and context; see ``TextRecognizer``.

    The confidence is that of the whole path, blanks included, per token.

    Raises:
        UserError: see ``load_recognizer``.
    """

    max_seconds: float | None = None

    def __init__(
        self, spec: str, method: Method = "beam", beam: int = 4, device: str = "auto", threads: int | None = None
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._recognizer = load_recognizer(Path(spec), device, methods=[method])
        self._method: Method = method
        self._beam = beam
        self.search: str = method
        self.name, self.beam = spec, beam if method == "beam" else None
        self.sha256, self.context = self._recognizer.weights_sha256, str(self._recognizer.context)
        self.num_bytes = sum(
            file.stat().st_size for suffix in ("safetensors", "onnx", "pt") for file in Path(spec).glob(f"*.{suffix}")
        )
        self.device, self.threads = str(self._recognizer.device), torch.get_num_threads()

    def check_language(self, language: str) -> str | None:
        """See ``TextRecognizer``."""
        known, only = self._recognizer.languages, self._recognizer.language
        if only is not None and language not in ("", only):
            return f"{self.name} was exported for {only}, not for {language}"
        if known and language not in known:
            return f"{self.name} takes the language as an input, one of {', '.join(known)}, not {language or 'none'}"
        return None

    def transcribe(self, waves: Sequence[Tensor], languages: Sequence[str]) -> list[Transcription]:
        """See ``TextRecognizer``."""
        features, lens = pad([fbank(wave) for wave in waves])
        tokenizer = self._recognizer.tokenizer
        hypotheses = decode(
            self._recognizer.model, features, lens, self._method, self._beam, list(languages), tokenizer.special_ids
        )
        return [
            Transcription(
                tokenizer.decode(hypothesis.tokens),
                math.exp(min(0.0, hypothesis.score / len(hypothesis.tokens))) if hypothesis.tokens else None,
                language,
            )
            for hypothesis, language in zip(hypotheses, languages, strict=True)
        ]

    def close(self) -> None:
        """See ``TextRecognizer``."""
