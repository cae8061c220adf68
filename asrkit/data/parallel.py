"""One function over the parts of some work, in several processes of this machine, with the results of one process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from asrkit.errors import UserError

P = TypeVar("P")
R = TypeVar("R")
AHEAD = 4  # parts that each process may be ahead of the results that are taken
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def may_fork() -> bool:
    """Whether this process can have children: it is no daemon, and the system forks."""
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


def in_processes(
    function: Callable[[P], R],
    parts: Sequence[P],
    jobs: int,
    describe: Callable[[P], str] = str,
    threads: bool = False,
) -> Iterator[R]:
    """``function`` of each part, in order; the parts do not depend on ``jobs``, so neither do the results.

    The processes are forks of this one: they share what it has in memory (models, tables of cuts), and only results are sent. Each
    computes with one thread. With one job everything happens in this process; with several, nothing does, even if there is only one
    part, as the threads that k2 begins with its first search would be missing in the forks of a later call.

    Args:
        function: returns what can be pickled; a GPU that was used before cannot be used in it.
        describe: names a part in messages.
        threads: with one job, use several threads of this process: for what works mostly outside Python's lock, as libsndfile does.

    Raises:
        UserError: that of the first part that has one; a process that was killed, with its number, pid and part.
    """
    if jobs <= 1 and threads:
        with ThreadPoolExecutor() as pool:
            yield from pool.map(function, parts)
        return
    if jobs <= 1:
        yield from map(function, parts)
        return
    if not may_fork():
        raise UserError("--jobs: this system or process cannot fork; leave --jobs out")
    jobs = min(jobs, len(parts))
    workers = [_Worker(function, parts, number) for number in range(jobs)]
    try:
        results: dict[int, tuple[bool, Any]] = {}
        given = taken = 0
        while taken < len(parts):
            for worker in workers:
                if worker.part is None and given < min(len(parts), taken + AHEAD * jobs):
                    worker.give(given)
                    given += 1
            while taken not in results:
                for connection in wait([worker.connection for worker in workers if worker.part is not None]):
                    worker = next(one for one in workers if one.connection is connection)
                    part = worker.part
                    assert part is not None
                    try:
                        results[part] = worker.take()
                    except (EOFError, OSError):
                        raise UserError(worker.death(jobs, describe(parts[part]))) from None
                    if given < min(len(parts), taken + AHEAD * jobs):
                        worker.give(given)
                        given += 1
            fine, result = results.pop(taken)
            if not fine:
                raise result
            taken += 1
            yield result
    finally:
        for worker in workers:
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
        # Plain pickles: those of multiprocessing have torch share each tensor by an open file, of which there may be too few.
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
        try:
            result = (True, function(parts[number]))
        except UserError as error:
            result = (False, error)
        except Exception as error:  # a bug: its traceback would be lost with this process
            result = (False, RuntimeError(f"{error!r}\n{traceback.format_exc()}"))
        connection.send_bytes(pickle.dumps(result))
