"""Frames and their times: the only place that knows how long a frame is and how many there are.

A *feature frame* comes every 10 ms and sees 25 ms of sound. The subsampling turns 4 of them into one *encoder frame*, without
padding: encoder frame t sees the feature frames 4 t to 4 t + 6.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Frames = TypeVar("Frames", float, np.ndarray)

SAMPLE_RATE = 16000
SHIFT_SAMPLES = 160  # from one feature frame to the next
WINDOW_SAMPLES = 400  # what one feature frame sees, centered: samples 160 i - 120 to 160 i + 279
FRAME_SHIFT = SHIFT_SAMPLES / SAMPLE_RATE  # 0.01 s

SUBSAMPLING = 4
RECEPTIVE_FIELD = 7  # feature frames that one encoder frame sees, so the fewest that give one
LOOK_AHEAD = RECEPTIVE_FIELD - SUBSAMPLING  # 3: feature frames a chunk sees beyond its own 4 c

ENCODER_SHIFT = SUBSAMPLING * SHIFT_SAMPLES / SAMPLE_RATE  # 0.04 s
ENCODER_SHIFT_MS = 1000 * ENCODER_SHIFT
# Encoder frame t is centered on the feature frame 4 t + 3, which is centered half a shift after its 10 ms begin.
_FIRST_CENTER = (RECEPTIVE_FIELD // 2 * SHIFT_SAMPLES + SHIFT_SAMPLES // 2) / SAMPLE_RATE  # 0.035 s
_FIRST_START = (RECEPTIVE_FIELD - SUBSAMPLING) * SHIFT_SAMPLES / 2 / SAMPLE_RATE  # 0.015 s
# The last feature frame of a chunk that ends before encoder frame n is 4 n + 2; its window ends 37.5 ms after 40 n.
LOOK_AHEAD_MS = 1000 * ((LOOK_AHEAD - 1) * SHIFT_SAMPLES + (SHIFT_SAMPLES + WINDOW_SAMPLES) // 2) / SAMPLE_RATE


def count_features(seconds: float) -> int:
    """Feature frames of so much sound, as the extractor counts them: one for each 10 ms, the last one from its half on."""
    return (round(seconds * SAMPLE_RATE) + SHIFT_SAMPLES // 2) // SHIFT_SAMPLES


def count_encoder_frames(num_features: int) -> int:
    """T' = (T - 3) // 4, never below 0."""
    return max(0, (num_features - LOOK_AHEAD) // SUBSAMPLING)


def count_window(num_encoder_frames: int) -> int:
    """Feature frames that so many encoder frames are computed from, 4 c + 3."""
    return SUBSAMPLING * num_encoder_frames + LOOK_AHEAD


def encoder_start(frame: Frames) -> Frames:
    """The second at which the 40 ms of encoder frame t begin: 40 t + 15 ms. Frame t + 1 begins where frame t ends."""
    return frame * ENCODER_SHIFT + _FIRST_START


def encoder_center(frame: Frames) -> Frames:
    """The second in the middle of what encoder frame t sees: 40 t + 35 ms."""
    return frame * ENCODER_SHIFT + _FIRST_CENTER
