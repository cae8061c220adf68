"""What was found out about manifests, remembered by their digests, so that a large one is not checked at every start.

Each result is a small file under ``$ASRKIT_CACHE``, else ``$XDG_CACHE_HOME/asrkit``, else ``~/.cache/asrkit``. All of them are safe
to delete at any time. One that is damaged, or of another version, counts as not there; one that nobody used for long is removed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from asrkit import __version__
from asrkit.config import digest
from asrkit.disk import atomic_write
from asrkit.errors import UserError

FORMAT = 1  # raise it when a check changes what it finds
WORTH = 1000  # cuts; a smaller manifest is checked again in less time than a user notices
UNUSED_DAYS, MOST = 90, 500  # of the files that are kept


def folder() -> Path:
    """Where the files lie."""
    if own := os.environ.get("ASRKIT_CACHE"):
        return Path(own) / "checks"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "asrkit" / "checks"


def recall(kind: str, key: Sequence[str]) -> dict[str, np.ndarray] | None:
    """What ``remember`` was given under this kind and key, or None."""
    path, title = _path_and_title(kind, key)
    try:
        header, _, body = path.read_bytes().partition(b"\n")
        expected = json.dumps({**title, "sha256": hashlib.sha256(body).hexdigest()}).encode()
        if header != expected:
            return None
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
            known = dict(arrays)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    with suppress(OSError):  # where nothing can be written
        os.utime(path)  # those that nobody uses are removed
    return known


def remember(kind: str, key: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays; where nothing can be written, they are found out again next time."""
    path, title = _path_and_title(kind, key)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict[str, Any](arrays))
    body = buffer.getvalue()
    header = json.dumps({**title, "sha256": hashlib.sha256(body).hexdigest()})
    with suppress(UserError), atomic_write(path) as temporary:
        temporary.write_bytes(header.encode() + b"\n" + body)
    _remove_unused()


def _remove_unused() -> None:
    """Remove the files that were not used for ``UNUSED_DAYS``, and the longest unused beyond ``MOST`` of them."""
    with suppress(OSError):  # another process may remove them as well
        used = sorted(((path.stat().st_mtime, path) for path in folder().iterdir()), reverse=True)
        oldest = time.time() - UNUSED_DAYS * 86400
        for number, (when, path) in enumerate(used):
            if number >= MOST or when < oldest:
                path.unlink(missing_ok=True)


def _path_and_title(kind: str, key: Sequence[str]) -> tuple[Path, dict[str, object]]:
    title = {"format": FORMAT, "version": __version__, "kind": kind, "key": list(key)}
    return folder() / f"{kind}-{digest(title)[:32]}", title
