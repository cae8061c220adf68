"""What a line of a manifest must look like, before lhotse sees it: every value typed, nothing that runs or fetches anything.

Manifests come from strangers. lhotse runs a source of type ``command`` in a shell, asks the network for one of type ``url``,
and unpickles features of storage type ``memory_raw``. Here only files, bytes in memory and Shar archives are read; the
environment variable ASRKIT_ALLOW_SOURCES adds types by name, for manifests that the user trusts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from asrkit.errors import clip

ALLOW = "ASRKIT_ALLOW_SOURCES"
SOURCES = frozenset({"file", "memory", "shar"})
STORAGES = frozenset(
    {
        "numpy_files",
        "lilcom_files",
        "lilcom_chunky",
        "numpy_hdf5",
        "lilcom_hdf5",
        "chunked_lilcom_hdf5",
        "memory_lilcom",
        "memory_npy",
        "shar",
    }
)
# What lhotse and libsndfile take for something else than the name of a file: a URL, a shell command, standard input.
_NO_FILE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:|-$")
MAX_DEPTH = 50
MAX_FINDINGS_A_LINE = 5

Seconds = Annotated[float, Field(ge=0.0, le=1e7)]
Start = Annotated[float, Field(ge=-1e7, le=1e7)]
Rate = Annotated[int, Field(ge=100, le=10_000_000)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Channel = Annotated[int, Field(ge=0, le=10_000)]
Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,1000}$")]  # ids are printed
Channels = Channel | list[Channel]


def allowed_sources() -> frozenset[str]:
    """Types of audio sources that are read: ``SOURCES``, and those that ASRKIT_ALLOW_SOURCES lists, separated by commas."""
    return _allowed(os.environ.get(ALLOW, ""))


@cache
def _allowed(added: str) -> frozenset[str]:
    return SOURCES | {part.strip() for part in added.split(",") if part.strip()}


def check_source(kind: str, source: str | bytes) -> None:
    """
    Raises:
        ValueError: a source that would run a command or ask the network.
    """
    if kind not in allowed_sources():
        raise ValueError(
            f"a source of type {clip(kind, 40)} is not read, as it may run a program or ask the network; write its sound to a file, "
            f"or, if you trust the manifest, set {ALLOW}={clip(kind, 40)}"
        )
    if kind == "file":
        _check_path(source)


def _check_path(path: str | bytes | None) -> None:
    if isinstance(path, str) and (_NO_FILE.match(path) or "\0" in path):
        raise ValueError(f"{clip(path)!r} does not name a file; only files on this machine are read")


class _Strict(BaseModel):
    """Fields of exactly these types; the others are left to lhotse, which knows its own."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Source(_Strict):
    type: str
    channels: Annotated[list[Channel], Field(min_length=1)]
    source: str | bytes

    @field_validator("source")
    @classmethod
    def _is_read(cls, source: str | bytes, info: Any) -> str | bytes:
        if "type" in info.data:
            check_source(info.data["type"], source)
        return source


