"""How many replicas pay: measured here for 1 and 2, predicted for 1 to 256 by a discrete-event simulation.

    python benchmarks/async_scale.py                                # `tiny`, measures and predicts
    python benchmarks/async_scale.py --size small --speed-up 30     # as if replicas and server computed 30 times faster, as on GPUs
    python benchmarks/async_scale.py --replicas 1,8,64 --gigabits 1,100 --max-staleness 16

Compute, fetch, push and update are measured one by one, with a real Ray and made-up speech. The simulation hands out work by the driver's own
``Schedule``; what it predicts for this machine is set beside what a real run does. For a cluster, every replica has a processor of its own,
the server another one, and all transfers share the server's link, one share for each direction; ``--max-staleness`` is that of all rows.
"""

from __future__ import annotations

import heapq
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer

from asrkit.config import from_dict
from asrkit.data.batch import Batch
from asrkit.data.ray_session import import_ray, local_ray
from asrkit.models import SIZES, AsrModel, ModelSpec
from asrkit.training.asr_loss import LossConfig, asr_loss
from asrkit.training.asynchronous.config import AsyncConfig
from asrkit.training.asynchronous.ray_driver import RayRunning
from asrkit.training.asynchronous.replica import Replica, arrays
from asrkit.training.asynchronous.schedule import Schedule, pushes_per_step
from asrkit.training.asynchronous.server import gathered
from asrkit.training.distributed import World
from asrkit.training.session import StageConfig, TaskRecipe
from asrkit.training.step import Metric, StepResult, TrainTask, trained_parameters
from asrkit.training.update import Updater

CPU = torch.device("cpu")


@dataclass(frozen=True)
class SpeechLike:
    """The same batch of noise for every number."""

    slices: int
    utterances: int

    @property
    def plan(self) -> Any:
        return SimpleNamespace(steps_per_epoch=100)

    def __getitem__(self, number: int) -> Batch:
        random = torch.Generator().manual_seed(0)
        count, frames, labels = self.utterances, 400, 20
        features = torch.randn(count, frames, 80, generator=random)
        symbols = torch.randint(2, 500, (count, labels), generator=random)
        names = [str(number) for number in range(count)]
        lens, symbol_lens = torch.full((count,), frames), torch.full((count,), labels)
        return Batch(features, lens, names, names, names, [4.0] * count, symbols, symbol_lens)


@dataclass(frozen=True)
class MadeUp(TaskRecipe):
    """A recipe without files."""

    size: str = "tiny"
    utterances: int = 8

    def rebuild(self) -> TrainTask:
        torch.manual_seed(0)
        model = AsrModel(from_dict(ModelSpec, {"vocab_size": 500, **SIZES[self.size]}, "benchmark"))
        settings = from_dict(LossConfig, {"backend": "torch"}, "benchmark")
        return TrainTask(
            model,
            lambda model, batch, step: asr_loss(model, batch, 10_000, settings),
            SpeechLike(self.slices, self.utterances),
        )


def recipe_of(size: str, utterances: int, workers: int, max_staleness: int, steps: int) -> MadeUp:
    training = {"steps": steps, "save_every": 10**6, "log_every": 10**6, "tensorboard": False, "precision": "float32"}
    settings = from_dict(StageConfig, {"training": training, "data": {"num_workers": 0}}, "benchmark")
    pushes = pushes_per_step(workers, max_staleness)
    return MadeUp(
        build=lambda batches: None,  # type: ignore[arg-type, return-value]
        out=Path(),
        manifests=(Path(),),
        settings=settings,
        slices=pushes,
        size=size,
        utterances=utterances,
    )


@dataclass(frozen=True)
class Costs:
    """Seconds of each part of an item. compute, load and give are the replica's; store, take and update the server's.

    load: the replica's part of fetching; store: the server's, once for each version. give and take: the two parts of a push.
    update: of a step. parameters: trained ones.
    """

    compute: float
    load: float
    give: float
    store: float
    take: float
    update: float
    parameters: int

    def faster(self, factor: float) -> Costs:
        """With computing that takes ``factor`` times less; moving bytes takes what it takes."""
        return replace(self, compute=self.compute / factor, update=self.update / factor)


