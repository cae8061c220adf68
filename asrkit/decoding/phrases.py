"""Lists that a user writes: words, phrases or sentences, one a line."""

from __future__ import annotations

from pathlib import Path

from asrkit.errors import UserError

MAX_BYTES = 8 << 20  # such a list is in memory with everything that is made of it


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 file with one of ``what`` a line, such as "sentence".

    Raises:
        UserError: it cannot be read, or is larger than ``MAX_BYTES``.
    """
    try:
        with path.open("rb") as file:  # not by its size: a pipe or a device has none
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(
                f"{path}: is larger than {MAX_BYTES >> 20} MiB; give a shorter list, with one {what} a line"
            )
        return content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read ({error}); give a UTF-8 file with one {what} a line") from error
