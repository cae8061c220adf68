"""metrics.jsonl of a run directory, read while it may still be written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from asrkit.run_dir import METRICS

Points = list[tuple[int, float]]  # step and value
MOST_STEPS = 1 << 53  # what a float tells from the next one
LARGEST = 1e100  # a value above is damage, and cannot be drawn


def read_metrics(run: Path) -> dict[str, Points]:
    """Every number that was logged, by its key (``timing.data_wait``); lines that a killed run left half written are passed over."""
    curves: dict[str, Points] = {}
    if not (run / METRICS).is_file():
        return curves
    for line in (run / METRICS).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if type(step) is int and 0 <= step <= MOST_STEPS:
            add_row(curves, step, row)
    return curves


def add_row(curves: dict[str, Points], step: int, row: Mapping[str, Any]) -> None:
    """Add the numbers of one logged line to ``curves``."""
    for key, value in _numbers(row):
        if key != "step":
            curves.setdefault(key, []).append((step, value))


def _numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
            yield f"{prefix}{key}", float(value)
