"""YAML 1.2's core schema. PyYAML reads YAML 1.1, where ``no`` and ``on`` are booleans and ``1e-3`` is a text."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import partial
from typing import Any

import yaml

MOST_VALUES = 5_000_000  # a run's list of left-out cuts is the longest there is
MOST_NESTED = 100


def _python(number: str) -> str:
    return number.replace(".inf", "inf").replace(".nan", "nan")


def _core(parent: Any) -> Any:
    """A loader for which only ``true`` and ``false`` are booleans; there are no dates, no octal numbers and no numbers to base 60."""
    loader: Any = type("CoreLoader", (parent,), {"yaml_implicit_resolvers": {}})
    for kind, pattern, first in (
        ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ):
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})$"), first)
    loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
    loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(_python(node.value)))
    return loader


# Each in Python, and in C where PyYAML was built with libyaml, as it usually is: eight times as fast.
_IN_PYTHON = {"core": _core(yaml.SafeLoader), "texts": yaml.BaseLoader, "safe": yaml.SafeLoader}
_IN_C = (
    {"core": _core(yaml.CSafeLoader), "texts": yaml.CBaseLoader, "safe": yaml.CSafeLoader}
    if yaml.__with_libyaml__
    else _IN_PYTHON
)


def load_core(text: str) -> Any:
    """The value of a YAML text, by the core schema.

    Raises:
        yaml.YAMLError: it is no YAML, as in the other two.
    """
    return _load(text, "core")


def load_texts(text: str) -> Any:
    """The same with every scalar as it is written."""
    return _load(text, "texts")


def load_safe(text: str) -> Any:
    """The same by YAML 1.1, as ``dump_safe`` writes it."""
    return _load(text, "safe")


def dump_safe(content: Any) -> str:
    """Plain data as YAML 1.1, keys in the order given."""
    dump = partial(yaml.dump, content, sort_keys=False, allow_unicode=True)
    try:
        return str(dump(Dumper=yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper))
    except UnicodeEncodeError:  # a path that is no UTF-8
        return str(dump(Dumper=yaml.SafeDumper))


def _load(text: str, schema: str) -> Any:
    too_deep = yaml.YAMLError(f"it is nested more than {MOST_NESTED} deep")
    if _is_deep(text):
        raise too_deep
    try:
        try:
            content = yaml.load(text, _IN_C[schema])
        except (yaml.YAMLError, UnicodeError):
            content = yaml.load(text, _IN_PYTHON[schema])  # its errors show the place
    except RecursionError:
        raise too_deep from None
    _check_size(content)
    return content


def _is_deep(text: str) -> bool:
    """Whether a text is nested so deeply that composing it could exhaust the stack, which in C ends the process."""
    depth = 0
    with suppress(yaml.YAMLError, UnicodeError):  # composing stops there too
        for event in yaml.parse(text, _IN_C["texts"]):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_NESTED:
                return True
    return False


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
