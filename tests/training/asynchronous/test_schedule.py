"""Who computes what: every item is applied once, in time, whoever is slow or dies."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.training.asynchronous.schedule import Schedule, pushes_per_step

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from async_scale import Costs, Simulation, recipe_of

CASES = st.tuples(st.integers(1, 7), st.integers(0, 6), st.integers(1, 6), st.integers(0, 10**6), st.booleans())


def simulate(
    workers: int,
    max_staleness: int,
    steps: int,
    random: np.random.Generator,
    own: bool,
    death: float,
    kill_at: int = -1,
) -> tuple[list[list[int]], list[int]]:
    """The items of each step and all stalenesses, for replicas of random speeds that die now and then.

    Args:
        kill_at: the driver dies after this many steps and goes on from the state saved at some step before.
    """
    pushes = pushes_per_step(workers, max_staleness)
    sources = workers if own else 1
    schedule = Schedule(steps, pushes, max_staleness, sources)
    speed = random.uniform(0.1, 1.0, workers)
    busy: dict[int, tuple[float, int]] = {}
    reserved: dict[int, int] = {}
    held = [0] * workers
    applied: list[list[int]] = []
    ages: list[int] = []
    saved, saved_at = json.dumps(schedule.state()), 0
    now = 0.0
    while not schedule.done:
        for worker in random.permutation(workers):
            if worker in busy:
                continue
            source = int(worker) if own else 0
            if worker in reserved:
                schedule.lose(reserved.pop(worker))  # it may have to make way for one that is due earlier
            item = schedule.reserve(source)
            if item is None:
                continue
            reserved[worker] = item
            if random.uniform() < 0.5 and schedule.start(item, held[worker]):  # weights it has from before
                pass
            elif schedule.start(item, schedule.version):
                held[worker] = schedule.version
            else:
                continue
            busy[worker] = (now + random.exponential(speed[worker]), reserved.pop(worker))
        assert busy, "nobody may compute, and nothing is applied"
        worker = min(busy, key=lambda each: busy[each])
        now, item = busy.pop(worker)
        if random.uniform() < death:
            schedule.lose(item)
        else:
            schedule.arrive(item)
        while items := schedule.ready():
            ages += schedule.apply(items)
            applied.append(items)
            if random.uniform() < 0.3:
                saved, saved_at = json.dumps(schedule.state()), schedule.version
        if 0 <= kill_at <= len(applied):
            kill_at = -1
            schedule = Schedule(steps, pushes, max_staleness, sources, saved_at, json.loads(saved))
            applied, busy, reserved, held = applied[:saved_at], {}, {}, [saved_at] * workers
            ages = ages[: saved_at * pushes]
    return applied, ages


@settings(deadline=None, max_examples=300)
@given(CASES, st.sampled_from([0.0, 0.3]), st.integers(-1, 4))
def test_every_item_is_applied_once_and_in_time(
    case: tuple[int, int, int, int, bool], death: float, kill_at: int
) -> None:
    workers, max_staleness, steps, seed, own = case
    applied, ages = simulate(workers, max_staleness, steps, np.random.default_rng(seed), own, death, kill_at)
    pushes = pushes_per_step(workers, max_staleness)
    items = [item for step in applied for item in step]
    assert len(applied) == steps and all(len(step) == pushes for step in applied)
    assert len(set(items)) == len(items) and max(ages) <= max_staleness
    if not own:
        assert sorted(items) == list(range(steps * pushes))
    if max_staleness == 0:  # a barrier
        assert applied == [list(range(step * pushes, (step + 1) * pushes)) for step in range(steps)]


@pytest.mark.parametrize(
    ("workers", "max_staleness", "pushes"),
    [(1, 0, 1), (1, 9, 1), (4, 0, 4), (4, 3, 1), (4, 1, 2), (64, 8, 8), (16, 4, 4)],
)
def test_as_few_pushes_as_keep_all_busy(workers: int, max_staleness: int, pushes: int) -> None:
    assert pushes_per_step(workers, max_staleness) == pushes
    schedule = Schedule(100, pushes, max_staleness)
    assert all(schedule.start(schedule.reserve() or 0, 0) for _ in range(workers))  # all of them at once


def test_equal_replicas_in_turn_have_the_greatest_staleness() -> None:
    schedule = Schedule(20, 1, 3)
    running = []
    for _ in range(4):
        item = schedule.reserve()
        assert item is not None and schedule.start(item, 0)
        running.append(item)
    ages = []
    while running:
        schedule.arrive(running.pop(0))
        ages += schedule.apply(schedule.ready())
        if (item := schedule.reserve()) is not None and schedule.start(item, schedule.version):
            running.append(item)
    assert ages == [0, 1, 2, *[3] * 17]


def test_a_slow_replica_is_waited_for_and_no_longer() -> None:
    schedule = Schedule(100, 1, 2)
    slow = schedule.reserve()
    assert slow is not None and schedule.start(slow, 0)
    done = 0
    while (item := schedule.reserve()) is not None and schedule.start(item, schedule.version):
        schedule.arrive(item)
        if not (ready := schedule.ready()):
            break
        schedule.apply(ready)
        done += 1
    assert done == 2 and schedule.version == 2  # the third would make the slow one too old
    schedule.arrive(slow)
    assert schedule.apply(schedule.ready()) == [2]
    assert schedule.ready()  # the third has waited


def test_what_the_benchmark_runs_and_predicts() -> None:
    """The made-up task is one; without costs of moving, more replicas make as many times more pushes."""
    task = recipe_of("tiny", 2, 2, 4, 10).rebuild()
    assert len(task.batches[0].cut_ids) == 2 and task.batches.slices == pushes_per_step(2, 4)
    costs = Costs(compute=0.1, load=0.0, give=0.0, store=0.0, take=0.0, update=0.0, parameters=1)
    one, four = (Simulation(workers, 4, costs, 200, workers, None).run().rate for workers in (1, 4))
    assert one == pytest.approx(10, rel=0.05) and four == pytest.approx(40, rel=0.05)