class Measured(Replica):
    """A replica whose parts can be timed by themselves."""

    def give(self) -> list[Any]:
        return arrays(self._parameters)

    def fetch(self, weights: list[Any]) -> float:
        began = time.perf_counter()
        self.load([weights])
        return time.perf_counter() - began

    def timed(self, repeats: int) -> list[float]:
        """Seconds of the gradients of a batch, ``repeats`` times."""
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            self.compute([0], [])
            times.append(time.perf_counter() - began)
        return times


def median(action: Callable[[], Any], repeats: int) -> float:
    action()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(ray: Any, size: str, utterances: int, together: int, repeats: int) -> Costs:
    """Time each part, with ``together`` replicas computing at once."""
    recipe = recipe_of(size, utterances, 1, 0, 10**6)
    task = recipe.rebuild()
    parameters = trained_parameters(task.model)
    actors = [ray.remote(Measured).options(num_cpus=1).remote(1, False, os.getcwd()) for _ in range(together)]
    ray.get([actor.begin.remote(recipe, [range(len(parameters))]) for actor in actors])
    ray.get([actor.timed.remote(2) for actor in actors])
    compute = statistics.median(
        [one for times in ray.get([actor.timed.remote(repeats) for actor in actors]) for one in times]
    )
    store = median(lambda: ray.put(arrays(parameters)), repeats)
    stored = ray.put(arrays(parameters))
    load = median(lambda: ray.get(actors[0].fetch.remote(stored)), repeats)

    def give() -> Any:
        ray.wait([given := actors[0].give.remote()])
        return given

    given = give()
    taking = median(lambda: gathered([[ray.get(given)]], CPU), repeats)
    giving = median(give, repeats)
    with tempfile.TemporaryDirectory() as folder:
        updater = Updater(task, Path(folder), recipe.settings.training, 1, World(0, 1, CPU), lambda *given: None)
        updater.set_rate()

        def update() -> None:
            gradients = [torch.full_like(parameter, 1e-3) for parameter in parameters]
            updater.apply(StepResult(list(gradients), 100.0, metrics={"loss": Metric(1.0, 1.0)}))

        updating = median(update, repeats)
    for actor in actors:
        ray.kill(actor)
    return Costs(compute, load, giving, store, taking, updating, sum(p.numel() for p in parameters))


def run(
    check_alive: Callable[[], None], size: str, utterances: int, workers: int, max_staleness: int, steps: int
) -> float:
    """Pushes per second of a real run, after its first quarter."""
    recipe = recipe_of(size, utterances, workers, max_staleness, steps)
    task, times = recipe.rebuild(), []
    task = replace(task, after_step=lambda model, step: times.append(time.perf_counter()) if model.training else None)
    with tempfile.TemporaryDirectory() as folder:
        place = SimpleNamespace(path=Path(folder), world=World(0, 1, CPU), publish=lambda *given: None)
        settings = from_dict(AsyncConfig, {"driver": "ray", "max_staleness": max_staleness}, "benchmark")
        running = RayRunning(recipe, place, settings, workers, check_alive)  # type: ignore[arg-type]
        task.model.train()
        running.train(task)
        for worker in running.workers:
            running._ray.kill(worker.actor)
    first = len(times) // 4
    return (len(times) - 1 - first) * recipe.slices / (times[-1] - times[first])


@dataclass(frozen=True)
class Prediction:
    """Pushes per second, staleness, and the share of time in which a replica computes."""

    rate: float
    mean_staleness: float
    most: int
    busy: float


