"""Which replica computes what, and when its gradients may be applied, so that none is older than allowed.

No clock, no process and no tensor: the drivers and the benchmark's simulation all ask this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def pushes_per_step(workers: int, max_staleness: int) -> int:
    """How many pushes make a step: as few as keep all ``workers`` busy within ``max_staleness``; all of them at 0, a barrier.

    While a replica computes, each of the others pushes once: (workers - 1) // pushes steps, if they are equally fast. Our choice, after
    the n-softsync protocol (arXiv 1511.05950, section 3.1), which sums workers / n gradients a step for a mean staleness of n.
    """
    return -(-workers // (max_staleness + 1))


class Schedule:
    """Hands out items, each a number of batches whose gradients make one push; every item is applied exactly once.

    ``pushes`` items make a step. An item is reserved (its batches can be made), started (its gradients are being computed, from the
    weights of a version), and arrived. The version is the number of the steps applied. When a step is applied, the staleness of each of
    its items is the version minus the one the item started from; it is at most ``max_staleness``: nothing is started, and no step is
    applied, after which the oldest items could no longer be applied in time. (Stale synchronous parallel, Ho et al. 2013, is the like
    bound on a replica's clock.)

    Args:
        steps: the last version.
        sources: replicas with data of their own; item ``number`` is of source ``number % sources``.
        version, saved: from where a saved run goes on: see ``state``.
    """

    def __init__(
        self,
        steps: int,
        pushes: int,
        max_staleness: int,
        sources: int = 1,
        version: int = 0,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        self.steps, self.pushes, self.max_staleness, self.sources = steps, pushes, max_staleness, sources
        self.version = version
        saved = saved or {}
        self._next: list[int] = list(saved.get("next", range(sources)))  # of each source
        self._again: set[int] = set(saved.get("again", ()))
        self._reserved: set[int] = set()
        self._started: dict[int, int] = {}  # item -> version, arrived items too
        self._arrived: set[int] = set()

    @property
    def done(self) -> bool:
        return self.version >= self.steps

    def state(self) -> dict[str, Any]:
        """What a saved run needs to go on: items that are handed out but not applied are handed out again."""
        return {"next": list(self._next), "again": sorted({*self._again, *self._reserved, *self._started})}

    def reserve(self, source: int = 0) -> int | None:
        """An item for a replica to prepare; None if all that are needed are handed out."""
        item = min([item for item in self._again if item % self.sources == source], default=self._next[source])
        if (
            self.max_staleness == 0
        ):  # a barrier: the items of each step are fixed, and replicas with their own data take turns
            needed = item < self.steps * self.pushes
        else:
            needed = len(self._started) + len(self._reserved) < (self.steps - self.version) * self.pushes
        if not needed:
            return None
        if item in self._again:
            self._again.remove(item)
        else:
            self._next[source] += self.sources
        self._reserved.add(item)
        return item

    def start(self, item: int, version: int) -> bool:
        """Start a reserved item from the weights of ``version``, unless it could become too old; True if it has started."""
        if self.max_staleness == 0 and item // self.pushes > self.version:
            return False
        if not self._in_time([*self._started.values(), version], self.version):
            return False
        self._reserved.remove(item)
        self._started[item] = version
        return True

    def arrive(self, item: int) -> None:
        """The gradients of a started item are there."""
        self._arrived.add(item)

    def lose(self, item: int) -> None:
        """A reserved or started item is handed out again."""
        self._reserved.discard(item)
        self._started.pop(item, None)
        self._arrived.discard(item)
        self._again.add(item)

    def ready(self) -> list[int]:
        """The items of the next step, by number; [] until enough have arrived, or while older ones have to come first."""
        oldest = sorted(self._arrived, key=lambda item: (self._started[item], item))[: self.pushes]
        if len(oldest) < self.pushes or self.done:
            return []
        rest = [version for item, version in self._started.items() if item not in oldest]
        return sorted(oldest) if self._in_time(rest, self.version + 1) else []

    def apply(self, items: Sequence[int]) -> list[int]:
        """Count a step of these items; returns their staleness."""
        staleness = [self.version - self._started.pop(item) for item in items]
        self._arrived.difference_update(items)
        self.version += 1
        return staleness

    def _in_time(self, versions: list[int], now: int) -> bool:
        """Whether items started from ``versions`` can all be applied in time from the version ``now`` on, the oldest first."""
        return all(
            now + place // self.pushes - version <= self.max_staleness for place, version in enumerate(sorted(versions))
        )
