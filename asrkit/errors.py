"""The one exception for what a user can mend: a line says what, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in the user's input; the command line prints it without a traceback and exits with 1.

    Each element of ``lines`` is one finding: what is wrong, where (file, cut id, field), what to do.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines

    @classmethod
    def of(cls, lines: Sequence[str]) -> UserError:
        """Join several findings into one error, so that the user sees all of them at once."""
        return cls(*lines)
