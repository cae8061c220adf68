"""What is generated and checked in: cli/settings.json, the option tables of the documents, the list of commands, options and settings,
and the table of claims (scripts/claims.py).

    python scripts/generated.py            write them (make generated)
    python scripts/generated.py --check    exit with 1 and show the differences, if there are any

A document holds a table between a comment with a command and another that says `end`:

    <!-- asrkit config qat quantization --all -->
    <!-- end -->
"""

from __future__ import annotations

import difflib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
from typer.models import ArgumentInfo

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, whatever is installed

from claims import with_claims

from asrkit.cli import app
from asrkit.cli.settings import DESCRIBED, SETTINGS, described, listing
from asrkit.reporting.settings import values

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(<!-- asrkit config (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """A document with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        words = shlex.split(match[2])
        everything = "--all" in words
        stage, *rest = [word for word in words if word != "--all"]
        keys: list[str | None] = [*rest] or [None]
        tables = [listing(stage, key, "markdown", everything).splitlines() for key in keys]
        rows = [*tables[0], *(row for table in tables[1:] for row in table[2:])]
        return match[1] + "\n".join(rows) + "\n" + match[3]

    return TABLE.sub(made, text)


def interface() -> str:
    """Every command with its options, and every setting of every stage."""
    lines = ["What a user can type. `make generated` rewrites this file; a change of it is a change for users.", ""]
    for path, function in sorted(_commands(app, "asrkit")):
        lines += [path, *(f"    {option}" for option in _options(function)), ""]
    for stage in SETTINGS:
        settings = [line for line in listing(stage, None, "table", True).splitlines() if not line.startswith(" ")]
        lines += [f"settings of {stage}", *(f"    {line}" for line in settings), ""]
    return "\n".join(lines)


def _commands(group: typer.Typer, path: str) -> Iterator[tuple[str, Any]]:
    for command in group.registered_commands:
        yield f"{path} {command.name}", command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from _commands(inner.typer_instance, f"{path} {inner.name}")


def _options(function: Any) -> Iterator[str]:
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        hint, info = get_args(hints[name])
        given = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
        words = [name.upper()] if isinstance(info, ArgumentInfo) else given or [f"--{name.replace('_', '-')}"]
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else "none" if parameter.default is None else str(parameter.default)
        yield f"{'/'.join(words)}: {values(hint)} = {default}"


def main() -> None:
    """Write, or check."""
    changed = update({DESCRIBED: described()})  # first: the others are made of it
    documents = {
        path: with_claims(with_tables(path.read_text(encoding="utf-8")))
        for path in sorted((ROOT / "docs").glob("*.md"))
    }
    changed |= update({**documents, ROOT / "tests" / "golden" / "cli.txt": interface()})
    if changed and "--check" in sys.argv:
        sys.exit("these are generated and have changed; if that is meant, run `make generated` and commit the result")


def update(wanted: dict[Path, str]) -> bool:
    """Write the files that are not as wanted, or show how they differ; whether there are any."""
    changed = False
    for path, text in wanted.items():
        present = path.read_text(encoding="utf-8") if path.is_file() else ""
        if present == text:
            continue
        changed = True
        name = str(path.relative_to(ROOT))
        if "--check" in sys.argv:
            print(
                *difflib.unified_diff(
                    present.splitlines(), text.splitlines(), name, f"{name}, generated", lineterm="", n=0
                ),
                sep="\n",
            )
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{name}: written")
    return changed


if __name__ == "__main__":
    main()
