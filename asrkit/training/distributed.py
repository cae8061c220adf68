"""Data-parallel processes under torchrun; everything is a no-op in a single process.

Gradients are summed in one flat tensor after the last accumulated part. That is simpler than a wrapper module (a
stage may call any part of its model), treats unused parameters like any other, and keeps the weights of all
processes the same bit by bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

from asrkit.devices import choose_device
from asrkit.errors import UserError, clip

T = TypeVar("T")

# How long processes wait for each other. The main process may measure, hash or check for hours while the others wait. If one
# dies, torchrun ends them all.
TIMEOUT = timedelta(days=7)
LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),  # gloo
    *("ncclRemoteError", "NCCL communicator was aborted"),
)


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one.

    On GPUs, ``auto`` and ``cuda`` give each process of a machine its own GPU, with the backend nccl. ``cuda:N`` is one GPU
    that all of them share, with gloo, because nccl refuses two processes on one GPU. CPUs use gloo.

    Raises:
        UserError: a device that torch does not have here, or fewer GPUs than processes.
    """
    size, rank = _from_torchrun("WORLD_SIZE", 1), _from_torchrun("RANK", 0)
    torch_device, backend = choose_device(device), "gloo"
    if torch_device.type == "cuda":
        if device in ("auto", "cuda"):
            torch_device, backend = _own_gpu(), "nccl"
        torch.cuda.set_device(torch_device)
    if size == 1:
        yield World(0, 1, torch_device)
        return
    torch.distributed.init_process_group(backend, timeout=TIMEOUT)
    try:
        with peers_named():
            yield World(rank, size, torch_device)
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def peers_named() -> Iterator[None]:
    """Say what happened where another process of the training has ended, which torch tells by what its library met.

    Raises:
        UserError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST):
            raise
        raise UserError(
            f"another process of this training has ended ({clip(error, 100)}); its own output says why. Run the same command again, "
            "everywhere, to go on from the last save; fewer processes may take over, if they share its batches per step evenly"
        ) from error


def _from_torchrun(name: str, default: int) -> int:
    """A number that torchrun sets in the environment of each process."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name}={text}: is no number; unset it, or let torchrun set it")
    return int(text)


def _own_gpu() -> torch.device:
    """This process's GPU among those of its machine, by the number torchrun gave it there."""
    index, count = _from_torchrun("LOCAL_RANK", 0), torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', 'more')} processes on a machine with {count} GPU(s); "
            f"start one for each (--nproc_per_node {count}), or let them share one by --device cuda:0"
        )
    return torch.device(f"cuda:{index}")


def all_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all processes that train together, in place."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def sum_gradients(
    world: World, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], numbers: Sequence[float] = ()
) -> tuple[list[Tensor | None], list[float]]:
    """The gradients of ``parameters`` summed over all processes, and ``numbers``.

    A missing gradient counts as zeros, and stays missing where no process has one, so that an optimizer does not touch that
    parameter. How many processes have each is summed with the numbers, so that the host waits for the others once.
    """
    if world.size == 1:
        return list(gradients), list(numbers)
    known = [*numbers, *(float(gradient is not None) for gradient in gradients)]
    totals = all_sum(torch.tensor(known, dtype=torch.float64, device=world.device)).tolist()
    totals, owned = totals[: len(numbers)], totals[len(numbers) :]
    filled = [
        (torch.zeros_like(parameter) if gradient is None else gradient) if count else None
        for gradient, parameter, count in zip(gradients, parameters, owned, strict=True)
    ]
    used = [gradient for gradient in filled if gradient is not None]
    if not used:
        return filled, totals
    flat = torch.cat([gradient.flatten() for gradient in used])
    torch.distributed.all_reduce(flat)
    for gradient, summed in zip(used, flat.split([gradient.numel() for gradient in used]), strict=True):
        gradient.copy_(summed.view_as(gradient))
    return filled, totals


def sum_over_processes(
    world: World, sums: Mapping[str, tuple[float, float | None]]
) -> dict[str, tuple[float, float | None]]:
    """Totals and counts by name, added up; every process has the same names. Sorted by name."""
    names = sorted(sums)
    if world.size == 1 or not names:
        return {name: sums[name] for name in names}
    pairs = [(sums[name][0], sums[name][1] or 0.0) for name in names]
    added = all_sum(torch.tensor(pairs, dtype=torch.float64, device=world.device)).tolist()
    return {
        name: (total, None if sums[name][1] is None else count)
        for name, (total, count) in zip(names, added, strict=True)
    }


def gather_lists(world: World, items: list[str]) -> list[str]:
    """The lists of all processes, concatenated, in every process."""
    if world.size == 1:
        return items
    lists: list[list[str]] = [[] for _ in range(world.size)]
    torch.distributed.all_gather_object(lists, items)
    return [item for one in lists for item in one]


def broadcast_object(world: World, value: object) -> object:
    """The main process's value, in every process."""
    if world.size == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_main(world: World, compute: Callable[[], T]) -> T:
    """The result of ``compute`` in the main process, returned in every process.

    Raises:
        UserError: that of the main process, in every process, so that none waits for one that has ended.
    """
    value: object = None
    if world.is_main:
        try:
            value = compute()
        except UserError as error:
            value = error
    value = broadcast_object(world, value)
    if isinstance(value, UserError):
        raise value
    return value  # type: ignore[return-value]
