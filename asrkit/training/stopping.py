"""How a run is asked to stop: it obeys SIGINT and SIGTERM at points where its state can be saved."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = (
    1.0  # seconds; launchers such as timeout and torchrun send their signal twice within this time, people do not
)


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; ``code`` is the process's exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"interrupted by signal {code - 128}")
        self.code = code


class Stopped(Exception):
    """Raised by a signal within ``Stopping.at_once``."""


class Stopping:
    """Whether a signal has asked the run to stop. ``code`` is the exit code: 130 for SIGINT, 143 for SIGTERM, 0 before."""

    def __init__(self) -> None:
        self.code = 0
        self._asked = 0.0
        self._at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that can be interrupted anywhere and repeated later: a signal ends it at once.

        Raises:
            Stopped: a signal came, now or before.
        """
        self._at_once = True
        try:
            if self.code:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def remember(self, number: int, frame: object) -> None:
        """The signal handler."""
        if self.code and number == signal.SIGINT and time.monotonic() - self._asked > PATIENCE:
            raise KeyboardInterrupt  # somebody pressed Ctrl-C again: stop without saving
        if not self.code:
            self.code, self._asked = 128 + number, time.monotonic()
        if self._at_once:
            self._at_once = False  # the same signal a second time must not interrupt the clean-up
            raise Stopped


@contextmanager
def watched_signals() -> Iterator[Stopping]:
    """Record SIGINT and SIGTERM instead of ending the process."""
    stopping = Stopping()
    previous = {number: signal.signal(number, stopping.remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