class Shared:
    """Jobs that share something of which there are ``units``, each job using at most one: processor sharing.

    A job ends when the work done for each since the beginning, the same for all, reaches what it was when the job came plus its own.
    """

    def __init__(self, units: float) -> None:
        self._units, self._done, self._at = units, 0.0, 0.0
        self._jobs: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def _rate(self) -> float:
        return min(1.0, self._units / max(1, len(self._jobs)))

    def advance(self, now: float) -> None:
        self._done += (now - self._at) * self._rate()
        self._at = now

    def add(self, now: float, work: float, then: Callable[[], None]) -> None:
        self.advance(now)
        self._number += 1
        heapq.heappush(self._jobs, (self._done + work, self._number, then))

    def next_end(self) -> float:
        return self._at + (self._jobs[0][0] - self._done) / self._rate() if self._jobs else float("inf")

    def pop(self, now: float) -> Callable[[], None]:
        self.advance(now)
        return heapq.heappop(self._jobs)[2]


class Simulation:
    """A run of ``steps`` steps of equal replicas.

    Args:
        cores: that replicas and server share; None if each has its own. gigabits: of the server's link, for each direction; None for no link.
    """

    def __init__(
        self, workers: int, max_staleness: int, costs: Costs, steps: int, cores: int | None, gigabits: float | None
    ) -> None:
        self.costs, self.steps = costs, steps
        self.pushes = pushes_per_step(workers, max_staleness)
        self.schedule = Schedule(steps, self.pushes, max_staleness)
        everything = Shared(cores) if cores is not None else None
        self.processors = [everything or Shared(1) for _ in range(workers)]
        self.server = everything or Shared(1)
        self.down, self.up = Shared(1), Shared(1)
        self.transfer = 0.0 if gigabits is None else 32.0 * costs.parameters / (gigabits * 1e9)
        self.resources = list({id(one): one for one in [*self.processors, self.server, self.down, self.up]}.values())
        self.idle = deque(range(workers))
        self.queue: deque[tuple[float, Callable[[], None]]] = deque()  # of the server, which does one thing at a time
        self.serving = False
        self.stored = -1
        self.computing = 0.0
        self.ages: list[int] = []
        self.times: list[float] = []
        self.now = 0.0

    def run(self) -> Prediction:
        self._hand_out()
        while not self.schedule.done:
            next_one = min(self.resources, key=Shared.next_end)
            self.now = next_one.next_end()
            next_one.pop(self.now)()
        first = self.steps // 4
        elapsed = self.times[-1] - self.times[first]
        rate = (self.steps - 1 - first) * self.pushes / elapsed
        ages = self.ages[first * self.pushes :]
        return Prediction(rate, statistics.fmean(ages), max(ages), self.computing / (self.now * len(self.processors)))

    def _serve(self, work: float, then: Callable[[], None]) -> None:
        self.queue.append((work, then))
        self._serve_next()

    def _serve_next(self) -> None:
        if self.serving or not self.queue:
            return
        work, then = self.queue.popleft()
        self.serving = True

        def done() -> None:
            self.serving = False
            then()
            self._serve_next()

        self.server.add(self.now, work, done)

    def _hand_out(self) -> None:
        for _ in range(len(self.idle)):
            worker, item = self.idle.popleft(), self.schedule.reserve()
            if item is not None and self.schedule.start(item, self.schedule.version):
                store = self.costs.store if self.stored != self.schedule.version else 0.0
                self.stored = self.schedule.version
                self._serve(store, lambda worker=worker, item=item: self._fetch(worker, item))  # type: ignore[misc]
                continue
            if item is not None:
                self.schedule.lose(item)
            self.idle.append(worker)

    def _fetch(self, worker: int, item: int) -> None:
        costs, processor = self.costs, self.processors[worker]

        def arrived() -> None:
            processor.add(self.now, costs.load, loaded)

        def loaded() -> None:
            self.computing += costs.compute
            processor.add(self.now, costs.compute, computed)

        def computed() -> None:
            processor.add(self.now, costs.give, given)

        def given() -> None:
            self.up.add(self.now, self.transfer, lambda: self._serve(costs.take, taken))

        def taken() -> None:
            self.schedule.arrive(item)
            self.idle.append(worker)
            self._apply()

        self.down.add(self.now, self.transfer, arrived)

    def _apply(self) -> None:
        if not (items := self.schedule.ready()):
            self._hand_out()
            return

        def applied() -> None:
            self.ages += self.schedule.apply(items)
            self.times.append(self.now)
            self._apply()

        self.queue.appendleft((self.costs.update, applied))  # at once, as the server does
        self._serve_next()


