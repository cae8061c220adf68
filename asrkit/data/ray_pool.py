"""Processes of a Ray cluster that compute parts of some work; see ``Pool`` in ``parallel.py``."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from asrkit.data.forks import attempt
from asrkit.data.ray_session import import_ray, local_ray, other_versions, ray_cluster, versions, wait_for_start
from asrkit.errors import UserError

LOCAL = "local"  # instead of an address: a Ray on this machine alone
PATIENCE = 1.0  # seconds between looks at Ray's own processes
MAX_DEATHS = 3  # of processes in a row, for each process, without a result in between


@contextmanager
def ray_workers(address: str, jobs: int | None) -> Iterator[RayWorkers]:
    """Processes of a Ray cluster.

    Args:
        address: HOST:PORT, auto, or ``local``. jobs: processes; None is one for each of the cluster's processors.

    Raises:
        UserError: Ray is not installed, no cluster answers, it has fewer processors, or other versions of asrkit or torch.
    """
    ray = import_ray(local=address == LOCAL)
    here = len(os.sched_getaffinity(0))
    session = local_ray(jobs or here, 0) if address == LOCAL else ray_cluster(address)
    with session as check_alive:
        have = here if address == LOCAL else int(ray.cluster_resources().get("CPU", 0))
        if (jobs or 1) > have:
            where = "this machine" if address == LOCAL else "the cluster"
            advice = f"use --jobs {have} or fewer, or add machines" if have else "add machines"
            raise UserError(f"--jobs {jobs or 1}: {where} has {have} processors; {advice}")
        workers = RayWorkers(ray, jobs or have, check_alive)
        workers.check_versions()
        yield workers


class Actor:
    """A process of the cluster: it computes with one thread, as the processes of ``--jobs`` on one machine do.

    Args:
        folder: where paths are relative to, if it exists there. environment: variables to set.
    """

    def __init__(self, folder: str, environment: dict[str, str]) -> None:
        import torch

        with suppress(OSError):
            os.chdir(folder)
        os.environ.update(environment)
        torch.set_num_threads(1)
        self._function: Callable[[Any], Any] | None = None

    def versions(self) -> dict[str, str]:
        return versions()

    def use(self, function: Callable[[Any], Any]) -> None:
        """Compute ``function`` from now on."""
        self._function = function

    def compute(self, part: bytes) -> bytes:
        """``attempt`` of the pickled part."""
        assert self._function is not None
        return attempt(self._function, pickle.loads(part))


class RayWorkers:
    """Actors that stay for one function after another."""

    def __init__(self, ray: Any, size: int, check_alive: Callable[[], None]) -> None:
        self.ray, self.check_alive = ray, check_alive
        self.actors = [self.start() for _ in range(size)]

    def start(self) -> Any:
        """A new actor."""
        own = {name: value for name, value in os.environ.items() if name.startswith("ASRKIT_")}
        return self.ray.remote(Actor).options(num_cpus=1, max_restarts=0).remote(os.getcwd(), own)

    def check_versions(self) -> None:
        """
        Raises:
            UserError: a process has another asrkit or torch, or does not start.
        """
        answers = [actor.versions.remote() for actor in self.actors]
        wait_for_start(self.ray, answers, "--jobs")
        try:
            everywhere = self.ray.get(answers)
        except self.ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"a process of the Ray cluster does not start ({reason}); is asrkit installed on every machine, and is there memory enough?"
            ) from error
        if findings := [line for there in everywhere for line in other_versions("the Ray cluster", there)]:
            raise UserError.of(list(dict.fromkeys(findings)))

    def pool(self, function: Callable[[Any], Any], parts: Sequence[Any], describe: Callable[[Any], str]) -> RayPool:
        """The actors with this function."""
        return RayPool(self, function, parts, describe)


class RayPool:
    """Actors that know one function; see ``Pool``. The part of one that dies is computed by another."""

    def __init__(
        self,
        workers: RayWorkers,
        function: Callable[[Any], Any],
        parts: Sequence[Any],
        describe: Callable[[Any], str],
    ) -> None:
        self._workers, self._parts, self._describe = workers, parts, describe
        self.size = min(len(workers.actors), len(parts))
        try:
            # Stored once: the processes of a machine share its arrays.
            self._function = workers.ray.put(function)
        except Exception as error:  # what has no pickle says so by many kinds of errors
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--ray-address: this work cannot be sent to other processes ({reason}); use --jobs on this machine without --ray-address"
            ) from error
        self._deaths = 0
        self._busy: dict[Any, tuple[int, int]] = {}  # by the answer that is waited for: worker and part
        self._send(workers.actors[: self.size])

    def _send(self, actors: Sequence[Any]) -> None:
        """Let actors have the function.

        Raises:
            UserError: one lacks a package that the function needs, or has died.
        """
        try:
            self._workers.ray.get([actor.use.remote(self._function) for actor in actors])
        except self._workers.ray.exceptions.RayActorError as error:
            raise UserError(
                "a process of the Ray cluster died when it was sent its work, most likely because memory ran out; run it again with a "
                "lower --jobs"
            ) from error
        except self._workers.ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UserError(
                f"a process of the Ray cluster cannot read what it was sent ({lines[-1][:300]}); install the same packages on every machine"
            ) from error

    def give(self, worker: int, part: int) -> None:
        answer = self._workers.actors[worker].compute.remote(pickle.dumps(self._parts[part]))
        self._busy[answer] = worker, part

    def take(self) -> tuple[int, int, bool, Any]:
        ray = self._workers.ray
        while True:
            done, _ = ray.wait(list(self._busy), timeout=PATIENCE)
            self._workers.check_alive()
            for answer in done:
                worker, part = self._busy.pop(answer)
                try:
                    fine, result = pickle.loads(ray.get(answer))
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
                    self._revive(worker, part)
                    continue
                self._deaths = 0
                return worker, part, fine, result

    def _revive(self, worker: int, part: int) -> None:
        """Start an actor in place of one that has died, and let it compute the part.

        Raises:
            UserError: they die again and again.
        """
        self._deaths += 1
        self._workers.actors[worker] = self._workers.start()
        if self._deaths > MAX_DEATHS * self.size:
            raise UserError(
                f"processes of the Ray cluster died {self._deaths} times in a row, most likely because memory ran out, the last at "
                f"{self._describe(self._parts[part])}; run it again with a lower --jobs"
            )
        self._send([self._workers.actors[worker]])
        self.give(worker, part)

    def end(self) -> None:
        """End what is still computed: nobody will take it."""
        for worker, _ in self._busy.values():
            self._workers.ray.kill(self._workers.actors[worker])
            self._workers.actors[worker] = self._workers.start()
