"""Stages run as a user runs them: a process, or two, and its words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

# Two processes of one machine. (torch 1.13's torchrun does not start on Python 3.11 without --redirects and --tee.)
# Two processes, as recipes/common.mk starts them.
TWO = [
    *[sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"],
    *["--nproc_per_node", "2", "--redirects", "1", "--tee", "1"],
]
QUICK = [
    "data.num_workers=0", "data.num_buckets=1", "training.log_every=2", "training.evaluate_every=4",
    "training.tensorboard=false", "training.precision=float32", "training.save_every=2", "loss.backend=torch",
]  # fmt: skip


def asrkit(*words: object, code: int = 0) -> str:
    """Run a command that ends with ``code``; returns what it said."""
    return launched([sys.executable, "-m", "asrkit"], *words, code=code)


def launched(launcher: list[str], *words: object, code: int = 0, **environment: str) -> str:
    """The same by another ``launcher``, such as ``[*TWO, "-m", "asrkit"]``."""
    command = [*launcher, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def killed(at: str, *words: object) -> None:
    """Run a command in a process of its own, and kill it when it says a line that begins with ``at``."""
    command = [sys.executable, "-m", "asrkit", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(at):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"


def sets(*settings: str) -> list[str]:
    """--set options: QUICK and the given ones."""
    return [word for setting in (*QUICK, *settings) for word in ("--set", setting)]
