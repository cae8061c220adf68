"""A small recognizer trained further by any driver, as a stage that includes ``AsyncConfig`` does it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from asrkit.config import from_dict, resolve
from asrkit.data.train_batches import TrainBatches
from asrkit.run_dir import open_run
from asrkit.stages.train_backbone import TrainBackboneConfig, build_task, defaults
from asrkit.training.asynchronous.config import AsyncConfig
from asrkit.training.asynchronous.drivers import make_driver
from asrkit.training.session import Driver, fine_tune
from asrkit.training.step import LossOutput, TrainTask
from helpers.commands import QUICK, asrkit, quick
from helpers.tones import make_corpus

SHAPE = [
    "model.size=tiny", "model.num_layers=1", "model.dim=16", "model.feedforward_dim=16", "model.kernel_size=3",
    "model.predictor_dim=8", "model.joiner_dim=8",
]  # fmt: skip
PLAIN = [name for name in QUICK if not name.startswith("training.save_every")]


def corpus_and_parent(folder: Path) -> Path:
    """Manifests ``train``, ``other`` and ``dev``, and a recognizer ``parent`` trained on the first for two steps."""
    make_corpus(folder, 8, 0, "train")
    make_corpus(folder, 8, 2, "other")
    make_corpus(folder, 3, 1, "dev")
    asrkit(
        "train-backbone", "--manifest", folder / "train.jsonl.gz", "--out", folder / "parent", "--max-duration", 10,
        *quick(*SHAPE, "training.steps=2", "tokenizer.vocab_size=18"),
    )  # fmt: skip
    return folder


def settings_of(folder: Path, *changes: str) -> TrainBackboneConfig:
    # the trained model's dropout acts too, so that a wrong seed is seen
    return resolve(TrainBackboneConfig, None, [*PLAIN, "data.max_duration=5", *changes], defaults(folder / "parent"))


def train_with(
    driver: Driver, folder: Path, out: Path, *changes: str, manifests: Sequence[str] = ("train",), odd: bool = False
) -> Path:
    """Train ``folder``'s parent further, as a stage does; ``odd``: see ``odd_task``."""
    settings = settings_of(folder, *changes)
    paths = [folder / f"{name}.jsonl.gz" for name in manifests]
    build: Any = partial(odd_task if odd else build_task, settings, folder / "parent", out)
    return fine_tune(
        "train-backbone",
        open_run(folder / "parent"),
        paths,
        out,
        settings,  # type: ignore[arg-type]
        build,
        driver=driver,
        device="cpu",
    )


def driver(manifests: int = 1, **settings: Any) -> Driver:
    return make_driver(from_dict(AsyncConfig, settings, "test"), [Path(str(number)) for number in range(manifests)])


def odd_task(settings: TrainBackboneConfig, parent: Path, out: Path, batches: TrainBatches) -> TrainTask:
    """The task, but the first process that makes it and finds a file ``slow`` beside the run takes half a second longer for each batch, and the loss
    of the cut named in a file ``spoiled`` is no number."""
    task = build_task(settings, parent, out, batches)
    slow, spoiled = out.with_name("slow"), out.with_name("spoiled")
    cut_id = spoiled.read_text() if spoiled.exists() else ""
    is_slow = False
    with suppress(OSError):
        slow.unlink()  # for one process only
        is_slow = True

    def loss(model: Any, batch: Any, step: int) -> LossOutput:
        output = task.loss(model, batch, step)
        if is_slow:
            time.sleep(0.5)
        factors = [math.nan if name == cut_id else 1.0 for name in batch.cut_ids]
        return replace(output, losses=output.losses * torch.tensor(factors))

    return replace(task, loss=loss)
