"""The one exception for what a user can fix: a line says what, where, and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

MAX_LINE = 4000  # characters of a line: enough for every message, and somebody else's text floods no terminal
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]"
)  # also halves of characters, which no file takes


def clip(value: Any, limit: int = 200) -> str:
    """A value of somebody else's file as it goes into a message: one line of at most ``limit`` characters."""
    text = str(value)
    text = " ".join(visible(text[: 4 * limit]).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def visible(text: str) -> str:
    """Text of somebody else's file without what moves a terminal, whole."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def printable(lines: str) -> str:
    """Text of somebody else's file as a terminal may show it: no control characters, no endless lines."""
    return "\n".join(visible(line[:MAX_LINE]) for line in lines.split("\n"))


class UserError(Exception):
    """A mistake in the user's input; the command line prints it without a traceback and exits with 1.

    Each element of ``lines`` is one finding: what is wrong, where (file, cut id, field), what to do.
    """

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(map(printable, lines))
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, ...]]:
        return type(self), self.lines  # it crosses the borders of processes

    @classmethod
    def of(cls, lines: Sequence[str]) -> UserError:
        """Join several findings into one error, so that the user sees all of them at once."""
        return cls(*lines)
