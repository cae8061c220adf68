"""Gradients of older weights: the recursion, its limit, and runs that are killed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asrkit.errors import UserError
from asrkit.run_dir import open_run
from asrkit.training.config import TrainingConfig
from asrkit.training.delay import Delay
from asrkit.training.distributed import World
from asrkit.training.loop import train
from asrkit.training.optim import OptimizerConfig
from asrkit.training.own_data import OWN_DATA
from asrkit.training.run_writer import read_sealed
from asrkit.training.step import LossOutput, TrainTask
from helpers.replicas import corpus_and_parent, driver, train_with
from helpers.run_dirs import metrics, weights_equal
from helpers.tones import rewrite


class Batch(SimpleNamespace):
    def to(self, device: torch.device) -> Batch:
        return self


class Batches:
    """One number each; its value is the number."""

    def __init__(self, slices: int = 1) -> None:
        self.slices, self.plan = slices, SimpleNamespace(steps_per_epoch=10)

    def __getitem__(self, number: int) -> Batch:
        return Batch(cut_ids=[f"cut-{number}"], durations=[1.0], number=number, left_out={})


def descend(
    loss: Callable[[Any, Any, int], torch.Tensor],
    run: Path,
    steps: int,
    delay: Delay,
    rate: float,
    slices: int = 1,
    dtype: torch.dtype = torch.float32,
    save_every: int = 3,
    **changes: Any,
) -> list[float]:
    """Gradient descent on one number, from 1; returns its values after each step."""
    model = torch.nn.Linear(1, 1, bias=False).to(dtype)
    torch.nn.init.ones_(model.weight)
    seen: list[float] = []

    def after(model: Any, step: int) -> None:
        if model.weight.requires_grad:
            seen.append(float(model.weight.detach()))

    def output(model: Any, batch: Any, step: int) -> LossOutput:
        return LossOutput(loss(model.weight, batch, step).reshape(1), 1.0)

    task = TrainTask(model, output, Batches(slices), after_step=after)
    chosen = {"name": "sgd", "learning_rate": rate, "max_gradient_norm": 1e9, "warm_up_steps": 0, "decay": "constant"}
    optimizer = OptimizerConfig(**{**chosen, **changes})  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "tensorboard": False,
        "precision": "float32",
        "average_decay": 0.5,
        "save_every": save_every,
    }
    run.mkdir(exist_ok=True)
    train(
        task, run, TrainingConfig(steps=steps, optimizer=optimizer, **options), 0, 1, World(0, 1, torch.device("cpu")),
        lambda model, step, metrics: None, delay,
    )  # fmt: skip
    return seen


def quadratic(weight: torch.Tensor, batch: Any, step: int) -> torch.Tensor:
    return 0.5 * 3.0 * weight.square()


@pytest.mark.parametrize("staleness", [0, 1, 4, 16])
def test_a_fixed_staleness_is_the_delayed_recursion_with_its_limit(staleness: int, tmp_path: Path) -> None:
    limit = 2 * math.sin(math.pi / (2 * (2 * staleness + 1))) / 3.0
    steps = 30 * (staleness + 1)
    for name, share in (("below", 0.8), ("above", 1.2)):
        values, rate = [1.0], share * limit
        for step in range(steps):
            values.append(values[-1] - rate * 3.0 * values[max(0, step - staleness)])
        seen = descend(quadratic, tmp_path / name, steps, Delay(staleness), rate, dtype=torch.float64, save_every=9999)
        assert seen == pytest.approx(values[1:], rel=1e-9, abs=1e-12)
        last = max(map(abs, seen[-2 * staleness - 2 :]))
        assert last < 0.5 if name == "below" else last > 2.0


@given(st.integers(0, 5), st.integers(1, 4), st.integers(0, 40))
def test_versions_grow_and_are_old_enough(staleness: int, fetch_every: int, step: int) -> None:
    delay = Delay(staleness, fetch_every)
    assert delay.version(step) <= delay.version(step + 1)
    assert min(step, staleness) <= step - delay.version(step) <= staleness + fetch_every - 1


@pytest.mark.parametrize(
    ("at", "staleness", "fetch_every", "name"),
    [(1, 0, 1, "sgd"), (4, 2, 1, "adagrad"), (7, 4, 3, "adamw"), (11, 3, 2, "scaled_adam")],
)
def test_killed_at_any_step_it_ends_with_the_same_bits(
    at: int, staleness: int, fetch_every: int, name: str, tmp_path: Path
) -> None:
    delay = Delay(staleness, fetch_every)

    def drawn(weight: torch.Tensor, batch: Any, step: int) -> torch.Tensor:
        return (weight - batch.number * torch.rand(())).square().sum()

    def fatal(weight: torch.Tensor, batch: Any, step: int) -> torch.Tensor:
        if step == at:
            raise UserError("killed")
        return drawn(weight, batch, step)

    whole = descend(drawn, tmp_path / "whole", 12, delay, 0.1, slices=2, name=name)
    with pytest.raises(UserError, match="killed"):
        descend(fatal, tmp_path / "killed", 12, delay, 0.1, slices=2, name=name)
    rest = descend(drawn, tmp_path / "killed", 12, delay, 0.1, slices=2, name=name)
    assert rest == whole[-len(rest) :] and len(rest) == 12 - at // 3 * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_and_parent(tmp_path_factory.mktemp("corpus"))


@pytest.mark.slow
def test_a_recognizer_by_simulated_replicas(folder: Path, tmp_path: Path) -> None:
    """One at staleness 0 is the serial driver; two at a barrier are two accumulated batches; older weights are others."""
    serial = train_with(driver(), folder, tmp_path / "serial")
    one = train_with(driver(driver="simulated", workers=1), folder, tmp_path / "one")
    assert weights_equal(serial, one)
    twice = train_with(driver(), folder, tmp_path / "accumulated", "training.accumulate=2")
    two = train_with(driver(driver="simulated", workers=2), folder, tmp_path / "two")
    assert weights_equal(twice, two)
    stale = train_with(driver(driver="simulated", workers=1, staleness=2), folder, tmp_path / "stale")
    assert not weights_equal(serial, stale)
    for run in (serial, stale):  # step 1 has no older weights
        assert metrics(run)[0]["loss"] == metrics(serial)[0]["loss"]


@pytest.mark.slow
def test_replicas_with_their_own_data(folder: Path, tmp_path: Path) -> None:
    run = train_with(
        driver(2, driver="simulated"), folder, tmp_path / "own", "training.accumulate=2", manifests=("train", "other")
    )
    again = tmp_path / "again"
    names = ("train", "other")
    train_with(driver(2, driver="simulated"), folder, again, "training.accumulate=2", manifests=names)
    assert weights_equal(run, again)
    swapped = train_with(driver(2, driver="simulated"), folder, tmp_path / "swapped", manifests=("other", "train"))
    assert not weights_equal(run, swapped)
    with pytest.raises(UserError, match="2 manifests are the data of as many replicas, but there are 3 workers"):
        driver(2, driver="simulated", workers=3)
    with pytest.raises(UserError, match="give one --manifest"):
        train_with(driver(), folder, tmp_path / "serial", manifests=names)
    assert not (tmp_path / "serial").exists()

    with pytest.raises(UserError, match=r"nobody.jsonl.gz: no such file \(--manifest\)"):
        train_with(driver(2, driver="simulated"), folder, tmp_path / "new", manifests=("train", "nobody"))
    assert not (tmp_path / "new").exists()
    (again / "done").unlink()
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    rewrite(copied / "other.jsonl.gz", lambda number, cut: cut["supervisions"][0].update(text="alpha"))
    shutil.move(folder / "other.jsonl.gz", tmp_path / "kept")
    shutil.copy(copied / "other.jsonl.gz", folder)
    try:
        with pytest.raises(UserError, match="again: was started with other bytes of --manifest .*other.jsonl.gz"):
            train_with(driver(2, driver="simulated"), folder, again, "training.accumulate=2", manifests=names)
    finally:
        shutil.move(tmp_path / "kept", folder / "other.jsonl.gz")


@pytest.mark.slow
def test_a_bad_cut_of_a_replica_is_left_out(folder: Path, tmp_path: Path) -> None:
    """Refused, or listed as any other, and left out of the resumed run too."""
    rewrite_copy = tmp_path / "data"
    shutil.copytree(folder, rewrite_copy)
    rewrite(
        rewrite_copy / "other.jsonl.gz",
        lambda number, cut: cut["supervisions"][0].update(text="~") if number == 1 else None,
    )
    names, two = ("train", "other"), driver(2, driver="simulated")
    with pytest.raises(UserError, match="cut other-1: "):
        train_with(two, rewrite_copy, tmp_path / "run", manifests=names)
    assert not (tmp_path / "run").exists()
    run = train_with(two, rewrite_copy, tmp_path / "run", "bad_cuts=skip", manifests=names)
    assert list(read_sealed(run / "left_out.yaml")) == ["other-1"]
    recorded = read_sealed(run / OWN_DATA)
    assert [one["utterances"] for one in recorded] == [8, 7]
    assert open_run(run).lineage[-1]["manifests"] == {one["manifest"]: one["sha256"] for one in recorded}
