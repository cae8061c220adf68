"""What tests read from run directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from asrkit.models import AsrModel, load_model
from asrkit.run_dir import open_run


def model_of(run: Path) -> AsrModel:
    return load_model(open_run(run))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_equal(one: Path, other: Path) -> bool:
    """Whether two runs have the same weights, bit for bit."""
    (a, b) = (open_run(run).weights() for run in (one, other))
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())
