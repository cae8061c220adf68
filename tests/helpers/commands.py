"""The command line as a user meets it: in this process, which spares seconds of imports, or in one or two of its own."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest
import torch

from asrkit.cli import main

# Two processes, as recipes/common.mk starts them. (torch 1.13's torchrun does not start on Python 3.11 without
# --redirects and --tee.)
TORCHRUN = [
    *[sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"],
    *["--nproc_per_node", "2", "--redirects", "1", "--tee", "1"],
]
TWO = [*TORCHRUN, "-m", "asrkit"]
ONE = [sys.executable, "-m", "asrkit"]

# Four steps, each of them logged, the dev cuts measured and the state saved after every other.
QUICK = [
    "data.num_workers=0", "data.num_buckets=1", "loss.backend=torch", "training.steps=4", "training.log_every=1",
    "training.evaluate_every=2", "training.save_every=2", "training.tensorboard=false", "training.precision=float32",
]  # fmt: skip


class Finished(NamedTuple):
    """What a command ended with and printed."""

    code: int
    out: str
    err: str


def finish(*words: object) -> Finished:
    """Run a command in this process, by ``main`` as the program does; torch's number of threads is put back."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["asrkit", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            torch.set_num_threads(threads)
    printed = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return Finished(code, *printed)


@contextmanager
def standard_input(sent: bytes) -> Iterator[None]:
    """This process's standard input is a pipe with a few bytes in it, which has been closed at the other end."""
    before = os.dup(0)
    receiver, sender = os.pipe()
    os.write(sender, sent)
    os.close(sender)
    os.dup2(receiver, 0)
    os.close(receiver)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def asrkit(*words: object, code: int = 0) -> str:
    """Run a command in this process that ends with ``code``; returns what it printed, standard output first."""
    finished = finish(*words)
    assert finished.code == code, finished.err
    return finished.out + finished.err


def asrkit_process(*words: object, code: int = 0) -> str:
    """The same in a process of its own, for what depends on one: signals, imports, the exit code of the program."""
    return launched(ONE, *words, code=code)


def launched(launcher: list[str], *words: object, code: int = 0, **environment: str) -> str:
    """The same by another ``launcher``, such as ``TWO``."""
    command = [*launcher, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def killed(at: str, *words: object) -> None:
    """Run a command in a process of its own, and kill it when it prints a line that begins with ``at``."""
    with subprocess.Popen([*ONE, *map(str, words)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(at):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"


def sets(*settings: str) -> list[str]:
    """The --set options of some settings."""
    return [word for setting in settings for word in ("--set", setting)]


def quick(*settings: str) -> list[str]:
    """The --set options of a short training run and of ``settings``."""
    return sets(*QUICK, *settings)
