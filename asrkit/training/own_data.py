"""Replicas that each have data of their own: numbers of batches that all of them share, and who has which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asrkit.data.bucketing import BucketPlan
from asrkit.data.cut_table import CutTable
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.train_batches import DataConfig, TrainBatches
from asrkit.errors import UserError
from asrkit.training.run_writer import RunWriter, read_sealed, write_sealed

OWN_DATA = "replicas.yaml"  # in the run directory: the manifest of each replica


@dataclass(frozen=True)
class Report:
    """All that a replica tells about its manifest: its SHA-256, its amount of data, and which cuts cannot be used, and why."""

    sha256: str
    utterances: int
    seconds: float
    left_out: dict[str, str]


def record(run: RunWriter, manifests: Sequence[Path], reports: Sequence[Report]) -> dict[str, Any]:
    """Write what the replicas' manifests are to the run directory; returns the lineage's part of it.

    Raises:
        UserError: a resumed run, and they are others now.
    """
    content = [
        {
            "manifest": str(path),
            "sha256": report.sha256,
            "utterances": report.utterances,
            "seconds": round(report.seconds, 3),
        }
        for path, report in zip(manifests, reports, strict=True)
    ]
    file = run.path / OWN_DATA
    if not run.fresh and file.is_file():
        findings = [
            f"{run.path}: was started with other bytes of --manifest {now['manifest']}; restore it, or choose another --out"
            for before, now in zip(read_sealed(file), content, strict=True)
            if before["sha256"] != now["sha256"]
        ]
        if findings:
            raise UserError.of(findings)
    elif run.world.is_main:
        for report in reports:
            for cut_id, reason in report.left_out.items():
                run.leave_out(cut_id, reason)
        write_sealed(file, content)
    run.save_left_out()
    return {"manifests": {**run.lineage[-1]["manifests"], **{one["manifest"]: one["sha256"] for one in content}}}


class OwnBatches:
    """``batches[number]`` where item ``number // per_item`` is of replica ``item % replicas``, the ``item // replicas``-th of its own.

    Args:
        own: the batches of each replica, with ``per_item`` slices each; None where they are another process's.
        per_item: batches of a push. pushes: pushes of a step.
    """

    def __init__(self, own: Sequence[TrainBatches | None], per_item: int, pushes: int) -> None:
        self._own, self._per_item, self.slices = own, per_item, per_item * pushes
        here = [batches.plan.steps_per_epoch for batches in own if batches is not None]
        # A process that has some replicas' data takes those of the others to be as much.
        self.plan = Epochs(max(1, sum(here) * len(own) // (max(1, len(here)) * pushes)))

    def __getitem__(self, number: int) -> Any:
        item, part = divmod(number, self._per_item)
        batches = self._own[item % len(self._own)]
        if batches is None:
            raise LookupError(
                f"batch {number} is of replica {item % len(self._own)}, whose data are not in this process"
            )
        return batches[item // len(self._own) * self._per_item + part]


@dataclass(frozen=True)
class Epochs:
    """As much of a plan as the log needs."""

    steps_per_epoch: int


def no_batches(data: DataConfig, slices: int, tokenizer: Tokenizer, seed: int) -> TrainBatches:
    """Batches of a process that has no data: what builds a task finds the tokenizer and the settings, and no cut."""
    plan = BucketPlan(np.ones(1), data.max_duration, 1, 1, seed)
    return TrainBatches(CutTable([]), plan, slices, data, tokenizer, None, seed)
