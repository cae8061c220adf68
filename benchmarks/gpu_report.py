"""How the parts of gpu.sh write down what they find: a JSON line each, at once, so that a part that is stopped loses nothing."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Report:
    """Appends findings of one ``part`` to a file that other parts append to as well."""

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part, self._began = path, part, time.monotonic()

    def add(self, name: str, **finding: Any) -> None:
        row = {"part": self._part, "name": name, **finding, "after": round(time.monotonic() - self._began, 1)}
        line = json.dumps(row, default=str)
        print(line)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def attempt(self, name: str, measure: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Add what ``measure(*arguments)`` finds, or why it failed."""
        began = time.monotonic()
        try:
            finding = {"ok": True, **measure(*arguments)}
        except Exception as error:  # whatever it is, the next measurement goes on
            traceback.print_exc()
            finding = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        self.add(name, **finding, seconds=round(time.monotonic() - began, 1))


def run_part(parts: dict[str, Callable[[Report, bool], None]]) -> None:
    """Run the part that the command line names: ``PART --out FILE [--quick]``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=parts)
    parser.add_argument("--out", type=Path, required=True, help="the file to append to")
    parser.add_argument("--quick", action="store_true", help="in small, to try the script itself")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    parts[options.part](Report(options.out, options.part), options.quick)
