"""Processes that make batches ahead: how they start, how they share memory, how they end."""

from __future__ import annotations

import atexit
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from asrkit.data.forks import end_with
from asrkit.errors import UserError

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_LESS = (
    "or load data in the training process with --set data.num_workers=0; the same command goes on from the last save"
)


def start_loader(batches: Any, places: Sequence[int], num_workers: int) -> tuple[Iterator[Any], list[BaseProcess]]:
    """The batches of the given places, in order, made ahead in ``num_workers`` processes (0: in this one); and the processes.

    A signal to the whole process group, as SLURM, systemd and ``timeout`` send it, does not reach them: they are needed until
    the training has saved its state. They end with this process, however it ends.
    """
    # Without worker processes torch 2 wants no prefetch_factor, and torch 1 its default.
    options: dict[str, Any] = {"prefetch_factor": 4} if num_workers else {}
    loader = torch.utils.data.DataLoader(
        _InSharedMemory(batches) if num_workers else batches,
        batch_size=None,
        sampler=places,  # type: ignore[arg-type]
        num_workers=num_workers,
        worker_init_fn=_StartProcess(os.getpid()),
        generator=torch.Generator(),  # else it draws from the one that seeds dropout
        **options,
    )
    before = set(multiprocessing.active_children())
    # They begin with the signals blocked, so that there is no moment in which one could be obeyed.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        made = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    processes = [process for process in multiprocessing.active_children() if process not in before]
    atexit.register(_kill, processes)
    return made, processes


def _kill(processes: Sequence[BaseProcess]) -> None:
    """End those that are still there at exit: multiprocessing would send SIGTERM, which they block, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for process in processes:
        process.kill()


@dataclasses.dataclass(frozen=True)
class _StartProcess:
    """What a loader process does first; ``parent`` is the process that trains."""

    parent: int

    def __call__(self, worker: int) -> None:
        torch.set_num_threads(1)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        signal.signal(signal.SIGBUS, signal.SIG_DFL)  # torch's handler prints a line; the training says it better
        sys.excepthook = _unless_cut_off
        end_with(self.parent if multiprocessing.get_start_method() == "fork" else None)


def _unless_cut_off(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error, except of a thread that was handing a batch over when the training ended."""
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


class _InSharedMemory(torch.utils.data.Dataset[Any]):
    """The same batches, in shared memory.

    torch puts them there in a thread, whose errors it prints and forgets: the training would wait for ever.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __getitem__(self, number: int) -> Any:
        batch = self._batches[number]
        try:
            for tensor in _tensors(batch):
                tensor.share_memory_()
        except (RuntimeError, OSError) as error:
            raise UserError(_out_of_shared_memory(str(error).partition(": ")[2] or str(error))) from error
        return batch


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of a batch that has elements."""
    if isinstance(value, Tensor):
        if value.numel():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        for name in (field.name for field in dataclasses.fields(value)):
            yield from _tensors(getattr(value, name))


def death_of(processes: Sequence[BaseProcess]) -> str | None:
    """Why one of the processes died, and what to do; None if none did."""
    died, until = None, time.monotonic() + 1.0  # torch may tell before the process is gone
    while died is None and time.monotonic() < until:
        with suppress(RuntimeError):  # by which torch tells of a death wherever this process is: here too
            time.sleep(0.01)
            died = next((process for process in processes if process.exitcode), None)
    if died is None:
        return None
    code = died.exitcode or 0
    if code == -signal.SIGBUS:
        return _out_of_shared_memory("SIGBUS")
    if code == -signal.SIGKILL:
        return (
            f"a loader process (pid {died.pid}) was killed by SIGKILL, most likely because memory ran out: give the job more "
            f"memory, lower data.num_workers, {_LESS}"
        )
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"a loader process (pid {died.pid}) {how}: run `asrkit data check` on the manifest, {_LESS}"


def _out_of_shared_memory(reason: str) -> str:
    return (
        f"a loader process ran out of shared memory ({reason}): enlarge /dev/shm (docker run --shm-size 2g), lower "
        f"data.num_workers or data.max_duration, {_LESS}"
    )