def compare(
    ray: Any,
    check_alive: Callable[[], None],
    size: str,
    utterances: int,
    workers: int,
    max_staleness: int,
    steps: int,
    repeats: int,
    rounds: int,
) -> None:
    """Measure the parts, predict, and run, in turn, because other work on the machine comes and goes; the medians count."""
    cores, rates = len(os.sched_getaffinity(0)), []
    for _ in range(rounds):
        costs = measure(ray, size, utterances, workers, repeats)
        predicted = Simulation(workers, max_staleness, costs, 400, cores, None).run().rate
        rates.append((run(check_alive, size, utterances, workers, max_staleness, steps), predicted))
        parts = ", ".join(f"{name} {1e3 * cost:.1f} ms" for name, cost in vars(costs).items() if name != "parameters")
        print(f"  {workers} at once: {parts}; load of the machine {os.getloadavg()[0]:.1f}", flush=True)
    seen, predicted = (statistics.median(rate) for rate in zip(*rates, strict=True))
    print(
        f"  {workers} replica(s): {seen:.2f} pushes/s, predicted {predicted:.2f} ({predicted / seen - 1:+.0%})",
        flush=True,
    )


def main(
    size: Annotated[str, typer.Option(help="Of the model that is run: tiny, small, medium or large.")] = "tiny",
    utterances: Annotated[int, typer.Option(help="Of 4 s, in each push.")] = 8,
    max_staleness: int = 4,
    steps: Annotated[int, typer.Option(help="Of the real runs.")] = 60,
    repeats: int = 15,
    rounds: Annotated[int, typer.Option(help="Of measuring and running, in turn.")] = 3,
    speed_up: Annotated[float, typer.Option(help="How much faster a cluster's machines compute than this one.")] = 1.0,
    replicas: str = "1,2,4,8,16,32,64,128,256",
    gigabits: str = "1,10,25,100",
    sizes: Annotated[str, typer.Option(help="To predict for.")] = "tiny,small,medium,large",
    real: Annotated[bool, typer.Option(help="Run replicas here and compare.")] = True,
) -> None:
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    ray = import_ray(local=True)
    with local_ray(cores, 0) as check_alive:
        if real:
            print(f"{size}, {utterances} utterances of 4 s a push, {cores} processors, max_staleness {max_staleness}")
            for workers in range(1, min(2, cores) + 1):
                compare(ray, check_alive, size, utterances, workers, max_staleness, steps, repeats, rounds)
        for name in sizes.split(","):
            costs = measure(ray, name, utterances, 1, max(3, repeats // 3)).faster(speed_up)
            print(
                f"\n{name}, {costs.parameters / 1e6:.1f} M parameters: compute {1e3 * costs.compute:.1f} ms, update {1e3 * costs.update:.1f} ms"
            )
            print(
                f"{'Gbit/s':>7} {'replicas':>8} {'pushes/s':>9} {'efficiency':>10} {'computing':>9} {'staleness':>9} {'most':>4}"
            )
            for speed in map(float, gigabits.split(",")):
                alone = 0.0
                for workers in map(int, replicas.split(",")):
                    steps_of = max(40, 12 * workers // pushes_per_step(workers, max_staleness))
                    found = Simulation(workers, max_staleness, costs, steps_of, None, speed).run()
                    alone = alone or found.rate / workers
                    print(
                        f"{speed:7g} {workers:8d} {found.rate:9.2f} {found.rate / workers / alone:10.0%} {found.busy:9.0%} "
                        f"{found.mean_staleness:9.1f} {found.most:4d}",
                        flush=True,
                    )


if __name__ == "__main__":
    typer.run(main)
