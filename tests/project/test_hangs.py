"""A test that hangs fails, and the processes it waits for say where they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1]
WAITS = """
import subprocess, sys, time

CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; the_wait = time.sleep; the_wait(1000)'])"

def test_that_waits():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_that_hangs():
    time.sleep(1000)

def test_that_passes():
    pass
"""


@pytest.mark.slow
def test_a_test_that_hangs_fails_and_says_where(tmp_path: Path) -> None:
    (tmp_path / "test_waits.py").write_text(WAITS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfaulthandler_timeout = 15\nfaulthandler_exit_on_timeout = true\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "helpers.hangs", "-n", "1", "-q", str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HELPERS)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "2 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("E         Current thread 0x") == 2  # of both processes that the first one waits for
    assert (
        "crashed while running 'test_waits.py::test_that_hangs'" in done.stdout and "in test_that_hangs" in done.stderr
    )
