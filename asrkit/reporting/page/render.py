"""From what a report holds to one HTML file.

Texts of manifests and run directories come from strangers. Whatever they say, they stay texts: Jinja escapes all of them, the page's
data is JSON in which no tag can end, its script makes text nodes only, and the page's policy lets no script run but its own and fetches
nothing from any host.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from asrkit import __version__
from asrkit.reporting.compare import Comparison
from asrkit.reporting.compare_tables import explain
from asrkit.reporting.page.chain import Stage
from asrkit.reporting.page.errors import confusion_tables, group_tables
from asrkit.reporting.page.layers import Layer
from asrkit.reporting.page.manifests import Surveyed
from asrkit.reporting.page.systems import Model, TestSet
from asrkit.reporting.tables import percent, points


@dataclass(frozen=True)
class Page:
    """Everything a report shows. ``notes`` are what it lacks, and why."""

    title: str
    created: str
    trees: Sequence[Stage] = ()
    curves: tuple[Sequence[str], Sequence[str]] = ((), ())
    tests: Sequence[TestSet] = ()
    trades: Sequence[Sequence[str]] = ()
    layers: Sequence[tuple[Model, Sequence[Layer]]] = ()
    manifests: Sequence[Surveyed] = ()
    data: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = field(default_factory=list)


def render(page: Page) -> str:
    """The report as HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_file)
    )
    environment.filters |= {"percent": percent, "points": points, "number": _number, "drawn": Markup}
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        page=page,
        version=__version__,
        script=Markup(script),
        script_sha256=digest,
        style=Markup(_file("page.css")),
        explain=explain,
        confusion_tables=confusion_tables,
        group_tables=group_tables,
        significant=_significance,
    )


def _file(name: str) -> str:
    return (files("asrkit.reporting.page") / "files" / name).read_text(encoding="utf-8")


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _significance(change: Comparison | None) -> str:
    """What a change's color says, in a word."""
    if change is None or not change.significant:
        return "maybe"
    return "better" if change.difference < 0 else "worse"
