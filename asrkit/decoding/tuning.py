"""The search for the settings of a beam search with the fewest errors: one option at a time, in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from asrkit.errors import UserError

# The values that are tried of each option, by its name; our choice.
GRID: dict[str, tuple[float, ...]] = {
    "lm-scale": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    "lodr-scale": (0.0, 0.05, 0.1, 0.2, 0.3),
    "length-bonus": (-0.5, 0.0, 0.5, 1.0),
    "blank-penalty": (0.0, 0.5, 1.0, 1.5, 2.0),
    "temperature": (0.8, 1.0, 1.25, 1.5),
    "hotwords-score": (0.5, 1.0, 1.5, 2.0, 3.0),
    "beam": (2, 4, 8),
    "graph-scale": (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    "search-beam": (8, 12, 16, 20),
    "output-beam": (4, 6, 8),
    "max-active": (800, 2500, 10000),
}
PART_OF = {"lm-scale": "lm", "lodr-scale": "lodr", "hotwords-score": "hotwords"}  # what an option is of no use without
PART_OF |= dict.fromkeys(("graph-scale", "search-beam", "output-beam", "max-active"), "graph")
WHOLE = ("beam", "max-active")
USUAL = ("graph-scale", "lm-scale", "blank-penalty")  # tuned by default, those of them that have an effect
ROUNDS = 2
MAX_VALUES = 50

Settings = dict[str, float]


def parse_over(text: str, parts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """``lm-scale,blank-penalty=0:0.5:1`` to the values to try of each option, those of ``GRID`` where none are given.

    Args:
        parts: which of lm, lodr, hotwords and graph there are.

    Raises:
        UserError: a line for each option that there is not, has no part, or a value that is no number.
    """
    findings, over = [], {}
    for word in text.split(","):
        name, equals, listed = word.strip().partition("=")
        if name not in GRID:
            findings.append(f"--over {name}: unknown; use {', '.join(GRID)}")
            continue
        if PART_OF.get(name, "") not in ("", *parts):
            findings.append(f"--over {name}: has no effect without --{PART_OF[name]}; add it")
        if name == "beam" and "graph" in parts:
            findings.append("--over beam: has no effect with --graph, whose beams are search-beam and output-beam")
        values = listed.split(":") if equals else []
        try:
            numbers = tuple(map(float, values)) or GRID[name]
        except ValueError:
            numbers = (math.nan,)
        if not all(map(math.isfinite, numbers)) or len(numbers) > MAX_VALUES:
            findings.append(f"--over {word.strip()}: write numbers with colons between them, as in {name}=0.1:0.2:0.3")
        elif name in WHOLE and not all(number >= 1 and number == int(number) for number in numbers):
            findings.append(f"--over {word.strip()}: {name} must be a whole number of at least 1")
        else:
            over[name] = numbers
    if findings:
        raise UserError.of(findings)
    return over


def usual_over(parts: Sequence[str]) -> str:
    """What to vary by default, in the form that ``parse_over`` reads."""
    return ",".join(name for name in USUAL if PART_OF.get(name, "") in ("", *parts))


def coordinate_search(
    start: Settings, over: Mapping[str, Sequence[float]], measure: Callable[[Settings], float]
) -> tuple[Settings, list[tuple[Settings, float]]]:
    """The settings with the smallest measure, and everything that was tried with its measure.

    Each option in turn takes the best of its values with the others as they are, the first of equals, until a whole round changes
    nothing, or ``ROUNDS`` have passed. Nothing is measured twice.
    """
    tried: list[tuple[Settings, float]] = []
    known: dict[tuple[float, ...], float] = {}

    def error(settings: Settings) -> float:
        key = tuple(settings.values())
        if key not in known:
            known[key] = measure(settings)
            tried.append((settings, known[key]))
        return known[key]

    best = dict(start)
    for _ in range(ROUNDS):
        before = best
        for name, values in over.items():
            candidates = [best, *({**best, name: value} for value in values)]
            best = min(candidates, key=error)
        if best == before:
            break
    return best, tried
