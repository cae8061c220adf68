"""Text that grows: one line rewritten on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import shutil
from typing import TextIO

from rich.cells import cell_len

from asrkit.errors import visible

CLEAR_LINE = "\r\x1b[K"


def show_partial(out: TextIO, time: float, text: str) -> None:
    """The text so far, which may change; ``time`` is in seconds. A terminal shows as much of its end as fits."""
    text = visible(text)
    if out.isatty():
        out.write(CLEAR_LINE + _ending(text, shutil.get_terminal_size().columns - 1))
    else:
        out.write(f"{time:8.2f}  partial  {text}\n")
    out.flush()


def show_final(out: TextIO, time: float, text: str) -> None:
    """A text that stays."""
    text = visible(text)
    out.write(f"{CLEAR_LINE if out.isatty() else ''}{time:8.2f}  {'' if out.isatty() else 'final    '}{text}\n")
    out.flush()


def _ending(text: str, width: int) -> str:
    """As much of the end of ``text`` as ``width`` columns take."""
    while cell_len(text) > width:
        text = text[1:]
    return text