def _check_transforms(transforms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A transform may hold a recording of its own, such as the impulse response of a room."""
    for nested in recordings_in(transforms):
        if findings := check_member("recording", nested):
            raise ValueError("; ".join(findings))
    return transforms


class _Recording(_Strict):
    id: Name
    sources: Annotated[list[_Source], Field(min_length=1)]
    sampling_rate: Rate
    num_samples: Count
    duration: Seconds
    channel_ids: list[Channel] | None = None
    transforms: Annotated[list[dict[str, Any]], AfterValidator(_check_transforms)] | None = None


class _Features(_Strict):
    type: str
    num_frames: Count
    num_features: Count
    frame_shift: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    sampling_rate: Rate
    start: Start
    duration: Seconds
    storage_type: str
    storage_path: str | None = None
    storage_key: str | bytes
    recording_id: str | None = None
    channels: Channels | None = None

    @field_validator("storage_type")
    @classmethod
    def _is_read(cls, storage: str) -> str:
        if storage not in STORAGES:
            raise ValueError(
                f"features stored as {clip(storage, 40)} are not read, as that may run a program or ask the network; "
                "store them as lilcom_chunky or numpy_files"
            )
        return storage

    @field_validator("storage_path", "storage_key")
    @classmethod
    def _is_file(cls, path: str | bytes | None) -> str | bytes | None:
        _check_path(path)
        return path


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples


_Item = Annotated[
    tuple[str, Start, Seconds] | tuple[str, Start, Seconds, float | None] | dict[str, Any], BeforeValidator(_as_tuple)
]
_TarLocation = Annotated[tuple[str, Count, Count, str], BeforeValidator(_as_tuple)]  # tar file, offset, size, suffix


class _Supervision(_Strict):
    id: Name
    recording_id: str
    start: Start
    duration: Seconds
    channel: Channels = 0
    text: str | None = None
    language: str | None = None
    speaker: str | None = None
    gender: str | None = None
    custom: dict[str, Any] | None = None
    alignment: dict[str, list[_Item]] | None = None


class _Custom(_Strict):
    shar_places: dict[Literal["recording", "features"], _TarLocation] | None = None


class _Cut(_Strict):
    type: Literal["MonoCut", "MultiCut", "Cut"]
    id: Name
    start: Annotated[float, Field(ge=0.0, le=1e7)]
    duration: Annotated[float, Field(gt=0.0, le=1e7)]
    channel: Channels
    supervisions: list[_Supervision] = []
    recording: _Recording | None = None
    features: _Features | None = None
    custom: _Custom | None = None


class _PaddingCut(_Strict):
    type: Literal["PaddingCut"]
    id: Name
    duration: Annotated[float, Field(gt=0.0, le=1e7)]
    sampling_rate: Rate


class _Track(_Strict):
    type: Literal["MonoCut", "MultiCut", "Cut", "PaddingCut"]
    cut: Annotated[_Cut | _PaddingCut, Field(discriminator="type")]
    offset: Seconds = 0.0
    snr: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_the_type(cls, data: Any) -> Any:
        """A track says what its cut is, and the cut need not say it again."""
        if isinstance(data, dict) and isinstance(data.get("cut"), dict):
            return {**data, "cut": {**data["cut"], "type": data.get("type")}}
        return data


class _MixedCut(_Strict):
    type: Literal["MixedCut"]
    id: Name
    tracks: Annotated[list[_Track], Field(min_length=1)]
    transforms: Annotated[list[dict[str, Any]], AfterValidator(_check_transforms)] | None = None


_CUT: TypeAdapter[Any] = TypeAdapter(Annotated[_Cut | _MixedCut, Field(discriminator="type")])
_MEMBERS: dict[str, TypeAdapter[Any]] = {"recording": TypeAdapter(_Recording), "features": TypeAdapter(_Features)}


def recordings_in(value: Any) -> Iterator[Any]:
    """The recordings anywhere in a JSON value, such as a transform."""
    if isinstance(value, Mapping):
        if "sources" in value:
            yield value
        else:
            for part in value.values():
                yield from recordings_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from recordings_in(part)


def check_cut(data: Mapping[str, Any]) -> list[str]:
    """What is wrong with a cut's JSON object: the field, why, and the value; [] for nothing."""
    return _findings(_CUT, data)


def check_member(field: Literal["recording", "features"], data: Any) -> list[str]:
    """The same for what a Shar archive says of a cut's sound or features."""
    return _findings(_MEMBERS[field], data)


def _findings(model: TypeAdapter[Any], data: Any) -> list[str]:
    try:
        model.validate_python(data)
    except ValidationError as error:
        lines = [_line(item) for item in error.errors(include_url=False)]
        lines = list(dict.fromkeys(lines))
        more = len(lines) - MAX_FINDINGS_A_LINE
        return lines if more <= 0 else [*lines[:MAX_FINDINGS_A_LINE], f"{more} more"]
    return []


_JSON = {"dictionary": "object", "list": "array"}


def _line(item: Any) -> str:
    # Of a union every branch reports; the names of the branches say nothing to a user.
    path = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("tuple[", "list[", "dict[")))
    path = re.sub(r"^(Mono|Multi|Mixed)?Cut\.?|\.(int|str|bytes|float|constrained-\w+)$", "", path)
    reason = item["msg"].removeprefix("Value error, ")
    reason = re.sub(r"a valid (dictionary|list)( or instance of \w+)?", lambda kind: f"a JSON {_JSON[kind[1]]}", reason)
    shown = "" if item["type"] == "value_error" else f" (got {clip(repr(item['input']), 60)})"
    if item["type"] == "string_pattern_mismatch":
        return f"{path}: must have 1 to 1000 characters, none of them a control character{shown}"
    if item["type"] == "missing":
        return f"{path}: is missing"
    return f"{path}: {reason}{shown}" if path else f"{reason}{shown}"


def deeper_than(limit: int, value: Any) -> bool:
    """Whether lists and objects lie in one another more than ``limit`` deep, which would exhaust what walks through them."""
    level = [value]
    for _ in range(limit):
        level = [
            part
            for node in level
            if isinstance(node, (Mapping, list))
            for part in (node.values() if isinstance(node, Mapping) else node)
            if isinstance(part, (Mapping, list))
        ]
        if not level:
            return False
    return True


def has_surrogates(data: Any) -> bool:
    """Whether a text in it has halves of characters, which JSON can write and UTF-8 cannot."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return True
    return False


def without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a cut without fields that are null, which lhotse takes for absent when it writes and not when it reads.

    The user's own ``custom`` fields stay as they are.
    """
    return {
        key: value if key == "custom" else _without_nulls(value) for key, value in data.items() if value is not None
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return without_nulls(value)
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return [_without_nulls(part) for part in value]
    return value
