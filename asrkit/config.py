"""Typed configuration: defaults < YAML file < ``--set key=value``; every mistake is reported at once.

A stage's configuration is a tree of frozen pydantic dataclasses (``@config``), so types, ranges and unknown keys
are checked before any work starts, and ``to_dict`` gives what config.yaml stores.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from asrkit.errors import UserError
from asrkit.run_dir import read_yaml

T = TypeVar("T")

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
ADVANCED = "advanced"
Advanced = Annotated[T, ADVANCED]  # a setting that only a paper's ablation needs: left out of the first tables


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only, checked dataclass; unknown keys are errors."""
    return pydantic_dataclass(cls, kw_only=True, frozen=True, config=ConfigDict(extra="forbid"))  # type: ignore[call-overload, return-value, unused-ignore]


def resolve(cls: type[T], file: Path | None = None, overrides: Iterable[str] = (), defaults: T | None = None) -> T:
    """Build a ``cls`` from its defaults (or ``defaults``), an optional YAML file, and ``key.subkey=value`` strings.

    Values of overrides are parsed as YAML, so ``lr=1e-3``, ``factors=[0.9, 1.1]`` and ``name=null`` mean what they say.

    Raises:
        UserError: one line for every unknown key (with the nearest valid one), wrong type or value.
    """
    # From the defaults as a whole: a stage's own for a nested group count for the keys that nobody sets.
    values: dict[str, Any] = to_dict(cls() if defaults is None else defaults)
    if file is not None:
        if not Path(file).is_file():
            raise UserError(f"{file}: no such configuration file")
        content = read_yaml(Path(file))
        if content is not None and not isinstance(content, dict):
            raise UserError(f"{file}: a configuration file holds `key: value` lines")
        _merge(values, content or {})
    findings = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            findings.append(f"--set {override}: write key=value, as in --set training.steps=2000")
            continue
        try:
            _put(values, key.split("."), _parse(text))
        except (yaml.YAMLError, TypeError):
            findings.append(f"--set {override}: cannot read the value, or {key} does not name a field")
    if findings:
        raise UserError.of(findings)
    return from_dict(cls, values, str(file) if file is not None else "configuration")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Validate a nested dictionary as ``cls``; ``where`` names its origin in error lines."""
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise UserError.of([_explain(cls, item, where) for item in error.errors()]) from None


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


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _parse(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 takes 1e-3 for a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        if values.get(name) is None:  # also a group that is off by default: a key of it turns it on
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise TypeError(name)
    values[path[-1]] = value


def _explain(cls: type, item: Any, where: str) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(key, _keys(cls), n=1, cutoff=0.4)
        return f"{where}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else "; see --help for the keys")
    return f"{where}: {key}: {item['msg']} (got {item['input']!r})"


def _keys(cls: Any, prefix: str = "") -> list[str]:
    names = []
    for name, hint in _field_types(cls).items():
        names.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            names += _keys(hint, f"{prefix}{name}.")
    return names


def _field_types(cls: Any) -> dict[str, Any]:
    import typing

    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
