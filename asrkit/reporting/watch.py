"""Where a training stands: the screen of a training on a terminal, and of `info --watch`, or a line for each change where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from asrkit.errors import UserError, printable
from asrkit.reporting.metrics import MOST_STEPS, Points, read_metrics
from asrkit.run_dir import CONFIG, DONE, METRICS, read_config

BARS = "▁▂▃▄▅▆▇█"
SPARK, BAR = 24, 36  # columns
SECONDS = 2.0  # between two looks
LATEST = 5  # logged lines that the time left is computed from


@dataclass(frozen=True)
class Standing:
    """``curves``: see ``read_metrics``. ``quiet``: seconds since the last line of the log, where somebody else writes it."""

    run: Path
    stage: str
    step: int
    steps: int
    finished: bool
    curves: dict[str, Points]
    quiet: float | None = None

    @property
    def left(self) -> float | None:
        """About how many seconds of steps are left, from the latest ones; measuring is not counted. None where it is not known."""
        latest = sorted(seconds for _, seconds in self.curves.get("timing.step_seconds", [])[-LATEST:])
        return (self.steps - self.step) * latest[len(latest) // 2] if latest else None

    def last(self, key: str) -> float | None:
        """The last value that was logged."""
        return self.curves[key][-1][1] if key in self.curves else None


def read_standing(run: Path) -> Standing:
    """Where the training in a run directory stands, which may go on meanwhile.

    Raises:
        UserError: there is none.
    """
    config = read_config(run) if (run / CONFIG).is_file() else {}
    training = config.get("training")
    steps = training.get("steps") if isinstance(training, dict) else None
    if type(steps) is not int or not 0 < steps <= MOST_STEPS:
        raise UserError(f"{run}: no training has begun there; give the --out of a training stage")
    log = run / METRICS
    quiet = max(0.0, time.time() - log.stat().st_mtime) if log.is_file() else None
    curves = read_metrics(run)
    step = max((points[-1][0] for points in curves.values()), default=0)
    return Standing(run, config["stage"], step, steps, (run / DONE).is_file(), curves, quiet)


def sparkline(values: Sequence[float], width: int = SPARK) -> str:
    """The values from the first to the last as bars between the lowest and the highest, at most ``width`` of them."""
    if not values:
        return ""
    count = min(width, len(values))
    shown = [values[(number + 1) * len(values) // count - 1] for number in range(count)]
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def screen(standing: Standing) -> Iterator[str]:
    """The lines of one screen."""
    step, steps = standing.step, standing.steps
    yield f"{standing.run}: {standing.stage}, step {step:,} of {steps:,}"
    done = round(BAR * min(1.0, step / max(1, steps)))
    yield f"  [{'#' * done}{'-' * (BAR - done)}] {_state(standing)}"
    for key, name, factor, unit in (("loss", "loss", 1, ""), ("dev_wer", "dev WER", 100, " %"), ("lr", "rate", 1, "")):
        if points := standing.curves.get(key):
            at, low = min(points, key=lambda point: point[1])[0], min(value for _, value in points)
            best = "" if key == "lr" else f"  lowest {factor * low:.4g}{unit} after step {at:,}"
            spark = sparkline([value for _, value in points])
            yield f"  {name:8} {f'{factor * points[-1][1]:.4g}{unit}':>10}  {spark:{SPARK}}{best}"
    facts = [
        None if (speed := standing.last("timing.audio_per_second")) is None else f"{speed:.0f} s of audio a second",
        None if (wait := standing.last("timing.data_wait")) is None else f"{100 * wait:.0f} % waiting for data",
        None if (peak := standing.last("timing.memory_mb")) is None else f"at most {peak / 1000:.2f} GB",
    ]
    if known := [fact for fact in facts if fact]:
        yield f"  {', '.join(known)}"


def plain_line(standing: Standing) -> str:
    """The same in one line."""
    parts = [f"{standing.run}: step {standing.step}/{standing.steps}"]
    for key, name in (("loss", "loss"), ("lr", "lr")):
        if (value := standing.last(key)) is not None:
            parts.append(f"{name} {value:.4g}")
    if (rate := standing.last("dev_wer")) is not None:
        parts.append(f"dev WER {100 * rate:.2f} %")
    return "  ".join([*parts, _state(standing)])


def _state(standing: Standing) -> str:
    if standing.finished:
        return "finished"
    if not standing.curves:
        return "nothing logged yet"
    left = "" if standing.left is None else f"about {_duration(standing.left)} left"
    quiet = "" if standing.quiet is None else f"last line {_duration(standing.quiet)} ago"
    return ", ".join(filter(None, (left, quiet)))


def _duration(seconds: float) -> str:
    """``12 s``, ``3 min``, ``4.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def watch(run: Path, console: Console, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show where a training stands until it is finished; a terminal's screen is rewritten, elsewhere each logged step is a line.

    Raises:
        UserError: there is no training in ``run``.
    """
    standing = read_standing(run)
    if not console.is_terminal:
        said = None
        while True:
            logged = (standing.step, len(standing.curves.get("dev_wer", ())), standing.finished)
            if logged != said:
                console.print(printable(plain_line(standing)), markup=False, highlight=False, soft_wrap=True)
                said = logged
            if standing.finished:
                return
            sleep(SECONDS)
            standing = read_standing(run)
    with Live(rendered(standing), console=console, auto_refresh=False) as live:
        while not standing.finished:
            sleep(SECONDS)
            standing = read_standing(run)
            live.update(rendered(standing), refresh=True)


def rendered(standing: Standing) -> Text:
    """The screen, cut at the terminal's edge."""
    return Text(printable("\n".join(screen(standing))), no_wrap=True)
