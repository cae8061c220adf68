"""espeak-ng in this process: a C library with one global state, called by ctypes. The extra ``synth`` brings it (GPL-3)."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from asrkit.errors import UserError
from asrkit.extras import require

SYNCHRONOUS, UTF8 = 2, 1

_held: list[object] = []  # the library calls its callback as long as the process lives


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Within, while the library speaks, Ctrl-C waits. Python would raise it in the callback, which can only print an error and go on."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(came[0], None)


@cache
def load_espeak() -> tuple[ctypes.CDLL, int, list[np.ndarray]]:
    """The library, the rate it speaks at, and the list it puts its samples into.

    Raises:
        UserError: the extra is not installed.
    """
    espeakng_loader = require("espeak", for_="synthetic speech and phones")
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples: ctypes._Pointer[ctypes.c_short], count: int, events: int) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    rate = library.espeak_Initialize(SYNCHRONOUS, 0, str(espeakng_loader.get_data_path()).encode(), 0)
    if rate <= 0:
        raise UserError("espeak-ng does not start; reinstall it: pip install --force-reinstall espeakng-loader")
    library.espeak_SetSynthCallback(collect)
    _held.append(collect)
    return library, rate, pieces
