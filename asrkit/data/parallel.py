"""One function over the parts of some work, in several processes of this machine or of a Ray cluster, with the results of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar, cast

from asrkit.data.forks import Forks, cores, may_fork
from asrkit.errors import UserError

P = TypeVar("P")
R = TypeVar("R")
AHEAD = 4  # parts that each process may be ahead of the results that are taken


class Pool(Protocol):
    """Processes that compute parts of some work; each is given the number of a part, and is then busy until ``take`` names it."""

    size: int

    def give(self, worker: int, part: int) -> None: ...

    def take(self) -> tuple[int, int, bool, Any]:
        """Wait for a result: the worker, the part, whether it succeeded, and the result or the error.

        Raises:
            UserError: a process has died, and its part cannot be computed by another.
        """

    def end(self) -> None: ...


class Workers:
    """Who computes: this process, several forks of it, or processes of a Ray cluster.

    A context, in which the connection to a cluster stays open once it is needed; without it, ``in_processes`` opens it each time.

    Args:
        jobs: processes; None is one on this machine, or as many as the cluster has processors.
        ray_address: of a cluster (HOST:PORT or auto), or ``local`` for a Ray on this machine; None takes forks.
    """

    def __init__(self, jobs: int | None = None, ray_address: str | None = None) -> None:
        self.jobs, self.ray_address = jobs, ray_address
        self._entered, self._stack = 0, ExitStack()
        self._cluster: Any = None

    @property
    def several(self) -> bool:
        """Whether others than this process compute."""
        return self.ray_address is not None or (self.jobs or 1) > 1

    @property
    def options(self) -> str:
        """The options that a user has given them by."""
        return "--ray-address" if self.ray_address is not None else "--jobs"

    def __str__(self) -> str:
        return f"{self.options} {self.ray_address or self.jobs}"

    def __enter__(self) -> Workers:
        self._entered += 1
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered -= 1
        if self._entered == 0:
            self._cluster = None
            self._stack.close()

    def pool(self, function: Callable[[P], R], parts: Sequence[P], describe: Callable[[P], str]) -> Pool:
        """Processes that know ``function``.

        Raises:
            UserError: this process cannot fork; or Ray is not installed, no cluster answers, it has fewer processors, or other versions
                of asrkit or torch, or the function cannot be sent to it.
        """
        if self.ray_address is not None:
            if self._cluster is None:  # not before: whoever is connected cannot fork
                from asrkit.data.ray_pool import ray_workers

                self._cluster = self._stack.enter_context(ray_workers(self.ray_address, self.jobs))
            return cast(Pool, self._cluster.pool(function, parts, describe))
        if not may_fork():
            raise UserError("--jobs: this system or process cannot fork; leave --jobs out")
        return Forks(function, parts, min(self.jobs or 1, len(parts)), describe)


ALONE = Workers()


def every_core() -> Workers:
    """A process for each core of this machine; this process alone where it cannot fork."""
    return Workers(cores()) if may_fork() else ALONE


def in_processes(
    function: Callable[[P], R],
    parts: Sequence[P],
    workers: Workers = ALONE,
    describe: Callable[[P], str] = str,
    threads: bool = False,
) -> Iterator[R]:
    """``function`` of each part, in order; the parts do not depend on the workers, so neither do the results.

    Forks of this process share what it has in memory (models, tables of cuts), and only results are sent; processes of a cluster are
    sent the function with all that it uses. Each computes with one thread. With one job everything happens in this process; with
    several, nothing does, even if there is only one part, as the threads that k2 begins with its first search would be missing in the
    forks of a later call.

    Args:
        function: returns what can be pickled; a GPU that was used before cannot be used in it.
        describe: names a part in messages.
        threads: with one job, use several threads of this process: for what works mostly outside Python's lock, as libsndfile does.

    Raises:
        UserError: that of the first part that has one; a process that was killed, with its number, pid and part.
    """
    if not workers.several and threads:
        with ThreadPoolExecutor() as executor:
            yield from executor.map(function, parts)
        return
    if not workers.several:
        yield from map(function, parts)
        return
    if not parts:
        return
    with workers, _ending(workers.pool(function, parts, describe)) as pool:
        idle, results = list(range(pool.size)), dict[int, tuple[bool, Any]]()
        given = 0
        for taken in range(len(parts)):
            while True:
                while idle and given < min(len(parts), taken + AHEAD * pool.size):
                    pool.give(idle.pop(0), given)
                    given += 1
                if taken in results:
                    break
                worker, part, fine, result = pool.take()
                results[part] = fine, result
                idle.append(worker)
            fine, result = results.pop(taken)
            if not fine:
                raise result
            yield result


@contextmanager
def _ending(pool: Pool) -> Iterator[Pool]:
    """The pool, which is ended afterwards."""
    try:
        yield pool
    finally:
        pool.end()
