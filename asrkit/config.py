"""Typed configuration: defaults < YAML file < ``--set key=value`` < options; every mistake is reported at once.

A stage's configuration is a tree of frozen pydantic dataclasses (``@config``), so types, ranges and unknown keys
are checked before any work starts, and ``to_dict`` gives what config.yaml stores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.dataclasses import is_pydantic_dataclass

from asrkit.errors import UserError
from asrkit.yaml_core import load_core, load_texts

T = TypeVar("T")

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch takes
ADVANCED = "advanced"
Advanced = Annotated[T, ADVANCED]  # a setting that only a paper's ablation needs: left out of the first tables


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only, checked dataclass; unknown keys are errors, and so are numbers that are not finite and
    truth values where a number is wanted."""

    def refuse_truth(cls: Any, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not _takes_truth(field_types(cls)[str(info.field_name)]):
            raise ValueError("a number or a text is wanted here, not true or false")
        return value

    cls._refuse_truth = field_validator("*", mode="before")(classmethod(refuse_truth))  # type: ignore[attr-defined]
    options = ConfigDict(extra="forbid", allow_inf_nan=False)
    return pydantic_dataclass(cls, kw_only=True, frozen=True, config=options)  # type: ignore[call-overload, return-value, unused-ignore]


def _takes_truth(hint: Any) -> bool:
    """Whether a field of this type may be true or false."""
    inner = get_args(hint) if get_origin(hint) in (Union, UnionType, Annotated) else ()
    return hint in (bool, Any) or any(map(_takes_truth, inner))


def is_config(hint: Any) -> bool:
    """Whether this is a class made by ``config``."""
    return isinstance(hint, type) and is_pydantic_dataclass(hint)


def resolve(
    cls: type[T],
    file: Path | None = None,
    overrides: Iterable[str] = (),
    defaults: T | None = None,
    *,
    options: Mapping[str, Any] | None = None,
) -> T:
    """Build a ``cls`` from its defaults (or ``defaults``), a YAML file, ``key.subkey=value`` strings, and options.

    Later ones win. ``options`` are values by key that the command line has parsed: they are taken as they are. Texts, in
    the file and in ``overrides``, are read as YAML 1.2 has it, so ``no`` and ``on`` are words, and ``1e-3`` is a number;
    where the field takes a text but not the value that was read, it gets the text as written: ``name=1e3``, ``name=007``.

    Raises:
        UserError: one line for every unknown key (with the nearest valid one), wrong type or value.
    """
    # From the defaults as a whole: a stage's own for a nested group count for the keys that nobody sets.
    values: dict[str, Any] = to_dict(cls() if defaults is None else defaults)
    origins: dict[str, str] = {}  # by key: what set it, for error lines
    if file is not None:
        written = _read_file(Path(file))
        _merge(cls, values, *written)
        origins |= dict.fromkeys(_leaves(written[1]), f"{file}: ")
    findings = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            findings.append(f"--set {override}: write key=value, as in --set training.steps=2000")
            continue
        try:
            _put(values, key, _typed(hint_of(cls, key), _readings(text)))
        except TypeError:
            findings.append(f"--set {override}: {key.rpartition('.')[0]} is a single value, not a group of settings")
        origins |= {key: "--set "}
    for key, value in (options or {}).items():
        _put(values, key, value)
        origins |= {key: ""}
    try:
        settings = _validated(
            cls, values, lambda key: _origin(origins, key), "; `asrkit config STAGE --all` lists every key"
        )
    except UserError as error:
        raise UserError.of([*findings, *error.lines]) from None
    if findings:
        raise UserError.of(findings)
    return settings


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Validate a nested dictionary as ``cls``; ``where`` names its origin in error lines."""
    return _validated(cls, values, lambda key: f"{where}: ")


def to_dict(instance: Any) -> dict[str, Any]:
    """The configuration as plain YAML-able values, every default written out."""
    return json.loads(json.dumps(dataclasses.asdict(instance), default=str))  # tuples become lists, paths text


def digest(content: Any) -> str:
    """SHA-256 of a plain value's canonical JSON; equal content, equal digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` for every leaf that differs between two nested dictionaries."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def hint_of(cls: Any, key: str) -> Any:
    """The type of ``key.subkey`` of a settings class; Any where there is no such key."""
    hint = cls
    for name in key.split("."):
        group = group_of(hint)
        if group is not None:
            hint = field_types(group).get(name, Any)
        else:
            hint = get_args(hint)[1] if get_origin(hint) is dict else Any
    return hint


def group_of(hint: Any) -> Any:
    """The settings class of a nested group, one that may be None included; None for a plain value."""
    candidates = [hint, *get_args(hint)] if get_origin(hint) in (Union, UnionType, Annotated) else [hint]
    return next((candidate for candidate in candidates if is_config(candidate)), None)


@cache
def field_types(cls: Any) -> dict[str, Any]:
    """The type of each field of a settings class, with its constraints."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _read_file(path: Path) -> tuple[dict[Any, Any], dict[str, Any]]:
    """A YAML file twice: as the core schema has it, and with every scalar as its text."""
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        text = path.read_text(encoding="utf-8")
        core, plain = load_core(text), load_texts(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if core is None:
        return {}, {}
    if not isinstance(core, dict):
        raise UserError(f"{path}: a configuration file holds `key: value` lines")
    return core, plain


def _readings(text: str) -> list[Any]:
    """What the text of an override may mean, the likeliest first: a YAML value, one with texts only, the text itself."""
    readings: list[Any] = []
    for load in (load_core, load_texts):
        with contextlib.suppress(yaml.YAMLError):
            readings.append(load(text))
    return [*readings, text]


def _typed(hint: Any, readings: Sequence[Any]) -> Any:
    """The first reading that the type takes; the first of all if none is, which validation will then explain."""
    adapter = TypeAdapter(hint)
    for value in readings:
        with contextlib.suppress(ValidationError):
            adapter.validate_python(value)
            return value
    return readings[0]


def _merge(hint: Any, values: dict[str, Any], core: Mapping[Any, Any], plain: Mapping[str, Any]) -> None:
    """Put a file's content, in its two readings, over ``values``."""
    for (key, text), value in zip(plain.items(), core.values(), strict=True):
        inner = hint_of(hint, key)
        if isinstance(value, dict) and (group_of(inner) is not None or isinstance(values.get(key), dict)):
            if not isinstance(values.get(key), dict):  # a group that is off by default
                values[key] = {}
            _merge(inner, values[key], value, text)
        else:
            values[key] = _typed(inner, [value, text])


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for name in groups:
        if values.get(name) is None:  # also a group that is off by default: a key of it turns it on
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise TypeError(name)
    values[last] = value


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _origin(origins: Mapping[str, str], key: str) -> str:
    """What set a key, a group above it, or the last of the keys below it."""
    related = [name for name in origins if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")]
    return origins[related[-1]] if related else ""


def _validated(cls: type[T], values: Mapping[str, Any], origin: Callable[[str], str], help: str = "") -> T:
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise UserError.of([_explain(cls, item, origin, help) for item in error.errors()]) from None


def _explain(cls: type, item: Any, origin: Callable[[str], str], help: str) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = nearest(key, _keys(cls, key)) or _ending_in(key, _keys(cls, key))
        return f"{origin(key)}{key}: unknown key" + (f"; did you mean {near}?" if near else help)
    message = item["msg"].removeprefix("Value error, ")
    value = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"  # a group says nothing at a glance
    return f"{origin(key)}{key}{': ' if key else ''}{message}{value}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like ``word``; None if none is like it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def _ending_in(word: str, known: Iterable[str]) -> str | None:
    """The known keys whose last part is ``word``; None if there is none."""
    return " or ".join(key for key in known if key.rpartition(".")[2] == word) or None


def _keys(cls: Any, near: str) -> Iterator[str]:
    """Every key of a settings class, and those of the group that ``near`` is in, which may be under a name of the user's."""
    for name, hint in field_types(cls).items():
        yield name
        if (group := group_of(hint)) is not None:
            yield from (f"{name}.{key}" for key in _keys(group, ""))
    parent = near.rpartition(".")[0]
    if parent and (group := group_of(hint_of(cls, parent))) is not None:
        yield from (f"{parent}.{name}" for name in field_types(group))
