"""How far a long task is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from asrkit.reporting.console import PlainConsole

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(title: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
    """Yield a function to call with how much more of ``total`` is done; shows it on standard error."""
    console = PlainConsole(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda amount: bar.advance(task, amount)
        return
    done, shown = 0.0, time.monotonic()

    def advance(amount: float) -> None:
        nonlocal done, shown
        done += amount
        if time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            console.print(f"{title}: {done:.0f} of {total:.0f} {unit}", soft_wrap=True)

    yield advance
