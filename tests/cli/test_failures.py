"""What a command prints when something fails that no stage expected."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asrkit.cli.failures import lines_for
from asrkit.errors import UserError


def failure(action: object) -> Exception:
    with pytest.raises(Exception) as caught:
        action()  # type: ignore[operator]
    assert isinstance(caught.value, Exception)
    return caught.value


def test_failures_of_the_system_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    long = tmp_path / ("x" * 300)
    cases = {
        f"{file}/below: Not a directory; a part of this path is a file": failure((file / "below").read_text),
        f"{tmp_path}: Is a directory; give a file": failure(tmp_path.read_text),
        "File name too long; choose a shorter name": failure(long.read_text),
        "Disk quota exceeded; free some space": OSError(errno.EDQUOT, "Disk quota exceeded", "x"),
        "Input/output error; fix that": OSError(errno.EIO, "Input/output error"),
        "out of memory": failure(lambda: torch.zeros(1 << 50)),
        "give it more memory": failure(lambda: np.zeros(1 << 58)),
        "a sound file cannot be read or written": failure(lambda: soundfile.read(file)),
        "what, where, what to do": UserError("what, where, what to do"),
    }
    for expected, error in cases.items():
        (line,) = lines_for(error)
        assert expected in line and "\n" not in line and len(line) < 500, line


def test_an_unexpected_failure_leaves_its_traceback_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["asrkit", "a path that is no UTF-8: \udcff"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (line,) = lines_for(failure(lambda: dict[str, int]()["key\n" * 1000]))
    (log,) = tmp_path.glob("asrkit-*.log")
    assert line.startswith("unexpected KeyError: ") and str(log) in line and "\n" not in line
    assert "Traceback" in log.read_text() and "in failure" in log.read_text()


@pytest.mark.slow
def test_output_that_cannot_be_written_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "asrkit", "config", "train-backbone"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "No space left on device; free some space" in line
