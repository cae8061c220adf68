"""Shar directories: cuts in ``cuts.*.jsonl.gz``, and beside each its sound or features in a tar file of the same number.

The tar files are looked through once, and every cut notes where its bytes are. So cuts of a Shar directory are as small as
those of a manifest, can be read in any order, and can be written to a manifest.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from lhotse.cut import Cut
from lhotse.serialization import decode_json_line, deserialize_item
from lhotse.shar.utils import fill_shar_placeholder

from asrkit.errors import UserError

PLACES = "shar"  # where, in a cut's custom fields, its bytes are noted: {field: [tar file, offset, size, name]}
FIELDS = ("recording", "features")


def shards_of(folder: Path) -> list[Path]:
    """The manifests of the directory's shards, in order."""
    return sorted([*folder.glob("cuts.*.jsonl"), *folder.glob("cuts.*.jsonl.gz")])


def attach(cut: Cut, shards: dict[str, dict[str, Any]]) -> Cut:
    """The cut with the manifests and places that ``places_in`` found of it."""
    for field, (manifest, place) in shards.get(cut.id, {}).items():
        setattr(cut, field, manifest)
        cut.custom = {**(cut.custom or {}), PLACES: {**((cut.custom or {}).get(PLACES) or {}), field: place}}
    return cut


def places_in(shard: Path) -> dict[str, dict[str, Any]]:
    """By cut and field: the Lhotse manifest that the shard's tar files hold of it, and the place of its bytes.

    Raises:
        UserError: a tar file is missing, damaged or compressed.
    """
    number = shard.name.split(".")[1]
    found: dict[str, dict[str, Any]] = {}
    for field in FIELDS:
        path = shard.with_name(f"{field}.{number}.tar")
        if not path.exists():
            continue
        for name, data, manifest in _members(path):
            place = [str(path), data.offset_data, data.size, Path(data.name).suffix]
            found.setdefault(name, {})[field] = (manifest, place)
    return found


def _members(path: Path) -> Iterator[tuple[str, tarfile.TarInfo, Any]]:
    """Cut id, member with the bytes, manifest: a member of bytes is followed by one that describes them."""
    try:
        with tarfile.open(path, "r:") as tar:
            data = None
            for member in tar:
                if data is None:
                    data = member
                    continue
                if not member.name.endswith(".nometa"):
                    file = tar.extractfile(member)
                    assert file is not None
                    manifest = deserialize_item(decode_json_line(file.read().decode()))
                    yield str(Path(data.name).with_suffix("")), data, manifest
                data = None
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot read it ({error}); write the Shar directory again, tar files uncompressed"
        ) from error


def loaded(cut: Cut) -> Cut:
    """The cut, with what lies in a Shar directory read into memory; other cuts as they are."""
    places = (cut.custom or {}).get(PLACES)
    if not places:
        return cut
    whole = deepcopy(cut)
    for field, (path, offset, size, suffix) in places.items():
        with open(path, "rb") as file:
            file.seek(offset)
            fill_shar_placeholder(getattr(whole, field), file.read(size), f"{cut.id}{suffix}")
    return whole
