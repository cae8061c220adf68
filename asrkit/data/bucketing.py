"""Which cuts make the batch of a step, as a pure function of (seed, step): no sampler state, so resuming costs nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class BucketPlan:
    """Which cuts make the batch of a step: every cut once an epoch, cuts of like duration together.

    The cuts, sorted by duration, are parted into buckets of equal audio. A bucket's batch size and number of
    batches are fixed, its order is drawn from (seed, epoch): so a step's epoch, and with it the batch, is known
    without replaying anything.

    Args:
        durations: (N,) seconds.
        max_duration: most seconds in a batch of all slices together, the longest perturbation included.
        slices: processes times accumulated parts; each gets an equal share of every batch.
    """

    def __init__(self, durations: np.ndarray, max_duration: float, num_buckets: int, slices: int, seed: int) -> None:
        self._order = order = np.argsort(durations, kind="stable")
        passed = np.cumsum(durations[order])
        bucket = np.minimum((passed / passed[-1] * num_buckets).astype(int), num_buckets - 1)
        self._buckets = [order[bucket == i] for i in np.unique(bucket)]
        self._batches = []
        for members in self._buckets:
            size = max(1, int(max_duration / slices / durations[members].max())) * slices
            self._batches.append(-(-len(members) // size))
        self.steps_per_epoch = int(sum(self._batches))
        self._slices, self._seed = slices, seed
        self._epoch, self._plan = -1, []  # type: tuple[int, list[np.ndarray]]

    def __call__(self, step: int) -> np.ndarray:
        """Indices of the cuts of ``step`` (from 0); their number is a multiple of ``slices``."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng((self._seed, 1, epoch))
            plan = []
            for members, count in zip(self._buckets, self._batches, strict=True):
                plan += np.array_split(random.permutation(members), count)
            self._plan = [plan[i] for i in random.permutation(len(plan))]
            self._epoch = epoch
        planned = self._plan[index]
        # A batch that its slices cannot share evenly repeats its first cuts.
        return np.resize(planned, -(-len(planned) // self._slices) * self._slices)

    def alike(self, index: int) -> Iterator[int]:
        """The other cuts: the next shorter ones, which fit where this one fits, then the next longer ones."""
        rank = int(np.flatnonzero(self._order == index)[0])
        yield from map(int, self._order[:rank][::-1])
        yield from map(int, self._order[rank + 1 :])
