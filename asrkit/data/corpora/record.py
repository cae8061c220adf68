"""A folder that a command makes says, in a file of its own, what was asked of the command, and whether it has finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asrkit.disk import atomic_write
from asrkit.errors import UserError, clip

UNFINISHED = {"finished": False}


def already_made(record: Path, wanted: Mapping[str, Any], manifest: Path, *, replace: bool = False) -> bool:
    """Whether the folder is complete and holds exactly this.

    Args:
        manifest: what the command makes and other commands read.
        replace: what an earlier run made by other options may be replaced.

    Raises:
        UserError: the folder holds a manifest that must not be replaced: one that no record speaks of, or, unless
            ``replace``, one made by other options.
    """
    if not manifest.exists() or (made := read_record(record)) == UNFINISHED:
        return False
    if made is None:
        raise UserError(
            f"{manifest}: already exists, and this command has not made it; give another --out, or remove the file"
        )
    if made != wanted and not replace:
        changed = [name for name in sorted({*made, *wanted}) if made.get(name) != wanted.get(name)]
        raise UserError(
            f"{record.parent}: already holds what other texts or options made ({clip(', '.join(changed))}); give another --out, or remove the folder"
        )
    return made == wanted


def begin(record: Path, manifest: Path) -> None:
    """From here on the folder is between two states, and what it holds may be replaced."""
    write_record(record, UNFINISHED)
    manifest.unlink(missing_ok=True)


def write_record(record: Path, wanted: Mapping[str, Any]) -> None:
    """Say what was asked for; of a command whose work takes long, last."""
    with atomic_write(record) as temporary:
        temporary.write_text(json.dumps(wanted), encoding="utf-8")


def read_record(record: Path) -> dict[str, Any] | None:
    """What a record says; None if there is none, or if it cannot be read."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
