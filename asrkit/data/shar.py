"""Shar directories: cuts in ``cuts.*.jsonl.gz``, and beside each their audio and features in tar files of the same number.

The tar files are indexed once, and every cut notes where its bytes are. So the cuts of a Shar directory are as small as
those of a manifest, can be read in any order, and can be written to a manifest, which asrkit reads as long as the tar files
stay where they are.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from lhotse.cut import Cut, MixedCut
from lhotse.serialization import deserialize_item
from lhotse.shar.utils import fill_shar_placeholder

from asrkit.data.manifest_schema import MAX_DEPTH, check_member, deeper_than, without_nulls
from asrkit.errors import UserError, clip

# Where, in a cut's custom fields, its bytes are noted: {field: [tar file, offset, size, suffix]}.
PLACES = "shar_places"
MAX_MANIFEST = 16 << 20  # bytes of what describes one recording
Field = Literal["recording", "features"]
FIELDS: tuple[Field, ...] = ("recording", "features")


def shards_of(folder: Path) -> list[Path]:
    """The manifests of the directory's shards, in order."""
    return sorted([*folder.glob("cuts.*.jsonl"), *folder.glob("cuts.*.jsonl.gz")])


def tar_of(shard: Path, field: Field) -> Path:
    """The tar file that goes with a shard's manifest."""
    return shard.with_name(f"{field}.{shard.name.split('.')[1]}.tar").absolute()


def members_of(shard: Path) -> dict[str, dict[Field, tuple[Any, list[Any]]]]:
    """By cut and field: the Lhotse manifest that the shard's tar files hold of it, and where its bytes are.

    Raises:
        UserError: a tar file is damaged or compressed, or describes something else than audio or features.
    """
    by_cut: dict[str, dict[Field, tuple[Any, list[Any]]]] = {}
    for field in FIELDS:
        path = tar_of(shard, field)
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a regular file; write the Shar directory again")
        if path.exists():
            for name, data, manifest in _members(path, field):
                location = [str(path), data.offset_data, data.size, Path(data.name).suffix]
                by_cut.setdefault(name, {})[field] = (manifest, location)
    return by_cut


def attach(cut: Cut, members: dict[Field, tuple[Any, list[Any]]]) -> Cut:
    """The cut with what ``members_of`` has of it.

    Raises:
        ValueError: its audio or its features should be in a tar file and are not.
    """
    for field in FIELDS:
        if field in members:
            manifest, location = members[field]
            setattr(cut, field, manifest)
            cut.custom = {**(cut.custom or {}), PLACES: {**((cut.custom or {}).get(PLACES) or {}), field: location}}
        elif _is_placeholder(getattr(cut, field, None)):
            raise ValueError(
                f"cut {clip(cut.id)}: its {field} should be in {field}.*.tar and is not; make the directory again"
            )
    return cut


def _is_placeholder(manifest: Any) -> bool:
    sources = getattr(manifest, "sources", None)
    return (
        any(source.type == "shar" for source in sources) if sources else getattr(manifest, "storage_type", "") == "shar"
    )


def _members(path: Path, field: Field) -> Iterator[tuple[str, tarfile.TarInfo, Any]]:
    """Cut id, member with the bytes, manifest: a member of bytes is followed by one that describes them."""
    try:
        with tarfile.open(path, "r:") as tar:
            data = None
            for member in tar:
                if data is None:
                    data = member
                    continue
                if not member.name.endswith(".nometa"):
                    yield str(Path(data.name).with_suffix("")), data, _manifest_in(tar, member, field)
                data = None
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot read it ({clip(error)}); write the Shar directory again, tar files uncompressed"
        ) from error


def _manifest_in(tar: tarfile.TarFile, member: tarfile.TarInfo, field: Field) -> Any:
    """What a member says of the bytes before it, checked before lhotse sees it.

    Raises:
        ValueError: it is not JSON, or not that of audio or features.
    """
    file = tar.extractfile(member)
    if file is None or member.size > MAX_MANIFEST:
        raise ValueError(f"{clip(member.name)} is not a description of {field}")
    content = json.loads(file.read().decode())
    if not isinstance(content, dict) or deeper_than(MAX_DEPTH, content):
        raise ValueError(f"{clip(member.name)} is not a description of {field}")
    content = without_nulls(content)
    if findings := check_member(field, content):
        raise ValueError(f"{clip(member.name)}: {'; '.join(findings)}")
    try:
        return deserialize_item(content)
    except Exception as error:  # whatever a constructor says about fields it did not expect
        raise ValueError(f"{clip(member.name)}: {clip(error)}") from error


def loaded(cut: Cut, field: Field) -> Cut:
    """The cut, with the audio or the features that lie in a Shar directory read into memory; other cuts as they are."""
    if isinstance(cut, MixedCut):
        whole = deepcopy(cut)
        for track in whole.tracks:
            track.cut = loaded(track.cut, field)
        return whole
    locations = (getattr(cut, "custom", None) or {}).get(PLACES) or {}
    if field not in locations:
        return cut
    whole = deepcopy(cut)
    path, offset, size, suffix = locations[field]
    if not Path(path).is_file() or Path(path).stat().st_size < offset + size:
        raise ValueError(f"{clip(path)} does not hold its {field}; make the directory again")
    with open(path, "rb") as file:
        file.seek(offset)
        fill_shar_placeholder(getattr(whole, field), file.read(size), f"{cut.id}{suffix}")
    return whole
