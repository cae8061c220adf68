"""Synthetic speech as devices would have recorded it: overdriven, and through a lossy codec. lhotse's transforms, by soundfile."""

from __future__ import annotations

import numpy as np
from lhotse.augmentation import Clipping, Compress

from asrkit.frames import SAMPLE_RATE

GAIN_DB = (3.0, 15.0)  # before it is clipped
CODECS = ("opus", "mp3", "vorbis")
COMPRESSION = (0.2, 0.99)  # 1 is the most


def through_a_device(samples: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, dict[str, float | str]]:
    """Samples (num_samples,) at 16 kHz as a device would have them, and how: softly clipped or not, then through a codec."""
    how: dict[str, float | str] = {}
    if random.uniform() < 0.5:
        how["gain_db"] = round(float(random.uniform(*GAIN_DB)), 1)
        samples = Clipping(hard=False, gain_db=float(how["gain_db"]))(samples[None], SAMPLE_RATE)[0]
    how["codec"], how["compression"] = str(random.choice(CODECS)), round(float(random.uniform(*COMPRESSION)), 2)
    coded = Compress(how["codec"], float(how["compression"]))(samples[None].astype(np.float32), SAMPLE_RATE)[0]
    length = len(samples)  # a codec adds a few samples, or drops them
    return np.pad(coded[:length], (0, max(0, length - len(coded)))).astype(np.float32), how
