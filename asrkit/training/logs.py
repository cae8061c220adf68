"""The logs of a run: the screen, metrics.jsonl and TensorBoard events, with the same numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.live import Live
from rich.text import Text

from asrkit.devices import peak_memory
from asrkit.disk import atomic_write, cannot_write
from asrkit.errors import UserError
from asrkit.extras import require
from asrkit.reporting.console import PlainConsole
from asrkit.reporting.metrics import add_row
from asrkit.reporting.watch import Standing, read_standing, rendered
from asrkit.run_dir import METRICS
from asrkit.training.checkpoint import Progress


class RunLog:
    """Collects sums between logged steps and writes them as means.

    Lines of steps after ``start`` are dropped from an existing metrics.jsonl, because the resumed run writes them again.
    ``timing`` holds what depends on the clock; everything else is reproducible. ``more``, where a driver sets it, gives, from the seconds
    since the last line, what else goes there and what is shown beside it.
    """

    def __init__(self, run: Path, settings: Any, start: int, steps_per_epoch: int, active: bool) -> None:
        self._path, self._settings, self._active = run / METRICS, settings, active
        self._steps_per_epoch = steps_per_epoch
        self._console = PlainConsole(stderr=True)
        self._writer: Any = None
        self._standing: Standing | None = None  # what a terminal shows
        self._display: Live | None = None
        self._clock, self._waited, self._audio, self._steps = time.monotonic(), 0.0, 0.0, 0
        self._start = start
        self.more: Callable[[float], tuple[dict[str, Any], str]] | None = None
        if active and self._path.exists():
            with atomic_write(self._path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in earlier_lines(self._path, start)))

    def __enter__(self) -> RunLog:
        if not self._active:
            return self
        if self._settings.tensorboard:
            try:
                tensorboard = require("tensorboard", for_="training.tensorboard=true")
                self._writer = tensorboard.SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=self._start)
            except UserError as error:
                self.note(f"no TensorBoard events: {error}")
        if self._console.is_terminal:
            self._standing = replace(read_standing(self._path.parent), step=self._start, quiet=None)
            self._display = Live(get_renderable=self._screen, console=self._console, refresh_per_second=4)
            self._display.start()
        if self._start:
            self.note(f"resuming after step {self._start} of {self._settings.steps}")
        self._clock = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.stop()
        if self._writer is not None:
            self._writer.close()

    def note(self, text: str) -> None:
        """A line that stays on the screen."""
        if self._active:
            self._console.print(text, soft_wrap=True)

    def count(self, step: int, audio: float, waited: float) -> None:
        """Note the seconds of audio of one more step, and those that training waited for it."""
        self._waited += waited
        self._audio += audio
        self._steps += 1
        if self._standing is not None:
            self._standing = replace(self._standing, step=step)

    def step(self, progress: Progress, means: dict[str, float], lr: float) -> None:
        """Write the means since the last call; losses are per encoder frame."""
        others = {name: means.get(name, 0.0) for name in ("audio_seconds", "left_out")}
        norm = means.get("gradient_norm")
        elapsed = max(1e-9, time.monotonic() - self._clock)
        steps, self._steps = self._steps, 0
        audio = others["audio_seconds"]
        row: dict[str, Any] = {
            "step": progress.step,
            "epoch": round(progress.step / self._steps_per_epoch, 3),
            **{name: mean for name, mean in means.items() if name not in (*others, "gradient_norm")},
            "lr": lr,
            "gradient_norm": norm,
            **others,
            "timing": {
                "audio_per_second": round(self._audio / elapsed, 2),
                "data_wait": round(self._waited / elapsed, 4),
                "step_seconds": round(elapsed / max(1, steps), 4),
                "memory_mb": round(peak_memory() / 1e6, 1),
            },
        }
        shown_more = ""
        if self.more is not None:
            more, shown_more = self.more(elapsed)
            row["timing"] |= more
        self._clock, self._waited, self._audio = time.monotonic(), 0.0, 0.0
        self._write(row, "train")
        speed = f"  {row['timing']['audio_per_second']:.0f} s audio/s" if audio else ""
        known = f"  dev {shown(progress.last_dev)}" if progress.last_dev else ""
        text = f"loss {row.get('loss', float('nan')):.4f}  lr {lr:.2e}{speed}{shown_more}{known}"
        if self._display is None:
            left = (self._settings.steps - progress.step) * elapsed / max(1, steps)
            self.note(
                f"step {progress.step}/{self._settings.steps}  epoch {row['epoch']:.1f}  {text}  left {left / 60:.1f} min"
            )

    def dev(self, progress: Progress, measured: dict[str, float], seconds: float) -> None:
        """Write a dev measurement."""
        self._write(
            {
                "step": progress.step,
                **{f"dev_{k}": v for k, v in measured.items()},
                "timing": {"seconds": round(seconds, 2)},
            },
            "dev",
        )
        best = "  best so far" if progress.best.get("step") == progress.step else _best(progress)
        self.note(f"step {progress.step}: dev {shown(measured)}{best}")
        self._clock += seconds  # which no step took

    def skipped(self, step: int, cut_ids: list[str]) -> None:
        """Log a skipped step with all its cuts; the screen shows the first ten."""
        self._write({"step": step, "skipped_cuts": cut_ids}, "train")
        more = f" and {len(cut_ids) - 10} more (metrics.jsonl names all)" if len(cut_ids) > 10 else ""
        self.note(
            f"step {step}: the loss or gradient is not finite, so the weights do not change; "
            f"cuts {', '.join(cut_ids[:10])}{more}"
        )

    def _screen(self) -> Text:
        assert self._standing is not None
        return rendered(self._standing)

    def _write(self, row: dict[str, Any], group: str) -> None:
        if not self._active:
            return
        if self._standing is not None:
            add_row(self._standing.curves, row["step"], row)
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise cannot_write(self._path, error) from error
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, float | int) and name != "step":
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])


def earlier_lines(path: Path, start: int) -> list[str]:
    """The lines of metrics.jsonl up to step ``start``. A last line that is not whole, as a power cut leaves it, is dropped.

    Raises:
        UserError: another line is no logged step.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    earlier = []
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)["step"]
            if type(step) is not int:
                raise ValueError("step is no whole number")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number}: is not a logged step ({' '.join(str(error).split())[:80]}); "
                "remove the line, or restore the file"
            ) from None
        if step <= start:
            earlier.append(line)
    return earlier


def _best(progress: Progress) -> str:
    """The best measurement so far, once there is one that counts."""
    return f"  best {shown(progress.best)}" if progress.best else "  not counted yet"


def shown(measured: dict[str, float]) -> str:
    """The first metric, which decides what is best, formatted for the screen."""
    name, value = next(iter(measured.items()))
    return f"WER {value:.2%}" if name == "wer" else f"{name} {value:.2f}"
