"""A Ray of this run's own, which leaves nothing behind; or a running cluster.

A local Ray listens on the loopback device alone, asks for a token, reports nothing to anyone, and keeps its files in one directory. The
directory is locked while its owner lives; whoever starts a Ray next ends the processes of dead owners and removes their directories.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from asrkit import __version__
from asrkit.data.loader import STOP_SIGNALS
from asrkit.errors import UserError
from asrkit.extras import require

MARK = "ASRKIT_RAY"  # in the environment of every process of a local Ray: its directory
PREFIX = "asrkit-ray-"
STARTS = 2  # times that a Ray may try to start
START = 300.0  # seconds that its processes may take to start
SMALLEST_STORE, LARGEST_STORE = 80 << 20, 2 << 30  # bytes that processes share; Ray's own limit is 75 MiB


def import_ray(local: bool) -> Any:
    """Ray, which reads how it should behave from the environment when it is imported.

    Args:
        local: it will run on this machine alone.

    Raises:
        UserError: it is not installed, or something has imported it before.
    """
    if local and sys.modules.get("ray") is not None and os.environ.get("RAY_AUTH_MODE") != "token":
        raise UserError(
            "Ray was imported before it could be kept to this machine; import it only in the functions that need it"
        )
    variables = {"RAY_USAGE_STATS_ENABLED": "0"}
    if local:
        variables |= {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's word for: loopback only
            "RAY_AUTH_MODE": "token",  # else every user of the machine could run code as this one
            "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
            "RAY_memory_monitor_refresh_ms": "0",  # else it ends replicas when others fill the memory
        }
    os.environ.update(variables)
    ray = require("ray", for_="several workers" if local else "a Ray cluster")
    # A thread of Ray's prints what it hears of dead processes, beside the line that this run prints.
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *lines, **options: None
    return ray


@contextmanager
def local_ray(cpus: int, gpus: int) -> Iterator[Callable[[], None]]:
    """A Ray on this machine; yields a function that raises if Ray has died.

    Args:
        cpus, gpus: how many Ray may hand out.

    Raises:
        UserError: Ray is not installed, or does not start.
    """
    remove_leftovers()
    with _own_directory() as folder:
        variables = {
            MARK: str(folder),
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # they import what this one can
        }
        with _environment(variables):
            ray = import_ray(local=True)
            try:
                # A signal to the whole process group must not end the replicas before the state is saved. They inherit this.
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
                try:
                    _start(ray, cpus, gpus, folder)
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                servers = [pid for pid in _marked(folder) if _name(pid) in ("raylet", "gcs_server")]
                yield lambda: _check_alive(servers)
            finally:
                # Its processes do not obey SIGTERM, for which Ray waits a second each; it says goodbye to them first.
                killing = threading.Timer(0.5, _end_marked, [folder])
                killing.start()
                _shut_down(ray)
                killing.join()
                _end_marked(folder)


def _start(ray: Any, cpus: int, gpus: int, folder: Path) -> None:
    """Start a Ray in ``folder``. Its server gives up if its helpers take longer than 15 s (fixed in Ray 2.60), as they may on a busy
    machine when they are read from the disk for the first time; so it is started once more.

    Raises:
        UserError: it does not start, ``STARTS`` times in a row.
    """
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(
                address="local", num_cpus=cpus, num_gpus=gpus, object_store_memory=_store_bytes(),
                _temp_dir=str(folder), **_QUIET,
            )  # fmt: skip
            return
        except Exception as error:  # of no kind of its own where the machine is too busy
            if attempt == STARTS:
                raise UserError(
                    f"Ray does not start here ({' '.join(str(error).split())[:300]}); run the same command again when the machine has "
                    "less to do"
                ) from error
            _shut_down(ray)
            _end_marked(folder)


@contextmanager
def ray_cluster(address: str) -> Iterator[Callable[[], None]]:
    """A running cluster; yields a function that does nothing, as the cluster is not this run's to watch.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """
    ray = import_ray(local=False)
    advice = "start one with `ray start --head`, or leave the address out to compute on this machine alone"
    if "://" in address:
        raise UserError(
            f"{address}: is an address of Ray's client mode, which asrkit does not use; give HOST:PORT of a cluster that this machine is part of, or auto"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise UserError(f"{address}: no Ray cluster answers there ({error.strerror or error}); {advice}") from None
    try:
        try:
            ray.init(address=address, **_QUIET)
        except (RuntimeError, OSError, ValueError, ConnectionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{address}: no Ray cluster answers there ({reason}); {advice}") from error
        yield lambda: None
    finally:
        _shut_down(ray)


_QUIET: dict[str, Any] = {
    "include_dashboard": False,
    "log_to_driver": False,
    "configure_logging": False,
    "logging_level": "CRITICAL",
}


def remove_leftovers() -> None:
    """End the processes and remove the directories of local Rays whose owners are dead."""
    for folder in _base().glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.getuid():
                continue
            with open(folder / "lock", "r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if its owner lives
                _end_marked(folder)
                shutil.rmtree(folder)


@contextmanager
def _own_directory() -> Iterator[Path]:
    """A new directory with a lock that this process holds; it is removed at the end."""
    new = Path(tempfile.mkdtemp(prefix="asrkit-new-", dir=_base()))
    with open(new / "lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        folder = new.rename(
            new.with_name(new.name.replace("asrkit-new-", PREFIX))
        )  # nobody has seen it without the lock
        try:
            yield folder
        finally:
            for _ in range(20):  # a process that has just been ended may still write
                shutil.rmtree(folder, ignore_errors=True)
                if not folder.exists():
                    break
                time.sleep(0.1)


def _base() -> Path:
    """Where the directory is made: the names of Ray's sockets in it must fit into 107 bytes."""
    base = tempfile.gettempdir()
    return Path(base if len(base.encode()) <= 16 else "/tmp")


def _store_bytes() -> int:
    """The most memory that processes may share: half of what is free in /dev/shm. It is taken as it is used."""
    try:
        found = os.statvfs("/dev/shm")
        free = found.f_bavail * found.f_frsize
    except OSError:
        free = 0
    return max(SMALLEST_STORE, min(LARGEST_STORE, free // 2))


def _shut_down(ray: Any) -> None:
    with suppress(Exception):  # whatever of it is dead already
        ray.shutdown()


def wait_for_start(ray: Any, answers: Sequence[Any], option: str) -> None:
    """Wait until new processes have answered; Ray itself would wait for ever for those that nothing is left for.

    Args:
        answers: one of each process. option: which says how many they are.

    Raises:
        UserError: they do not.
    """
    started, waiting = ray.wait(answers, num_returns=len(answers), timeout=START)
    if waiting:
        raise UserError(
            f"only {len(started)} of {len(answers)} processes of the Ray cluster started within {START:.0f} s, most likely because "
            f"other work has its processors; use a lower {option}, or run it again when that work is done"
        )


def versions() -> dict[str, str]:
    """What has to be the same in all processes that compute together."""
    import torch

    return {"asrkit": __version__, "torch": torch.__version__.partition("+")[0]}


def other_versions(who: str, there: Mapping[str, str]) -> list[str]:
    """A line for each package of which a process of ``who`` has another version than this one."""
    return [
        f"{who} has {package} {there[package]}, but this process has {version}; install the same everywhere"
        for package, version in versions().items()
        if there[package] != version
    ]


def _check_alive(servers: list[int]) -> None:
    for pid in servers:
        if _state(pid) in ("", "Z"):
            raise UserError(
                "Ray's processes on this machine were killed, perhaps because memory ran out; run the same command again"
            )


def _marked(folder: Path) -> list[int]:
    """The processes of the local Ray in ``folder``, but this one."""
    mark = f"{MARK}={folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if int(path.parent.name) != os.getpid() and mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _end_marked(folder: Path) -> None:
    for _ in range(50):
        pids = [pid for pid in _marked(folder) if _state(pid) not in ("", "Z")]
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _state(pid: int) -> str:
    """The state letter of a process, Z for one that is dead; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
