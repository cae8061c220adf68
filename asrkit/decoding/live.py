"""Where a stream's sound comes from: a file at the pace it was spoken, or raw samples from a pipe."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asrkit.data.features import SAMPLE_RATE, load_samples
from asrkit.errors import UserError

BLOCK_SECONDS = 0.1
BLOCK = round(BLOCK_SECONDS * SAMPLE_RATE)
PCM_SCALE = 32768.0


def file_blocks(path: Path, paced: bool, stopped: Callable[[], bool] = lambda: False) -> Iterator[Tensor]:
    """The samples of a file (num_samples,) at 16 kHz in blocks of 0.1 s, ``paced`` as a microphone would give them.

    The whole file is in memory: 64 kB a second.

    Args:
        stopped: asked before each block; the sound ends when it says so.

    Raises:
        UserError: missing, unreadable or empty file, or samples that are not numbers.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    samples = load_samples(path)
    if not bool(samples.isfinite().all()):
        raise UserError(f"{path}: holds samples that are not numbers")
    began = time.monotonic()
    for number, block in enumerate(samples.split(BLOCK)):
        if paced:
            time.sleep(max(0.0, began + number * BLOCK_SECONDS + len(block) / SAMPLE_RATE - time.monotonic()))
        if stopped():
            return
        yield block


def pcm_blocks(descriptor: int, stopped: Callable[[], bool] = lambda: False) -> Iterator[Tensor]:
    """Raw samples from a pipe or file, 16-bit little-endian, 16 kHz, mono, as they come: (num_samples,) float32.

    Args:
        descriptor: an open file's number; 0 is standard input.
        stopped: asked at least every 0.1 s; the sound ends when it says so. Half a sample at the end is dropped.
    """
    rest = b""
    while not stopped():
        if not select.select([descriptor], [], [], BLOCK_SECONDS)[0]:
            continue
        received = os.read(descriptor, 1 << 16)
        if not received:
            return
        received = rest + received
        whole = len(received) // 2 * 2
        rest = received[whole:]
        if whole:
            yield torch.from_numpy(np.frombuffer(received[:whole], dtype="<i2").astype(np.float32) / PCM_SCALE)


@contextmanager
def until_interrupted() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed, so that what was heard so far can be finished.

    A second Ctrl-C interrupts at once.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, remember)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
