"""What a manifest holds, for people to look at: durations, rates of speech, words, and what was dropped on the way."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lhotse.cut import Cut

from asrkit.data.checks import Finding, Survey, find_bad_cuts, survey
from asrkit.data.manifests import text_of
from asrkit.errors import clip
from asrkit.reporting.page.figures import color, panel, svg

DROPPED, SKIPPED = (
    "dropped.tsv",
    "skipped.txt",
)  # beside a manifest: what `asrkit data prompts` and `data import` left out
MOST_WORDS, MOST_ROWS = 40, 200
BINS = 40


@dataclass(frozen=True)
class Surveyed:
    """A manifest as a section of the report. ``dropped``: (id, why, text) of what its maker left out; ``reasons`` counts all of them."""

    path: str
    survey: Survey
    durations: str
    rates: str
    words: list[tuple[str, int]]
    once: int
    findings: list[Finding]
    dropped: list[tuple[str, str, str]] = field(default_factory=list)
    reasons: list[tuple[str, int]] = field(default_factory=list)


def look_at(path: Path, cuts: Sequence[Cut]) -> Surveyed:
    """Describe a manifest's cuts without reading their sound."""
    texts = [text_of(cut) for cut in cuts]
    words = Counter(word for text in texts for word in text.split())
    rates = [len(text.split()) / max(cut.duration, 1e-3) for cut, text in zip(cuts, texts, strict=True) if text.strip()]
    dropped = _dropped(path)
    return Surveyed(
        str(path),
        survey(cuts),
        _histogram("seconds of an utterance", [cut.duration for cut in cuts]),
        _histogram("words in a second", rates),
        words.most_common(MOST_WORDS),
        sum(count == 1 for count in words.values()),
        find_bad_cuts(cuts)[:MOST_ROWS],
        dropped[:MOST_ROWS],
        Counter(reason for _, reason, _ in dropped).most_common(),
    )


def _histogram(label: str, values: Sequence[float]) -> str:
    with panel("", 5.2, 2.4) as (figure, axes):
        counts, edges = np.histogram(values, BINS)
        axes.stairs(counts, edges, fill=True, color=color(0))
        axes.set_xlabel(label)
        axes.set_ylabel("utterances")
        most = counts.argmax()
        return svg(figure, f"{label}: most often {edges[most]:.2g} to {edges[most + 1]:.2g}")


def _dropped(manifest: Path) -> list[tuple[str, str, str]]:
    """(id, why, text) of what `asrkit data` left out of the folder of a manifest; [] where it says nothing."""
    folder = manifest if manifest.is_dir() else manifest.parent
    rows: list[tuple[str, str, str]] = []
    if (folder / DROPPED).is_file():
        with open(folder / DROPPED, encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                rows.append((clip(row.get("id")), clip(row.get("reason")), clip(row.get("text"), 400)))
    if (folder / SKIPPED).is_file():
        lines = (folder / SKIPPED).read_text(encoding="utf-8", errors="replace").splitlines()
        rows += [("", clip(line), "") for line in lines if line.strip()]
    return rows
