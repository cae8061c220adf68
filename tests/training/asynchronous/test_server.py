"""The parameter server and its shards, without processes."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asrkit.errors import UserError
from asrkit.training.asynchronous.ray_driver import RayRunning
from asrkit.training.asynchronous.replica import Ahead, Push, summed
from asrkit.training.asynchronous.schedule import Schedule
from asrkit.training.asynchronous.server import Activity, ParameterServer, gathered
from asrkit.training.asynchronous.shards import Shard, ShardedUpdater, partition
from asrkit.training.config import TrainingConfig
from asrkit.training.distributed import World
from asrkit.training.optim import OptimizerConfig
from asrkit.training.step import LossOutput, Metric, StepResult, TrainTask, trained_parameters
from asrkit.training.stopping import Stopping
from asrkit.training.update import Updater
from helpers.clock import set_clock
from helpers.run_dirs import metrics

CPU = torch.device("cpu")


def task_of(seed: int = 0) -> TrainTask:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.Linear(3, 3))
    model[2].bias.requires_grad_(False)

    def keep(model: Any, step: int) -> None:
        with torch.no_grad():
            model[0].weight[0] = 0.0  # as a mask does

    batches: Any = SimpleNamespace(slices=1, plan=SimpleNamespace(steps_per_epoch=10))
    return TrainTask(model, lambda model, batch, step: LossOutput(torch.zeros(1), 1.0), batches, after_step=keep)


def training(name: str = "sgd", steps: int = 12, **changes: Any) -> TrainingConfig:
    chosen = {"name": name, "learning_rate": 0.05, "warm_up_steps": 0, "decay": "constant", "max_gradient_norm": 1.0}
    optimizer = OptimizerConfig(**{**chosen, **changes})  # type: ignore[arg-type]
    return TrainingConfig(steps=steps, optimizer=optimizer, tensorboard=False, precision="float32", log_every=1)


def updater_of(folder: Path, settings: TrainingConfig, kind: Any = Updater, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    publish = lambda model, step, metrics: None  # noqa: E731
    return kind(task_of(), folder, settings, 1, World(0, 1, CPU), publish, **options)


def gradients_of(random: np.random.Generator, parameters: list[Any], missing: bool = False) -> list[Any]:
    values = [random.standard_normal(parameter.shape).astype(np.float32) for parameter in parameters]
    return [None if missing and index == 1 else value for index, value in enumerate(values)]


@pytest.mark.parametrize(("pushes", "bound"), [(1, 3), (2, 1), (3, 0)])
def test_the_sum_of_the_updates_is_the_change_of_the_weights(pushes: int, bound: int, tmp_path: Path) -> None:
    """For plain gradient descent, whatever order pushes come in: none is lost, none counts twice."""
    random = np.random.default_rng(pushes)
    updater = updater_of(tmp_path / "run", training(max_gradient_norm=1e9))
    updater.task.after_step(updater.model, 0)
    before = [parameter.detach().clone() for parameter in trained_parameters(updater.model)]
    schedule = Schedule(12, pushes, bound)
    server = ParameterServer(updater, schedule, 3, lambda parts: gathered(parts, CPU))
    total = [np.zeros(weight.shape) for weight in before]
    stopping = Stopping()
    running: list[int] = []
    groups: dict[int, tuple[float, list[Any]]] = {}
    steps: list[list[int]] = []
    real = schedule.apply
    schedule.apply = lambda items: steps.append(list(items)) or real(items)  # type: ignore[method-assign, func-returns-value]
    with updater.log:
        while not schedule.done:
            while len(running) < 3 and (item := schedule.reserve()) is not None:
                if not schedule.start(item, schedule.version):
                    schedule.lose(item)
                    break
                running.append(item)
            item = running.pop(int(random.integers(len(running))))
            values, count = gradients_of(random, before), float(random.integers(1, 9))
            groups[item] = count, values
            server.receive(item, Push(count, 2.0, 0.0, {"loss": (count, count)}, []), [values])
            assert server.apply_ready(stopping) == 0
    assert sorted(item for items in steps for item in items) == list(range(12 * pushes))
    for items in steps:
        counts = sum(groups[item][0] for item in items)
        for index, value in enumerate(total):
            value += sum(groups[item][1][index].astype(np.float64) for item in items) / counts
    for weight, start, change in zip(trained_parameters(updater.model), before, total, strict=True):
        expected = start.double() - 0.05 * torch.from_numpy(change)
        expected[0] = weight[0].double() if weight.shape == (7, 5) else expected[0]  # the hook's
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)
    rows = [row["timing"] for row in metrics(tmp_path / "run")]
    ages = [int(age) for row in rows for age, count in row["staleness"].items() for _ in range(count)]
    assert len(ages) == 12 * pushes and max(ages) <= bound
    assert [row["version"] for row in rows] == list(range(1, 13))


def test_gradients_that_are_not_finite_are_dropped_and_their_cuts_named(tmp_path: Path) -> None:
    updater = updater_of(tmp_path / "run", training(steps=2))
    before = [parameter.detach().clone() for parameter in trained_parameters(updater.model)]
    server = ParameterServer(updater, Schedule(2, 1, 0), 1, lambda parts: gathered(parts, CPU))
    bad = gradients_of(np.random.default_rng(0), before)
    bad[0][0, 0] = np.nan
    item = server.schedule.reserve()
    assert item is not None and server.schedule.start(item, 0)
    with updater.log:
        server.receive(item, Push(4.0, 2.0, 0.0, {}, [(["fine", "spoiled"], [True, False])]), [bad])
        server.apply_ready(Stopping())
    assert all(map(torch.equal, before, trained_parameters(updater.model)))
    assert metrics(tmp_path / "run")[0] == {"step": 1, "skipped_cuts": ["spoiled"]}


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 6))
def test_shards_have_every_parameter_once_and_about_as_much(sizes: list[int], shards: int) -> None:
    parts = partition(sizes, shards)
    assert sorted(index for part in parts for index in part) == list(range(len(sizes)))
    filled = [sum(sizes[index] for index in part) for part in parts]
    assert all(parts) and max(filled) - min(filled) <= max(sizes)


class Direct:
    """An actor in this process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adamw", "scaled_adam"])
