"""A test that hangs fails, and says where.

Most hangs are a wait for another process. pytest's own ``faulthandler_timeout`` (pyproject.toml) prints the stacks of this process
alone and ends it; a little earlier, the processes below it print theirs and end, which most often ends the wait as well.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

os.environ["PYTHONFAULTHANDLER"] = "1"  # Python prints its stacks when it is aborted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    limit = float(item.config.getini("faulthandler_timeout"))
    if limit <= 0:
        return (yield)
    timer = threading.Timer(0.8 * limit, _abort, [os.getpid()])
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


def _abort(parent: int) -> None:
    processes = list(_below(parent))
    for process in processes:  # so that none ends because another one has
        _send(process, signal.SIGSTOP)
    for process in processes:
        _send(process, signal.SIGABRT)
        _send(process, signal.SIGCONT)
        time.sleep(0.2)  # two that print at once mix their lines


def _send(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _below(parent: int) -> Iterator[int]:
    """The processes that a process has started, and those that these have."""
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(FileNotFoundError):  # a thread that has ended
            for child in map(int, children.read_text().split()):
                yield child
                yield from _below(child)
