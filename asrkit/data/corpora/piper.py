"""Natural voices: Piper reads texts, by piper-tts (GPL-3, with an espeak-ng of its own) from voices that the user has as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asrkit.data.text.languages import language_names
from asrkit.errors import UserError, clip
from asrkit.extras import require

LENGTHS = (0.8, 1.3)  # of a phoneme, relative to the voice's own
NOISES = (0.3, 1.0)  # of the sound: 0 is always the same, 0.667 is the usual value
NOISE_WIDTHS = (0.4, 1.1)  # of the phonemes' lengths: 0.8 is usual
MAX_CONFIG = 1 << 22  # bytes


@dataclass(frozen=True)
class PiperDraw:
    """How one utterance is spoken: by which voice and, where it has several, which of its speakers, how slowly, and how varied."""

    voice: str
    speaker: int | None
    length_scale: float
    noise_scale: float
    noise_w_scale: float


class Piper:
    """Voices as files NAME.onnx, each with NAME.onnx.json beside it.

    Raises:
        UserError: the extra is not installed; files that are missing or no voices. All of them.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        require("piper", for_="--engine piper")
        if not files:
            raise UserError(
                "--engine piper: needs a voice; add --voice FILE.onnx (`python -m piper.download_voices` fetches one)"
            )
        names = [file.stem for file in files]
        findings = [
            f"--voice {file}: a voice of this name is given twice; drop one"
            for file in files
            if names.count(file.stem) > 1
        ]
        self._voices: dict[str, Any] = {}
        for file in files:
            try:
                self._voices[file.stem] = _load(file)
            except UserError as error:
                findings += error.lines
        if findings:
            raise UserError.of(list(dict.fromkeys(findings)))

    def voices(self, language: str, names: Sequence[str]) -> list[str]:
        """The voices of a language; ``names`` are espeak-ng's and must be [].

        Raises:
            UserError: there is none.
        """
        if names:
            raise UserError(
                f"--voices {','.join(names)}: are voices of espeak-ng; for --engine piper, use --voice FILE.onnx"
            )
        of_language = [name for name, voice in self._voices.items() if _speaks(voice, language)]
        if not of_language:
            others = ", ".join(f"{name} ({voice.config.espeak_voice})" for name, voice in self._voices.items())
            raise UserError(f"--lang {language}: no voice is of this language, only {others}; add --voice FILE.onnx")
        return of_language

    def draw(self, random: np.random.Generator, names: Sequence[str]) -> PiperDraw:
        """How the next utterance is spoken, by one of the voices ``names``."""
        name = str(random.choice(list(names)))
        speakers = self._voices[name].config.num_speakers
        scales = [round(float(random.uniform(*limits)), 3) for limits in (LENGTHS, NOISES, NOISE_WIDTHS)]
        return PiperDraw(name, int(random.integers(speakers)) if speakers > 1 else None, *scales)

    def say(self, text: str, draw: PiperDraw) -> tuple[np.ndarray, int]:
        """(num_samples,) int16 and their rate. The noise itself is not seeded, so equal draws sound alike and are not equal."""
        from piper import SynthesisConfig

        voice = self._voices[draw.voice]
        how = SynthesisConfig(
            speaker_id=draw.speaker,
            length_scale=draw.length_scale * voice.config.length_scale,
            noise_scale=draw.noise_scale,
            noise_w_scale=draw.noise_w_scale,
        )
        try:
            pieces = [chunk.audio_int16_array for chunk in voice.synthesize(text, how)]
        except Exception as error:  # of onnxruntime and espeak-ng, where the two files of a voice do not fit each other
            raise UserError(
                f"Piper fails at '{clip(text)}' with {draw.voice} ({clip(error)}); fetch both its files again"
            ) from error
        if not pieces:
            raise UserError(
                f"Piper makes no sound for '{text}' with {draw.voice}; remove the line or use another voice"
            )
        return np.concatenate(pieces), int(voice.config.sample_rate)


def voice_files(voices: Sequence[Path]) -> list[Path]:
    """The two files of each voice."""
    return [path for file in voices for path in (file, Path(f"{file}.json"))]


def _load(file: Path) -> Any:
    from piper import PiperVoice, SynthesisConfig

    _, config = voice_files([file])
    for path in (file, config):
        if not path.is_file():
            raise UserError(f"--voice {file}: no file {path}; a voice is NAME.onnx with NAME.onnx.json beside it")
    try:
        if config.stat().st_size > MAX_CONFIG:
            raise ValueError(f"{config.name} is larger than {MAX_CONFIG >> 20} MiB")
        json.loads(config.read_text(encoding="utf-8"))["espeak"]["voice"]
        voice = PiperVoice.load(file)
        if min(voice.config.sample_rate, voice.config.num_speakers) < 1:
            raise ValueError(f"sample_rate {voice.config.sample_rate}, num_speakers {voice.config.num_speakers}")
        last = SynthesisConfig(speaker_id=voice.config.num_speakers - 1 if voice.config.num_speakers > 1 else None)
        list(voice.synthesize("a", last))  # the two files may not fit each other
        return voice
    except Exception as error:  # of json, of onnxruntime, and whatever a stranger's values lead to
        raise UserError(
            f"--voice {file}: is not a voice for Piper ({clip(error)}); fetch both its files again"
        ) from error


def _speaks(voice: Any, language: str) -> bool:
    return not {*language_names(voice.config.espeak_voice)}.isdisjoint(language_names(language)[-1:])
