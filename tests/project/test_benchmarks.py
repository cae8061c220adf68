"""benchmarks/gpu.sh, which is for a machine that is seldom there, on the CPU and in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PARTS = {
    "stages",
    "resume",
    "processes",
    "precision",
    "gradients",
    "throughput",
    "profile",
    "launches",
    "loss",
    "loader",
    "tests",
}


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2", reason="the environment for a GPU is modern, where this runs")
def test_every_part_for_the_gpu_runs_to_its_end(tmp_path: Path) -> None:
    environment = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path), "quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    ends = {row["part"]: row["exit"] for row in rows if "exit" in row}
    assert ends == dict.fromkeys(PARTS, 0), log[-3000:]
    assert not [row for row in rows if row.get("ok") is False]
    assert {row["part"] for row in rows if row.get("ok")} == PARTS - {"tests"}
