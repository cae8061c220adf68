"""Audio files of any length as pieces a model can take, read in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from asrkit.data.features import can_resample, resample
from asrkit.errors import UserError
from asrkit.frames import SAMPLE_RATE

MAX_SECONDS = 30.0
MIN_SECONDS = 10.0  # a cut is looked for between the two
HOP_SECONDS = 0.02
MIN_SAMPLES = SAMPLE_RATE // 10
PAUSE_SECONDS = 0.3  # the pause looked for; shorter minima lie inside words


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording: begin and length in seconds, and its samples (num_samples,) at 16 kHz."""

    start: float
    seconds: float
    samples: Tensor


def quietest_point(samples: np.ndarray, rate: int) -> int:
    """The index of the quietest ``PAUSE_SECONDS`` from ``MIN_SECONDS`` on, the last of equals."""
    hop, first = max(1, round(HOP_SECONDS * rate)), round(MIN_SECONDS * rate)
    span = round(PAUSE_SECONDS / HOP_SECONDS)
    count = (len(samples) - first) // hop
    energy = np.square(samples[first : first + count * hop], dtype=np.float64).reshape(count, hop).sum(axis=1)
    smooth = np.convolve(energy, np.ones(span), mode="valid")
    quietest = len(smooth) - 1 - int(smooth[::-1].argmin())
    return first + quietest * hop + span * hop // 2


def mono_blocks(path: Path, seconds: float) -> Iterator[tuple[np.ndarray, int]]:
    """Read any file soundfile can, downmixed, in blocks (num_samples,) float32 of ``seconds``, each with the file's rate.

    Raises:
        UserError: missing, unreadable or empty file, or samples that are not numbers.
    """
    import soundfile

    if not path.is_file():
        raise UserError(f"{path}: {'is a directory; give the files in it' if path.is_dir() else 'no such file'}")
    done = 0
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = file.samplerate
            if not can_resample(rate):
                raise UserError(
                    f"{path}: has {rate} samples a second, which takes too much memory to resample; convert it to 16 kHz"
                )
            for block in file.blocks(blocksize=max(1, round(seconds * rate)), dtype="float32", always_2d=True):
                if not np.isfinite(block).all():
                    raise UserError(f"{path}: holds samples that are not numbers, after {done / rate:.0f} s")
                done += len(block)
                yield block.mean(axis=1), rate
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot read audio ({reason}); convert it to wav or flac") from error
    if done == 0:
        raise UserError(f"{path}: the audio is empty")


def read_pieces(path: Path) -> Iterator[Piece]:
    """Read any file soundfile can, downmixed and resampled, parted at pauses into at most ``MAX_SECONDS``.

    Raises:
        UserError: missing, unreadable or empty file, or samples that are not numbers.
    """
    done, rate, waiting = 0, SAMPLE_RATE, np.zeros(0, dtype=np.float32)
    for block, rate in mono_blocks(path, MAX_SECONDS):
        waiting = np.concatenate([waiting, block])
        limit = round(MAX_SECONDS * rate)
        while len(waiting) > limit:
            cut = quietest_point(waiting[:limit], rate)
            yield _piece(waiting[:cut], done, rate)
            done, waiting = done + cut, waiting[cut:]
    if len(waiting):
        yield _piece(waiting, done, rate)


def _piece(samples: np.ndarray, start: int, rate: int) -> Piece:
    resampled = resample(torch.from_numpy(samples.copy()), rate, SAMPLE_RATE)
    # Less than one encoder frame is silence to the model; the features need a window to look at.
    return Piece(start / rate, len(samples) / rate, pad(resampled, (0, max(0, MIN_SAMPLES - len(resampled)))))
