"""Names of files that are written for ids: one name an id, the same every time, on every file system."""

from __future__ import annotations

import hashlib
import re

MAX_LENGTH = 80
_DIGEST = 12  # hexadecimal digits: two of a billion ids share them with a probability of 0.2 %
_SAFE = re.compile(rf"(?!.*-[0-9a-f]{{{_DIGEST}}}$)[a-z0-9_][a-z0-9_.-]{{0,{MAX_LENGTH - 1}}}")


def file_name(item_id: str, suffix: str) -> str:
    """The name of the file of ``item_id``, which ends with ``suffix``.

    A short id of lower-case letters, digits and ``_ . -`` is its own name. Any other gets a digest of all of it, so that ids that
    differ only in case, in ``/`` or ``:``, or in Unicode normalization never share a file, whatever the file system folds.
    """
    if _SAFE.fullmatch(item_id):
        return item_id + suffix
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", item_id)[:MAX_LENGTH].lstrip(".-") or "_"
    return f"{readable}-{hashlib.sha256(item_id.encode()).hexdigest()[:_DIGEST]}{suffix}"
