"""YAML 1.2's core schema. PyYAML reads YAML 1.1, where ``no`` and ``on`` are booleans and ``1e-3`` is a text."""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_VALUES = 5_000_000  # a run's list of left-out cuts is the longest there is


class _CoreLoader(yaml.SafeLoader):
    """Only ``true`` and ``false`` are booleans; there are no dates, no octal numbers and no numbers to base 60."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  of this class, in place of its parent's


def _python(number: str) -> str:
    return number.replace(".inf", "inf").replace(".nan", "nan")


for _kind, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})$"), _first)
_CoreLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_CoreLoader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(_python(node.value)))


def load_core(text: str) -> Any:
    """The value of a YAML text, by the core schema.

    Raises:
        yaml.YAMLError: it is no YAML, as in the other two.
    """
    return _load(text, _CoreLoader)


def load_texts(text: str) -> Any:
    """The same with every scalar as it is written."""
    return _load(text, yaml.BaseLoader)


def load_safe(text: str) -> Any:
    """The same by YAML 1.1, as ``yaml.safe_dump`` writes it."""
    return _load(text, yaml.SafeLoader)


def _load(text: str, loader: Any) -> Any:
    try:
        content = yaml.load(text, loader)
    except RecursionError:
        raise yaml.YAMLError("its brackets are nested too deeply") from None
    _check_size(content)
    return content


def _check_size(content: Any) -> None:
    """Refuse what a few aliases (``*a``) make endless for whoever walks through it."""
    waiting, count = [content], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES:,} values, or refers to itself")
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
