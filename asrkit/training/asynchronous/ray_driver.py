"""The driver with replicas in processes of their own, on this machine or a cluster, by Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from asrkit.data.ray_session import import_ray, local_ray, other_versions, ray_cluster, wait_for_start
from asrkit.errors import UserError
from asrkit.training.asynchronous.config import AsyncConfig
from asrkit.training.asynchronous.replica import Push, Replica, arrays
from asrkit.training.asynchronous.schedule import Schedule, pushes_per_step
from asrkit.training.asynchronous.server import ParameterServer, gathered
from asrkit.training.asynchronous.shards import Shard, ShardedUpdater, partition
from asrkit.training.own_data import Epochs, OwnBatches, Report
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import Running, TaskRecipe
from asrkit.training.step import TrainTask, trained_parameters
from asrkit.training.stopping import Interrupted, Stopping, watched_signals
from asrkit.training.update import Updater

PATIENCE = 0.2  # seconds between looks at signals and at Ray's own processes
MAX_DEATHS = 3  # of replicas in a row, for each replica, without a push in between


@dataclass(frozen=True)
class RayDriver:
    """Trains with ``workers`` replicas; this process is the parameter server."""

    settings: AsyncConfig
    workers: int

    @classmethod
    def checked(cls, settings: AsyncConfig, workers: int) -> RayDriver:
        """The driver, if this machine can run it.

        Raises:
            UserError: Ray is not installed, or there are fewer processors or GPUs than the replicas take.
        """
        import_ray(local=settings.ray_address is None)
        if settings.ray_address is None:
            have = {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}
            _check_resources(settings, workers, have, "this machine", "or give the address of a cluster")
        return cls(settings, workers)

    @property
    def pushes(self) -> int:
        return pushes_per_step(self.workers, self.settings.max_staleness)

    @contextmanager
    def start(self, recipe: TaskRecipe, run: RunWriter) -> Iterator[Running]:
        """Start the replicas.

        Raises:
            UserError: Ray does not start or no cluster answers, or a replica has another version of asrkit or torch.
        """
        if run.world.size > 1:
            raise UserError("replicas are started by asrkit itself; run the command without torchrun")
        settings = self.settings
        if settings.ray_address is None:
            gpus = torch.cuda.device_count() if settings.gpus_per_worker else 0
            session = local_ray(self.workers, gpus)
        else:
            session = ray_cluster(settings.ray_address)
        with session as check_alive:
            running = RayRunning(recipe, run, settings, self.workers, check_alive)
            running.check_replicas()
            yield running


@dataclass
class Worker:
    """A replica as the server sees it.

    item: the one it computes, if ``begun``; reserved: the one it makes the batches of. version: of its weights, -1 before it has any.
    pushes: since it fetched them. answer: of the call it works on.
    """

    number: int
    actor: Any
    begun: bool = False
    item: int | None = None
    reserved: int | None = None
    version: int = -1
    pushes: int = 0
    answer: list[Any] = field(default_factory=list)


class RayRunning:
    """Replicas that have started, and the loop that gives them work."""

    def __init__(
        self, recipe: TaskRecipe, run: RunWriter, settings: AsyncConfig, workers: int, check_alive: Callable[[], None]
    ) -> None:
        self._ray = import_ray(local=settings.ray_address is None)
        self.recipe, self.run, self.settings, self._check_alive = recipe, run, settings, check_alive
        self._deaths = 0
        self._parts: list[list[int]] = []
        self._stored: tuple[int, list[Any]] = (-1, [])
        self.workers = [Worker(number, self._start_actor(number)) for number in range(workers)]

    def _start_actor(self, number: int) -> Any:
        settings = self.settings
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": settings.gpus_per_worker, "max_restarts": 0}
        if settings.sites:
            options["resources"] = {settings.sites[number]: 0.001}
        actor = self._ray.remote(Replica).options(**options)
        return actor.remote(settings.threads, settings.gpus_per_worker > 0, str(Path.cwd()))

    def check_replicas(self) -> None:
        """Refuse replicas that cannot run, or that would compute something else.

        Raises:
            UserError: too few processors or GPUs, or other work has them; asrkit is not installed there, or another version of it or of torch.
        """
        if self.settings.ray_address is not None:
            _check_resources(
                self.settings, len(self.workers), self._ray.cluster_resources(), "the cluster", "or add machines"
            )
        answers = [worker.actor.versions.remote() for worker in self.workers]
        wait_for_start(self._ray, answers, "--workers")
        findings = [
            line
            for number, there in enumerate(self._get(answers))
            for line in other_versions(f"replica {number}", there)
        ]
        if findings:
            raise UserError.of(findings)

    def _get(self, answers: Any) -> Any:
        """What replicas answered.

        Raises:
            UserError: that of a replica, or it died.
        """
        try:
            return self._ray.get(answers)
        except self._ray.exceptions.RayTaskError as error:
            raise self._cause(error) from error
        except self._ray.exceptions.RayActorError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"a replica did not start ({reason}); is asrkit installed on every machine, and is there memory enough?"
            ) from error

    def _cause(self, error: Any) -> BaseException:
        """What a user should read of an error in a replica; the error itself where that is a defect."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, self._ray.exceptions.RaySystemError):  # what it was sent names something it does not have
            lines = [line for line in str(cause).splitlines() if line.strip()]
            return UserError(
                f"a replica cannot read what it was sent ({lines[-1].strip()}); install the same packages on every machine"
            )
        return error

    def check_own(self, check: Callable[[Path], Report]) -> list[Report]:
        manifests = zip(self.workers, self.recipe.manifests, strict=True)
        return self._get([worker.actor.check_own.remote(check, manifest) for worker, manifest in manifests])

    def train(self, task: TrainTask) -> None:
        """Train to the last step.

        Raises:
            UserError: what ``loop.train`` raises; replicas that die again and again, or Ray's own processes.
            Interrupted: SIGINT or SIGTERM came; the state is saved.
        """
        if task.before_step is not None:
            raise UserError(
                "this stage changes the model before each step, which replicas cannot do; use asynchronous.driver=serial"
            )
        sizes = [parameter.numel() for parameter in trained_parameters(task.model)]
        self._parts = partition(sizes, self.settings.shards)
        training, recipe, run = self.recipe.settings.training, self.recipe, self.run
        for worker in self.workers:
            self._begin(worker)
        if isinstance(task.batches, OwnBatches):  # only the replicas know how much there is
            steps = self._get([worker.answer[0] for worker in self.workers])
            task.batches.plan = Epochs(round(sum(steps) / len(steps)))
        arguments = (task, run.path, training, recipe.slices, run.world, run.publish, False)
        if len(self._parts) > 1:
            updater: Updater = self._sharded(arguments)
        else:
            updater = Updater(*arguments)
        sources, pushes = len(recipe.manifests), recipe.slices // training.accumulate
        saved = updater.progress.schedule
        schedule = Schedule(training.steps, pushes, self.settings.max_staleness, sources, updater.step, saved)
        if isinstance(updater, ShardedUpdater):
            server = ParameterServer(updater, schedule, len(self.workers), updater.gather)
        else:
            server = ParameterServer(updater, schedule, len(self.workers), partial(gathered, device=run.world.device))
        with watched_signals() as stopping, updater.log:
            stop = updater.measure(stopping) if updater.progress.measure_due else 0
            while not stop and not schedule.done:
                stop = self._turn(server, stopping)
        if stop:
            raise Interrupted(stop)

    def _sharded(self, arguments: tuple[Any, ...]) -> ShardedUpdater:
        """An updater whose parameters are in processes of their own."""
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        actors = [self._ray.remote(Shard).options(**options).remote() for _ in self._parts]
        self._get([actor.begin.remote(self.recipe, part) for actor, part in zip(actors, self._parts, strict=True)])
        return ShardedUpdater(*arguments, actors=actors, parts=self._parts, get=self._get_of_shards)

    def _get_of_shards(self, answers: Any) -> Any:
        try:
            return self._ray.get(answers)
        except self._ray.exceptions.RayError as error:
            raise UserError(
                f"a server shard was lost ({' '.join(str(error).split())[:200]}); run the same command again to go on from the last save"
            ) from error

    def _begin(self, worker: Worker) -> None:
        """Let a replica build its task."""
        own = (worker.number,) if len(self.recipe.manifests) > 1 else ()
        worker.begun, worker.version, worker.pushes = False, -1, 0
        worker.answer = [worker.actor.begin.remote(replace(self.recipe, replicas=own), self._parts)]

    def _turn(self, server: ParameterServer, stopping: Stopping) -> int:
        """Give work to those who have none, and take what is done; returns the exit code to end with, 0 to go on."""
        for worker in self.workers:
            if not worker.answer:
                self._give_work(worker, server)
        waiting = {worker.answer[0]: worker for worker in self.workers if worker.answer}
        done, _ = self._ray.wait(list(waiting), timeout=PATIENCE)
        try:
            self._check_alive()
        except UserError:
            server.updater.keep()
            raise
        for answer in done:
            self._take(waiting[answer], server)
        stop = server.apply_ready(stopping)
        if not stop and stopping.code:
            server.updater.keep()
            stop = stopping.code
        return stop

    def _give_work(self, worker: Worker, server: ParameterServer) -> None:
        """Start an item in an idle replica, unless its gradients could become too old."""
        schedule, source = server.schedule, worker.number if len(self.recipe.manifests) > 1 else 0
        if worker.reserved is not None:
            schedule.lose(worker.reserved)  # an item that was lost elsewhere is due earlier
        worker.reserved = item = schedule.reserve(source)
        if item is None:  # all that are left are others'; one that a slow replica has not begun is better done here
            for other in self.workers:
                if other.reserved is not None and other.answer and len(self.recipe.manifests) == 1:
                    worker.reserved, other.reserved = other.reserved, None
                    item = worker.reserved
                    break
            else:
                return
        assert item is not None
        due = worker.version < 0 or worker.pushes >= self.settings.fetch_every
        weights: list[Any] = []
        if due or not schedule.start(item, worker.version):
            if not schedule.start(item, schedule.version):
                return
            weights = self._weights(server.updater, schedule.version)
            worker.version, worker.pushes = schedule.version, 0
        worker.item, worker.reserved = item, schedule.reserve(source)
        server.activity.begin(worker.number, worker.version)
        compute = worker.actor.compute.options(num_returns=1 + len(self._parts))
        worker.answer = compute.remote(self._numbers(item), self._numbers(worker.reserved), *weights)

    def _numbers(self, item: int | None) -> range:
        """The numbers of an item's batches."""
        size = self.recipe.settings.training.accumulate
        return range(0) if item is None else range(item * size, (item + 1) * size)

    def _weights(self, updater: Updater, version: int) -> list[Any]:
        """References to the weights of a version, which must be that of now; they are stored once."""
        if self._stored[0] != version:
            if isinstance(updater, ShardedUpdater):
                self._stored = version, updater.weights()
            else:
                self._stored = version, [self._ray.put(arrays(trained_parameters(updater.model)))]
        return self._stored[1]

    def _take(self, worker: Worker, server: ParameterServer) -> None:
        """Take what a replica has done. One that has died is started again, and its items are handed out again."""
        exceptions = self._ray.exceptions
        answer, worker.answer = worker.answer, []
        try:
            push, *parts = self._ray.get(answer if len(self._parts) == 1 else answer[:1])
        except exceptions.RayTaskError as error:
            raise self._cause(error) from error
        except (exceptions.RayActorError, exceptions.ObjectLostError):
            self._revive(worker, server)
            return
        if not worker.begun:
            worker.begun = True
            return
        assert worker.item is not None and isinstance(push, Push)
        self._deaths = 0
        server.activity.end(worker.number, push.audio)
        server.receive(worker.item, push, parts or answer[1:])
        worker.item, worker.pushes = None, worker.pushes + 1

    def _revive(self, worker: Worker, server: ParameterServer) -> None:
        self._deaths += 1
        for item in (worker.item, worker.reserved):
            if item is not None:
                server.schedule.lose(item)
        server.activity.end(worker.number, 0.0)
        worker.item = worker.reserved = None
        if self._deaths > MAX_DEATHS * len(self.workers):
            server.updater.keep()
            raise UserError(
                f"replicas have died {self._deaths} times without a push in between, most likely because memory ran out; the state is saved: lower "
                "data.max_duration or --workers in a new run"
            )
        server.updater.log.note(
            f"replica {worker.number} died and is started again; what it was computing is computed again"
        )
        worker.actor = self._start_actor(worker.number)
        self._begin(worker)


def _check_resources(settings: AsyncConfig, workers: int, have: Mapping[str, float], where: str, else_: str) -> None:
    """Refuse more replicas than there are processors, GPUs, or machines with their data."""
    findings = []
    if (cpus := have.get("CPU", 0.0)) < workers:
        findings.append(
            f"{workers} workers need as many processors, but {where} has {cpus:.0f}; use --workers {max(1, int(cpus))} or fewer, {else_}"
        )
    wanted = workers * settings.gpus_per_worker
    if (gpus := have.get("GPU", 0.0)) < wanted:
        findings.append(
            f"{workers} workers with {settings.gpus_per_worker:g} GPUs each need {wanted:g}, but {where} has {gpus:g}; lower asynchronous.gpus_per_worker, {else_}"
        )
    if settings.ray_address is not None:
        findings += [
            f"{site}: {where} has no resource of that name; ray start --resources gives one"
            for site in settings.sites
            if site not in have
        ]
    if findings:
        raise UserError.of(findings)
