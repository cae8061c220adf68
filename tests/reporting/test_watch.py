"""metrics.jsonl while it is written, and the view that follows it."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asrkit.errors import UserError
from asrkit.reporting.metrics import read_metrics
from asrkit.reporting.watch import BARS, read_standing, screen, sparkline, watch
from asrkit.run_dir import CONFIG, DONE, METRICS, write_yaml
from helpers.commands import asrkit


def test_metrics_are_read_by_key_whatever_lies_between(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 2.0, "timing": {"audio_per_second": 5}, "skipped_cuts": ["a"], "ok": true}',
        '{"step": 2, "loss": NaN, "dev_wer": 0.25}', "[]", '{"loss": 1}', "", '{"step": Infinity, "loss": 1}',
        f'{{"step": 2, "loss": {"9" * 400}, "lr": 1e300}}', f'{{"step": {"9" * 400}, "loss": 1}}', '{"step": -1, "loss": 1}',
        '{"step": true, "loss": 1}', '{"step": "2", "loss": 1}', '{"step": 3, "lo',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path) == {"loss": [(1, 2.0)], "timing.audio_per_second": [(1, 5.0)], "dev_wer": [(2, 0.25)]}
    assert read_metrics(tmp_path / "none") == {}


def write_training(run: Path, step: int) -> None:
    """A run of 100 steps, of which each tenth was logged up to ``step``, at two seconds a step."""
    run.mkdir(exist_ok=True)
    write_yaml(run / CONFIG, {"stage": "qat", "training": {"steps": 100}})
    rows = []
    for number in range(10, step + 1, 10):
        timing = {"audio_per_second": 50.0, "data_wait": 0.25, "step_seconds": 2.0, "memory_mb": 1500.0}
        rows += [{"step": number, "loss": 10 / number, "lr": 0.1, "timing": timing}]
        rows += [{"step": number, "dev_wer": 0.5, "timing": {"seconds": 9.0}}]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "lo')


def test_one_screen_says_where_a_training_stands(tmp_path: Path) -> None:
    write_training(tmp_path, 50)
    ago = time.time() - 30
    os.utime(tmp_path / METRICS, (ago, ago))
    shown = list(screen(read_standing(tmp_path)))
    assert all(len(line) <= 80 for line in shown[1:])
    assert shown[0].endswith(": qat, step 50 of 100") and len(shown) == 6
    assert f"[{'#' * 18}{'-' * 18}] about 2 min left, last line 30 s ago" in shown[1]
    assert "0.2  █▄▂▁▁" in shown[2] and shown[2].endswith("lowest 0.2 after step 50")
    assert "50 %  ▁▁▁▁▁" in shown[3] and "rate" in shown[4] and "lowest" not in shown[4]
    assert shown[5].strip() == "50 s of audio a second, 25 % waiting for data, at most 1.50 GB"
    (tmp_path / METRICS).unlink()
    assert list(screen(read_standing(tmp_path)))[1].endswith("nothing logged yet")


@given(st.lists(st.floats(-1e6, 1e6), max_size=100), st.integers(1, 40))
def test_a_sparkline_goes_from_the_lowest_bar_to_the_highest(values: list[float], width: int) -> None:
    drawn = sparkline(values, width)
    assert len(drawn) == min(width, len(values)) and set(drawn) <= set(BARS)
    if len(values) <= width and values and max(values) > min(values):
        assert drawn[values.index(min(values))] == BARS[0] and drawn[values.index(max(values))] == BARS[-1]


@pytest.mark.parametrize("terminal", [False, True])
def test_it_follows_until_the_training_is_finished(tmp_path: Path, terminal: bool) -> None:
    write_training(tmp_path, 10)
    written, looks = io.StringIO(), 0

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 2:  # nothing was new at the first look
            write_training(tmp_path, 20)
        if looks == 3:
            (tmp_path / DONE).touch()

    watch(tmp_path, Console(file=written, force_terminal=terminal, width=120), sleep)
    shown = written.getvalue()
    assert looks == 3
    if terminal:
        assert "step 10 of 100" in shown and "step 20 of 100" in shown and "finished" in shown
        return
    lines = shown.splitlines()
    assert [line.partition(": ")[2].split("  ")[0] for line in lines] == ["step 10/100", "step 20/100", "step 20/100"]
    assert "loss 0.5  lr 0.1  dev WER 50.00 %  about" in lines[1] and lines[2].endswith("finished")


def test_a_directory_without_a_training(tmp_path: Path) -> None:
    for steps in (0, -4, True, 10**400, "4"):
        write_yaml(tmp_path / CONFIG, {"stage": "qat", "training": {"steps": steps}})
        with pytest.raises(UserError, match="no training has begun there"):
            read_standing(tmp_path)
    write_yaml(tmp_path / CONFIG, {"stage": "quantize"})
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="no training has begun there"):
            read_standing(path)
    assert "do not go together" in asrkit("info", tmp_path, "--watch", "--json", code=1)
    write_training(tmp_path, 10)
    (tmp_path / DONE).touch()
    assert "step 10/100  loss 1  lr 0.1  dev WER 50.00 %  finished" in asrkit("info", tmp_path, "--watch")
