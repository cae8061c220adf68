"""What can be set: every key of a settings class with its type, its default and its meaning."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from asrkit.config import ADVANCED, field_types, group_of, is_config, nearest
from asrkit.errors import UserError

REQUIRED = "(required)"
_CONSTRAINTS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key, or a group of keys.

    ``values`` says what it takes. ``default`` is plain (as JSON has it). ``group``: always, if its keys always count;
    optional, if it may be null as a whole, and ``default`` is then null or ``{}``; named, if its keys stand under names of
    the user's; None for a single setting.
    """

    key: str
    values: str
    default: Any
    meaning: str
    advanced: bool
    group: Literal["always", "optional", "named"] | None = None


def describe(cls: type) -> list[Setting]:
    """Every setting of a class, groups before what is in them."""
    return list(_walk(cls, {field.name: _default(field) for field in dataclasses.fields(cls)}, "", False))


def undocumented(cls: type) -> list[str]:
    """The keys of a class that have no docstring."""
    return [setting.key for setting in describe(cls) if not setting.meaning]


def select(settings: Sequence[Setting], key: str | None, everything: bool) -> list[Setting]:
    """The settings at and under ``key``; advanced ones only if everything, or that very one, is asked for.

    Raises:
        UserError: no such key.
    """
    if key is not None:
        within = [setting for setting in settings if f"{setting.key}.".startswith(f"{key}.")]
        if not within:
            near = nearest(key, [setting.key for setting in settings])
            raise UserError(
                f"{key}: unknown key" + (f"; did you mean {near}?" if near else "; leave it out to see all")
            )
        settings = within
    return [setting for setting in settings if everything or not setting.advanced or setting.key == key]


def as_table(settings: Sequence[Setting]) -> str:
    """For a terminal: a line for each key, and its meaning below."""
    lines = []
    for setting in settings:
        if setting.group != "always":
            lines.append(f"{setting.key} = {_shown(setting)}    ({setting.values})")
            lines += textwrap.wrap(setting.meaning, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def as_markdown(settings: Sequence[Setting]) -> str:
    """A table for a document."""
    rows = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for setting in settings:
        if setting.group != "always":
            cells = (f"`{setting.key}`", setting.values, f"`{_shown(setting)}`", setting.meaning)
            rows.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
    return "\n".join(rows)


def as_json(settings: Sequence[Setting]) -> str:
    """One object for each key."""
    return json.dumps(
        [
            {key: value for key, value in dataclasses.asdict(setting).items() if key != "group"}
            for setting in settings
            if setting.group != "always"
        ],
        indent=2,
        ensure_ascii=False,
    )


def as_yaml(settings: Sequence[Setting], title: str) -> str:
    """A file for ``--config``: every default, its meaning above it; keys of groups that are off are comments."""
    lines, off, written = [f"# {title}."], list[str](), set[str]()

    def write(key: str, value: str) -> None:
        written.add(key)
        indent = "  " * key.count(".")
        out = any(key.startswith(f"{group}.") for group in off)
        lines.append(f"{indent}{'# ' if out else ''}{key.rpartition('.')[2]}:{value}")

    for setting in settings:
        parts = setting.key.split(".")
        for above in (".".join(parts[:depth]) for depth in range(1, len(parts))):
            if above not in written:  # a name of the user's, or where only a part of the settings is listed
                write(above, "")
        comment = f"{'  ' * (len(parts) - 1)}# "
        text = setting.meaning if setting.group == "always" else f"{setting.meaning} ({setting.values})"
        lines += textwrap.wrap(text, 118, initial_indent=comment, subsequent_indent=comment, break_on_hyphens=False)
        on = setting.group == "always" or (setting.group == "optional" and setting.default is not None)
        write(setting.key, "" if on else f" {_flow(setting.default)}")
        if setting.group is not None and not on:
            off.append(setting.key)
    return "\n".join(lines)


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The string literal below each field of a settings class, inherited ones included, as one line each.

    A field without one is absent, and so is every field of a class whose source cannot be read.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, below in zip(definition.body, definition.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[statement.target.id] = " ".join(str(below.value.value).split())
    return docs


def _walk(cls: type, defaults: dict[str, Any], prefix: str, advanced: bool) -> Iterator[Setting]:
    docs = field_docs(cls)
    for name, hint in field_types(cls).items():
        key, default, meaning = prefix + name, defaults[name], docs.get(name, "")
        hidden = advanced or ADVANCED in _metadata(hint)
        inner, named = group_of(hint), False
        if inner is None and get_origin(hint) is dict:
            inner, named = group_of(get_args(hint)[1]), True
        if inner is None:
            yield Setting(key, values(hint), _plain(default), meaning, hidden)
            continue
        if named:
            yield Setting(key, "a group for each name", _plain(default), meaning, hidden, "named")
        elif is_config(hint):
            yield Setting(key, "group", None, meaning, hidden, "always")
        else:
            shown: dict[str, Any] | None = None if default is None else {}
            yield Setting(key, "the settings below, or null", shown, meaning, hidden, "optional")
        on = (
            {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
            if is_config(type(default))
            else None
        )
        below = on or {field.name: _default(field) for field in dataclasses.fields(inner)}
        yield from _walk(inner, below, f"{key}.NAME." if named else f"{key}.", hidden)


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default; REQUIRED where there is none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if isinstance(field.default, FieldInfo):
        return field.default.get_default(call_default_factory=True)
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _metadata(hint: Any) -> tuple[Any, ...]:
    return hint.__metadata__ if get_origin(hint) is Annotated else ()


def values(hint: Any) -> str:
    """What a type takes, in words: ``integer >= 1``, ``shots, iterative or cubic``, ``list of text``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        constraints = [item for part in _metadata(hint) for item in getattr(part, "metadata", ())]
        limits = [
            f"{sign} {getattr(item, name):g}"
            for item in constraints
            for name, sign in _CONSTRAINTS.items()
            if getattr(item, name, None) is not None
        ]
        return values(arguments[0]) + (f" {' and '.join(limits)}" if limits else "")
    if choices := _choices(hint):
        return _or(choices)
    if origin in (Union, UnionType):
        return _or([choice for part in arguments for choice in _choices(part) or [values(part)]])
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return f"list of {values(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(values(part) for part in arguments)}]"
    if origin is dict:
        return f"map from {values(arguments[0])} to {values(arguments[1])}"
    return {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}.get(
        hint, str(hint)
    )


def _choices(hint: Any) -> list[str]:
    """The words of a type that is a choice of words."""
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [str(choice.value) for choice in hint] if isinstance(hint, type) and issubclass(hint, Enum) else []


def _or(choices: list[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def _plain(value: Any) -> Any:
    if value is REQUIRED:
        return REQUIRED
    return json.loads(json.dumps(value, default=str))


def _flow(value: Any) -> str:
    """A value on a line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _shown(setting: Setting) -> str:
    return "as below" if setting.group == "optional" and setting.default is not None else _flow(setting.default)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("*", "\\*")
