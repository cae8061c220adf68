"""Shar directories: cuts in ``cuts.*.jsonl.gz``, and beside each their sound and features in tar files of the same number.

The tar files are looked through once, and every cut notes where its bytes are. So cuts of a Shar directory are as small as
those of a manifest, can be read in any order, and can be written to a manifest, which asrkit reads as long as the tar files
stay where they are.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from lhotse.cut import Cut, MixedCut
from lhotse.serialization import decode_json_line, deserialize_item
from lhotse.shar.utils import fill_shar_placeholder

from asrkit.errors import UserError

PLACES = (
    "shar_places"  # where, in a cut's custom fields, its bytes are noted: {field: [tar file, offset, size, suffix]}
)
Field = Literal["recording", "features"]
FIELDS: tuple[Field, ...] = ("recording", "features")


def shards_of(folder: Path) -> list[Path]:
    """The manifests of the directory's shards, in order."""
    return sorted([*folder.glob("cuts.*.jsonl"), *folder.glob("cuts.*.jsonl.gz")])


def tar_of(shard: Path, field: Field) -> Path:
    """The tar file that goes with a shard's manifest."""
    return shard.with_name(f"{field}.{shard.name.split('.')[1]}.tar").absolute()


def places_in(shard: Path) -> dict[str, dict[str, Any]]:
    """By cut and field: the Lhotse manifest that the shard's tar files hold of it, and the place of its bytes.

    Raises:
        UserError: a tar file is damaged or compressed.
    """
    found: dict[str, dict[str, Any]] = {}
    for field in FIELDS:
        path = tar_of(shard, field)
        if path.exists():
            for name, data, manifest in _members(path):
                place = [str(path), data.offset_data, data.size, Path(data.name).suffix]
                found.setdefault(name, {})[field] = (manifest, place)
    return found


def attach(cut: Cut, found: dict[str, Any]) -> Cut:
    """The cut with what ``places_in`` found of it.

    Raises:
        ValueError: its sound or its features should be in a tar file and are not.
    """
    for field in FIELDS:
        if field in found:
            manifest, place = found[field]
            setattr(cut, field, manifest)
            cut.custom = {**(cut.custom or {}), PLACES: {**((cut.custom or {}).get(PLACES) or {}), field: place}}
        elif _is_placeholder(getattr(cut, field, None)):
            raise ValueError(
                f"cut {cut.id}: its {field} should be in {field}.*.tar and is not; make the directory again"
            )
    return cut


def _is_placeholder(manifest: Any) -> bool:
    sources = getattr(manifest, "sources", None)
    return (
        any(source.type == "shar" for source in sources) if sources else getattr(manifest, "storage_type", "") == "shar"
    )


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


def loaded(cut: Cut, field: Field) -> Cut:
    """The cut, with the sound or the features that lie in a Shar directory read into memory; other cuts as they are."""
    if isinstance(cut, MixedCut):
        whole = deepcopy(cut)
        for track in whole.tracks:
            track.cut = loaded(track.cut, field)
        return whole
    places = (getattr(cut, "custom", None) or {}).get(PLACES) or {}
    if field not in places:
        return cut
    whole = deepcopy(cut)
    path, offset, size, suffix = places[field]
    with open(path, "rb") as file:
        file.seek(offset)
        fill_shar_placeholder(getattr(whole, field), file.read(size), f"{cut.id}{suffix}")
    return whole
