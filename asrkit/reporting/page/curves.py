"""metrics.jsonl of several stages as curves in one view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from asrkit.errors import clip
from asrkit.reporting.metrics import Points, read_metrics
from asrkit.reporting.page.figures import color, dashes, panel, svg
from asrkit.reporting.page.systems import Model

MOST_POINTS = 400  # of one curve
MOST_PANELS = 60
FIRST = {
    "loss": "Training loss",
    "dev_wer": "Dev WER, %",
    "lr": "Learning rate",
    "gradient_norm": "Gradient norm",
    "timing.audio_per_second": "Seconds of audio per second",
    "timing.data_wait": "Share of time waiting for data",
    "staleness": "Mean staleness of gradients, in steps",
}
HIDDEN = ("epoch", "timing.seconds", "timing.version")
STALENESS = "timing.staleness."  # and an age in steps: how many gradients were so old


class Curve(NamedTuple):
    """One metric of one stage: (step, value), steps counted from the stage's first."""

    model: Model
    points: Points


def draw_curves(models: Sequence[Model]) -> tuple[list[str], list[str]]:
    """The panels that matter most, and those of all other metrics, each as SVG.

    Stages that start from one another stand side by side, each as wide as the others, however many steps it has; stages that are as far
    from the first one, such as one stage with several seeds, lie over each other.
    """
    read = [(model, _shown(read_metrics(model.path))) for model in models]
    read = [(model, curves) for model, curves in read if curves]
    keys = list(dict.fromkeys(key for _, curves in read for key in curves))[:MOST_PANELS]
    first = [key for key in FIRST if key in keys]
    groups = (first, [key for key in keys if key not in first])
    slots = _slots([model for model, _ in read])
    most = [0] * (1 + max(slots.values(), default=0))  # the steps of each slot's longest stage
    for model, curves in read:
        steps = max(points[-1][0] for points in curves.values())
        most[slots[model.name]] = max(most[slots[model.name]], steps, 1)
    drawn = [
        [
            _panel(key, [Curve(model, curves[key]) for model, curves in read if key in curves], slots, most)
            for key in group
        ]
        for group in groups
    ]
    return drawn[0], drawn[1]


def _shown(curves: Mapping[str, Points]) -> dict[str, Points]:
    """What is drawn of them: rates in per cent, and of the gradients' ages their mean."""
    shown = {
        key: [(step, 100 * value) for step, value in points] if key in ("dev_wer", "dev_cer") else points
        for key, points in curves.items()
        if key not in HIDDEN and not key.startswith(STALENESS)
    }
    if staleness := mean_staleness(curves):
        shown["staleness"] = staleness
    return shown


def mean_staleness(curves: Mapping[str, Points]) -> Points:
    """The mean age of the gradients of each line of the log, as the asynchronous driver counts them; [] where it did not train."""
    ages: dict[int, float] = {}
    counts: dict[int, float] = {}
    for key, points in curves.items():
        age = key.removeprefix(STALENESS)
        if key.startswith(STALENESS) and age.isdecimal() and len(age) < 10:
            for step, count in points:
                ages[step] = ages.get(step, 0.0) + int(age) * count
                counts[step] = counts.get(step, 0.0) + count
    return [(step, ages[step] / counts[step]) for step in sorted(ages) if counts[step] > 0]


def _slots(models: Sequence[Model]) -> dict[str, int]:
    """By a model's name, how many of the other models it went through."""
    own = {model.keys[-1] for model in models}
    return {model.name: sum(key in own for key in model.keys[:-1]) for model in models}


def _panel(key: str, curves: Sequence[Curve], slots: Mapping[str, int], most: Sequence[int]) -> str:
    title = FIRST.get(key, clip(key))  # a run directory may be a stranger's
    with panel(title) as (figure, axes):
        titles = {}
        for number, curve in enumerate(curves):
            slot, stride = slots[curve.model.name], -(-len(curve.points) // MOST_POINTS)
            kept = [*curve.points[:-1:stride], curve.points[-1]]
            places, values = [slot + step / most[slot] for step, _ in kept], [value for _, value in kept]
            hue = list(slots).index(curve.model.name)
            gid = f"curve-{number}"
            axes.plot(places, values, dashes(hue), color=color(hue), marker="o" if len(kept) < 8 else None, markersize=4,
                      linewidth=1.6, label=curve.model.name, gid=gid)  # fmt: skip
            low, last = min(curve.points, key=lambda point: point[1]), curve.points[-1]
            titles[gid] = (
                f"{curve.model.name}: last {last[1]:.4g} after step {last[0]}, lowest {low[1]:.4g} after step {low[0]}"
            )
        axes.set_xlim(0, len(most))
        axes.set_xticks(range(len(most) + 1), [])
        axes.set_xticks([slot + 0.5 for slot in range(len(most))], [f"{steps:,} steps" for steps in most], minor=True)
        axes.tick_params(axis="x", which="minor", length=0, labelrotation=90 if len(most) > 5 else 0)
        if len(slots) > 1:
            axes.legend()
        return svg(figure, f"{title}. {'; '.join(titles.values())}", titles)
