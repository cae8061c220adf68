"""Forks of this process that compute parts of some work; see ``Pool`` in ``parallel.py``."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

from asrkit.errors import UserError

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def may_fork() -> bool:
    """Whether this process can have children: it is no daemon, has no threads of Ray's, and the system forks."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return False
    return "fork" in multiprocessing.get_all_start_methods() and not multiprocessing.current_process().daemon


def end_with(parent: int | None) -> None:
    """Let this process be killed when the one that started it ends, where the system can do that.

    Args:
        parent: the one that started it; None: which it is does not matter.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)  # it ended before this could be asked for


def attempt(function: Callable[[Any], Any], part: Any) -> bytes:
    """Whether ``function`` succeeded on a part, and its result or error, pickled."""
    try:
        result = (True, function(part))
    except UserError as error:
        result = (False, error)
    except Exception as error:  # a bug: its traceback would be lost with this process
        result = (False, RuntimeError(f"{error!r}\n{traceback.format_exc()}"))
    # Plain pickles: those of multiprocessing have torch share each tensor by an open file, of which there may be too few.
    return pickle.dumps(result)


class Forks:
    """Forks of this process; see ``Pool``."""

    def __init__(
        self, function: Callable[[Any], Any], parts: Sequence[Any], size: int, describe: Callable[[Any], str]
    ) -> None:
        self.size, self._parts, self._describe = size, parts, describe
        self._workers = [_Worker(function, parts, number) for number in range(size)]

    def give(self, worker: int, part: int) -> None:
        self._workers[worker].give(part)

    def take(self) -> tuple[int, int, bool, Any]:
        connection, *_ = wait([worker.connection for worker in self._workers if worker.part is not None])
        worker = next(one for one in self._workers if one.connection is connection)
        part = worker.part
        assert part is not None
        try:
            return (worker.number, part, *worker.take())
        except (EOFError, OSError):
            raise UserError(worker.death(self.size, self._describe(self._parts[part]))) from None

    def end(self) -> None:
        for worker in self._workers:
            worker.end()


class _Worker:
    """A process that is given the numbers of parts and sends results. ``part``: the one it computes now."""

    def __init__(self, function: Callable[[Any], Any], parts: Sequence[Any], number: int) -> None:
        context = multiprocessing.get_context("fork")
        self.number, self.part = number, None  # type: int, int | None
        self.connection, theirs = context.Pipe()
        self.process: ForkProcess = context.Process(
            target=_work, args=(function, parts, theirs, self.connection, os.getpid()), daemon=True
        )
        self.process.start()
        theirs.close()

    def give(self, part: int) -> None:
        self.part = part
        with suppress(OSError):  # it has ended; ``take`` meets that
            self.connection.send(part)

    def take(self) -> tuple[bool, Any]:
        result: tuple[bool, Any] = pickle.loads(self.connection.recv_bytes())
        self.part = None
        return result

    def death(self, jobs: int, doing: str) -> str:
        """Why it died, and what to do."""
        self.process.join(5)
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        if code == -signal.SIGKILL:
            how += ", most likely because memory ran out"
        return f"process {self.number + 1} of {jobs} (pid {self.process.pid}) {how}, at {doing}; run it again with a lower --jobs"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(
    function: Callable[[Any], Any], parts: Sequence[Any], connection: Connection, parents: Connection, parent: int
) -> None:
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(parent)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # its threads do not survive a fork
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        connection.send_bytes(attempt(function, parts[number]))
