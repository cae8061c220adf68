"""A folder that a command makes says, in a file written last, what was asked of the command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from asrkit.disk import atomic_write


def already_made(record: Path, wanted: Mapping[str, Any], files: Iterable[Path]) -> bool:
    """Whether the folder is complete and holds exactly this; a record that cannot be read says no, and so does a file of ``files``
    that is gone."""
    try:
        return all(file.is_file() for file in files) and bool(json.loads(record.read_text(encoding="utf-8")) == wanted)
    except (OSError, ValueError, RecursionError):
        return False


def write_record(record: Path, wanted: Mapping[str, Any]) -> None:
    """Say that the folder is complete."""
    with atomic_write(record) as temporary:
        temporary.write_text(json.dumps(wanted), encoding="utf-8")