def test_shards_concatenated_are_the_unsharded_server(name: str, tmp_path: Path) -> None:
    """The weights, the average, and the saved state, from which either goes on."""
    settings = training(name, momentum=0.9 if name == "sgd" else 0.0)

    def sharded(folder: Path) -> tuple[Any, list[list[int]]]:
        parts = partition([weight.numel() for weight in trained_parameters(task_of().model)], 3)
        recipe: Any = SimpleNamespace(rebuild=task_of, settings=SimpleNamespace(training=settings))
        actors = [Direct(Shard()) for _ in parts]
        for actor, part in zip(actors, parts, strict=True):
            actor.begin.remote(recipe, part)
        return updater_of(
            folder, settings, ShardedUpdater, actors=actors, parts=parts, get=lambda answers: answers
        ), parts

    threads = torch.get_num_threads()
    whole, (split, parts) = updater_of(tmp_path / "whole", settings), sharded(tmp_path / "split")
    for step in range(8):
        if step == 4:
            for updater in (whole, split):
                updater.keep()
            whole, (split, parts) = updater_of(tmp_path / "whole", settings), sharded(tmp_path / "split")
        random = np.random.default_rng(step)
        pushes = [gradients_of(random, trained_parameters(whole.model), missing=step % 2 == 1) for _ in range(2)]
        for updater in (whole, split):
            updater.set_rate()
        whole.apply(StepResult(gathered([[push] for push in pushes], CPU), 3.0, metrics={"loss": Metric(1.0, 1.0)}))
        split.gather([[[push[index] for index in part] for part in parts] for push in pushes])
        split.apply(StepResult([], 3.0, metrics={"loss": Metric(1.0, 1.0)}))
    split.read()
    torch.set_num_threads(threads)
    for one, other in ((whole.model, split.model), (whole.average, split.average)):
        for key, value in one.state_dict().items():
            if name == "scaled_adam":  # stacks tensors, whose sums may be rounded another way in other company
                torch.testing.assert_close(value, other.state_dict()[key], rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(value, other.state_dict()[key]), key


def test_a_missing_gradient_counts_as_zeros() -> None:
    one, two = np.ones(2, np.float32), np.full(2, 2.0, np.float32)
    one.flags.writeable = False  # as what another process sends
    sums = summed([[one, None, None], [two, two, None]])
    assert [None if total is None else total.tolist() for total in sums] == [[3.0, 3.0], [2.0, 2.0], None]
    assert one.tolist() == [1.0, 1.0]


def test_batches_are_made_ahead_and_once() -> None:
    made: list[int] = []

    class Source:
        def __getitem__(self, number: int) -> Any:
            made.append(number)
            made_by = threading.current_thread().name
            return SimpleNamespace(to=lambda device: (number, made_by))

    ahead = Ahead(Source(), 1, CPU)
    ahead.make([4, 5], [6])
    assert ahead[4][0][0] == 4 and ahead[5][0][0] == 5
    ahead.make([6], [7])
    assert ahead[6][0][1] != threading.current_thread().name
    ahead.make([9], [])
    assert ahead[9][0][0] == 9 and made.count(6) == 1 and made[:3] == [4, 5, 6]
    assert Ahead(Source(), 0, CPU)[3][0] == (3, threading.current_thread().name)


def test_idle_time_and_speed_are_those_since_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    set_clock(monkeypatch, "asrkit.training.asynchronous.server", monotonic=lambda: now)
    activity = Activity(2)
    activity.begin(0, 5)
    now = 4.0
    activity.end(0, 12.0)
    activity.begin(1, 6)
    activity.staleness.update([0, 2])
    now = 8.0
    row, text = activity.report(9)
    assert row["replicas"][0] == {"version": 5, "idle": 0.5, "audio_per_second": 1.5}
    assert row["replicas"][1] == {"version": 6, "idle": 0.5, "audio_per_second": 0.0}
    assert row["staleness"] == {"0": 1, "2": 1} and text == "  staleness 1.0 (most 2)  idle 50% of 2 replicas"
    now = 10.0
    row, _ = activity.report(9)
    assert row["replicas"][1]["idle"] == 0.0 and row["staleness"] == {}


def test_a_stage_that_changes_the_model_before_each_step_is_refused() -> None:
    with pytest.raises(UserError, match="changes the model before each step, which replicas cannot do"):
        RayRunning.__new__(RayRunning).train(replace(task_of(), before_step=lambda *given: None))
