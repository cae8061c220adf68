"""The parameter server: it takes pushes from replicas, makes steps of them, and says what the replicas did meanwhile."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asrkit.training.asynchronous.replica import Push, summed
from asrkit.training.asynchronous.schedule import Schedule
from asrkit.training.step import Metric, StepResult, add_metrics
from asrkit.training.stopping import Stopping
from asrkit.training.update import Updater


class ParameterServer:
    """Applies pushes in the order and the groups that ``schedule`` allows.

    Weights, optimizer, average, progress, saving, measuring and the log are the ``updater``'s. Its saved state has the schedule's, so that
    a resumed run hands out again what was not applied: every item is in the weights once.

    Args:
        gather: the sums of the gradients of some pushes, from the parts that ``receive`` was given.
    """

    def __init__(
        self,
        updater: Updater,
        schedule: Schedule,
        workers: int,
        gather: Callable[[Sequence[Sequence[Any]]], list[torch.Tensor | None]],
    ) -> None:
        self.updater, self.schedule, self._gather = updater, schedule, gather
        self.activity = Activity(workers)
        self._pushes: dict[int, tuple[Push, Sequence[Any]]] = {}
        updater.log.more = lambda elapsed: self.activity.report(schedule.version)

    def receive(self, item: int, push: Push, parts: Sequence[Any]) -> None:
        """Take the gradients of an item."""
        self._pushes[item] = push, parts
        self.schedule.arrive(item)

    def apply_ready(self, stopping: Stopping) -> int:
        """Make every step whose pushes are there; returns the exit code to end with, 0 to go on.

        Raises:
            UserError: too many steps in a row were not finite, no room to write.
        """
        updater, schedule, stop = self.updater, self.schedule, 0
        while not stop and (items := schedule.ready()):
            pushes = [self._pushes.pop(item) for item in items]
            self.activity.staleness.update(schedule.apply(items))
            updater.progress.schedule = schedule.state()
            updater.set_rate()
            updater.apply(self._merged(pushes))
            stop = updater.finish_step(stopping.code, stopping)
        return stop

    def _merged(self, pushes: Sequence[tuple[Push, Sequence[Any]]]) -> StepResult:
        """The sums of some pushes, in the order of their items."""
        result = StepResult(self._gather([parts for _, parts in pushes]))
        for push, _ in pushes:
            result.count += push.count
            result.audio += push.audio
            result.waited += push.waited
            result.finite += [(cut_ids, torch.tensor(finite)) for cut_ids, finite in push.finite]
            add_metrics(result.metrics, {name: Metric(*sums) for name, sums in push.metrics.items()})
        return result


def gathered(pushes: Sequence[Sequence[Any]], device: torch.device) -> list[torch.Tensor | None]:
    """The sums of pushes whose arrays are all here, as tensors on the device."""
    (whole,) = zip(*pushes, strict=True)
    return [None if total is None else total.to(device) for total in summed(whole)]


@dataclass
class Doing:
    """What a replica has done since the last line of the log. ``version`` is that of its weights."""

    version: int = 0
    busy: float = 0.0
    audio: float = 0.0
    began: float | None = None  # the time at which it began what it does now


class Activity:
    """How busy the replicas are, and how old the gradients."""

    def __init__(self, workers: int) -> None:
        self.staleness: Counter[int] = Counter()
        self._replicas = [Doing() for _ in range(workers)]
        self._since = time.monotonic()

    def begin(self, replica: int, version: int) -> None:
        """The replica begins an item with the weights of ``version``."""
        doing = self._replicas[replica]
        doing.version, doing.began = version, time.monotonic()

    def end(self, replica: int, audio: float) -> None:
        """It has ended the item, of so many seconds of audio; 0 if it has died."""
        doing = self._replicas[replica]
        if doing.began is not None:
            doing.busy += time.monotonic() - doing.began
        doing.audio += audio
        doing.began = None

    def report(self, version: int) -> tuple[dict[str, Any], str]:
        """For metrics.jsonl, and for the screen; the counts begin anew."""
        now = time.monotonic()
        elapsed, self._since = max(1e-9, now - self._since), now
        replicas = []
        for doing in self._replicas:
            if doing.began is not None:
                doing.busy += now - doing.began
                doing.began = now
            idle = max(0.0, 1.0 - doing.busy / elapsed)
            speed = doing.audio / elapsed
            replicas.append({"version": doing.version, "idle": round(idle, 4), "audio_per_second": round(speed, 2)})
            doing.busy = doing.audio = 0.0
        ages, self.staleness = self.staleness, Counter()
        mean = sum(age * count for age, count in ages.items()) / max(1, ages.total())
        row = {
            "version": version,
            "staleness": {str(age): ages[age] for age in sorted(ages)},
            "replicas": replicas,
        }
        idle = sum(one["idle"] for one in replicas) / len(replicas)
        return row, f"  staleness {mean:.1f} (most {max(ages, default=0)})  idle {idle:.0%} of {len(replicas)} replicas"
