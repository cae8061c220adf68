"""Where a stream's sound comes from: a file at the pace it was spoken, or raw samples from a pipe."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asrkit.data.features import OnlineResample
from asrkit.decoding.windows import mono_blocks
from asrkit.errors import UserError
from asrkit.frames import SAMPLE_RATE

BLOCK_SECONDS = 0.1
PCM_SCALE = 32768.0
HEADERS = {b"RIFF": "RIFF", b"fLaC": "fLaC", b"OggS": "OggS", b"ID3": "ID3"}


def file_blocks(path: Path, paced: bool, stopped: Callable[[], bool] = lambda: False) -> Iterator[Tensor]:
    """The samples of a file (num_samples,) at 16 kHz in blocks of about 0.1 s, ``paced`` as a microphone would give them.

    Blocks are read as they are asked for, so memory does not grow with the file.

    Args:
        stopped: called before each block; the sound ends when it returns True.

    Raises:
        UserError: missing, unreadable or empty file, or samples that are not numbers.
    """
    began, num_samples = time.monotonic(), 0
    for block in filter(len, _resampled(mono_blocks(path, BLOCK_SECONDS))):
        num_samples += len(block)
        if paced:
            time.sleep(max(0.0, began + num_samples / SAMPLE_RATE - time.monotonic()))
        if stopped():
            return
        yield block


def _resampled(blocks: Iterable[tuple[np.ndarray, int]]) -> Iterator[Tensor]:
    """Blocks of one recording, each with its rate, at 16 kHz."""
    resampler = None
    for samples, rate in blocks:
        resampler = resampler or OnlineResample(rate)
        yield resampler.accept(torch.from_numpy(samples))
    if resampler is not None:
        yield resampler.finish()


def pcm_blocks(descriptor: int, stopped: Callable[[], bool] = lambda: False) -> Iterator[Tensor]:
    """Raw samples from a pipe or file, 16-bit little-endian, 16 kHz, mono, as they come: (num_samples,) float32.

    Args:
        descriptor: an open file's number; 0 is standard input.
        stopped: called at least every 0.1 s; the sound ends when it returns True. Half a sample at the end is dropped.

    Raises:
        UserError: there is no sample, or it is a file with a header.
    """
    head = rest = b""
    while not stopped():
        if not select.select([descriptor], [], [], BLOCK_SECONDS)[0]:
            continue
        received = os.read(descriptor, 1 << 16)
        head += received[: 4 - len(head)]
        if begins := _header(head):
            raise UserError(
                f"-: begins with {begins}, so it is a file with a header, not raw samples; give the file's name, or pipe it "
                "through ffmpeg -i - -f s16le -ar 16000 -ac 1 -"
            )
        if not received:
            if len(head) < 2:
                raise UserError("-: the audio is empty")
            return
        received = rest + received
        whole = len(received) // 2 * 2
        rest = received[whole:]
        if whole:
            yield torch.from_numpy(np.frombuffer(received[:whole], dtype="<i2").astype(np.float32) / PCM_SCALE)


def _header(head: bytes) -> str | None:
    """What the first four bytes are the header of. Two loud samples can look like that of an MP3, at one stream in 30,000."""
    for magic, name in HEADERS.items():
        if head.startswith(magic):
            return name
    if len(head) == 4 and head[:2] in (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"):
        bit_rate, sampling_rate = head[2] >> 4, head[2] >> 2 & 3
        if 0 < bit_rate < 15 and sampling_rate < 3:
            return "a frame of MP3"
    return None


@contextmanager
def until_interrupted() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed, so that the sound so far can be decoded to its end.

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
