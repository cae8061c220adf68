"""Sizes that keep the code readable from top to bottom. (Which package imports which: `make lint`.)"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES = 250, 80


def long_functions(source: str) -> Iterator[str]:
    """Functions of more lines than allowed, from ``def`` to the end, without a comment ``# long: why`` on or above it."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        first = node.lineno - 1
        above = min([first, *(decorator.lineno - 1 for decorator in node.decorator_list)]) - 1
        excused = any(re.search(r"# long: \w", lines[number]) for number in (first, above) if number >= 0)
        if node.end_lineno - first > FUNCTION_LINES and not excused:
            yield f"{node.name}, {node.end_lineno - first} lines"


def test_functions_are_short_or_say_why() -> None:
    found = [
        f"{path}: {each}" for path in sorted(ROOT.glob("asrkit/**/*.py")) for each in long_functions(path.read_text())
    ]
    assert not found


def test_a_stage_is_one_short_file() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("asrkit/stages/*.py")}
    assert len(lengths) > 10 and not {name: length for name, length in lengths.items() if length > FILE_LINES}


def test_no_test_stops_the_clock_of_the_process() -> None:
    """A finalizer or a thread that waits with a timeout would never wake; see ``helpers.clock``."""
    patched = re.compile(r"setattr\(\s*(time\b|[\"'][\w.]*\btime\.\w)")
    assert patched.search('setattr("asrkit.x.time.sleep"') and patched.search("setattr(time, 'sleep'")
    found = [str(path) for path in sorted(ROOT.glob("tests/**/*.py")) if patched.search(path.read_text())]
    assert found == [__file__]


@pytest.mark.parametrize(
    ("head", "excused"),
    [
        ("def f():", False),
        ("def f():  # long: a table", True),
        ("# long: a table\ndef f():", True),
        ("# long: a table\n@g\ndef f():", True),
        ("# long:\ndef f():", False),
        ("# long: of another\n\ndef f():", False),
    ],
)
def test_a_long_function_says_why(head: str, excused: bool) -> None:
    body = "    x = 1\n"
    assert bool(list(long_functions(f"{head}\n{body * 80}"))) != excused
    assert not list(long_functions(f"def f():\n{body * 79}"))
