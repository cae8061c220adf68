"""Where texts of others are shown: as they are, whatever they look like."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from asrkit.errors import printable


class PlainConsole(Console):
    """A console to which ``[b]`` and ``:smile:`` are texts like any other, and that passes no control characters on to a terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)
