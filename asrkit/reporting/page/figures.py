"""Matplotlib's figures as SVG inside a page: in the page's colors, light or dark, with what a pointer reads on them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")

# Colors that matplotlib writes and the page's style sheet defines anew, once light and once dark. The series are those of
# Okabe and Ito (2008), which color-blind people can tell apart, and two more.
INK, FAINT = "#010203", "#040506"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#777777")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)", **{c: f"var(--series-{n})" for n, c in enumerate(SERIES)}}

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "asrkit",  # the same figure, the same bytes
    "text.parse_math": False,  # names of files and words are not formulas
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextmanager
def panel(title: str = "", width: float = 5.2, height: float = 3.2) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one panel, to be drawn on and turned into SVG (``svg``) inside the block."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        yield figure, axes


@contextmanager
def bare(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """The same without axes and margins, which takes a tenth of the time: for pictures in a table."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        yield figure, axes


def color(number: int) -> str:
    """The color of a series."""
    return SERIES[number % len(SERIES)]


def dashes(number: int) -> str:
    """The line style of a series; colors that come again have another one."""
    return DASHES[number // len(SERIES) % len(DASHES)]


def svg(figure: Figure, label: str, titles: Mapping[str, str] | None = None) -> str:
    """The figure as an <svg> element for an HTML page.

    Args:
        label: what it shows, for people who cannot see it.
        titles: by the ``gid`` of something drawn, the text shown when a pointer rests on it.
    """
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(written.getvalue())
    for element in root.findall(f"{{{SVG}}}metadata"):
        root.remove(element)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    for element in root.iter(f"{{{SVG}}}g"):
        if (text := (titles or {}).get(element.get("id", ""))) is not None:
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = text
            element.insert(0, title)
    drawn = ElementTree.tostring(root, encoding="unicode")
    for written_color, variable in VARIABLES.items():
        drawn = drawn.replace(f": {written_color}", f": {variable}")
    return drawn
