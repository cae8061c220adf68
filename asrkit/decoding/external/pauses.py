"""Where somebody speaks, by the voice activity detector that faster-whisper ships (Silero): long recordings are cut at pauses."""

from __future__ import annotations

from torch import Tensor

from asrkit.extras import require
from asrkit.frames import SAMPLE_RATE

PAUSE_SECONDS = 0.5  # a shorter one is not cut at
LONG_PAUSE_SECONDS = 1.0  # a longer one is left out even where both sides would fit together
MARGIN_SECONDS = 0.2  # before and after the speech


def speech_pieces(samples: Tensor, max_seconds: float) -> list[tuple[float, float]]:
    """The stretches (begin, end), in seconds, of a recording (num_samples,) at 16 kHz in which somebody speaks.

    They are at most ``max_seconds`` long and part at pauses, neighbors together as long as they fit; [] where nobody speaks. Where
    somebody speaks longer without a pause, the detector parts at the least likely speech.

    Raises:
        UserError: faster-whisper is not installed.
    """
    require("whisper", for_="voice activity detection")
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    options = VadOptions(
        min_silence_duration_ms=round(1000 * PAUSE_SECONDS),
        speech_pad_ms=round(1000 * MARGIN_SECONDS),
        max_speech_duration_s=max_seconds,
    )
    pieces: list[tuple[float, float]] = []
    for stretch in get_speech_timestamps(samples.numpy(), options):
        begin, end = stretch["start"] / SAMPLE_RATE, min(stretch["end"], len(samples)) / SAMPLE_RATE
        if pieces and end - pieces[-1][0] <= max_seconds and begin - pieces[-1][1] <= LONG_PAUSE_SECONDS:
            pieces[-1] = (pieces[-1][0], end)
        else:
            pieces.append((begin, end))
    return pieces
