"""Commands killed at one file-system event after another: the same command then completes, with the same weights."""

from __future__ import annotations

import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.commands import quick
from helpers.run_dirs import weights_equal
from helpers.small_runs import write_run
from helpers.tones import make_corpus

# Runs the command given after N in a process that kills itself before its N-th sync, rename, new file or new directory under
# FOLDER; prints how many events there were if it lives.
KILLER = """
import os, sys
limit, folder, events = int(sys.argv[1]), sys.argv[2], 0

def event():
    global events
    events += 1
    if events == limit:
        os.kill(os.getpid(), 9)

def watch(name):
    real = getattr(os, name)
    def watched(*given, **options):
        path = os.path.realpath(f"/proc/self/fd/{given[0]}") if isinstance(given[0], int) else os.path.abspath(given[0])
        writes = name != "open" or (given[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
        if writes and os.fsdecode(path).startswith(folder):
            event()
        return real(*given, **options)
    setattr(os, name, watched)

for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "open"):
    watch(name)
import torch
torch.set_num_threads(1)
from asrkit.cli import app
sys.argv = ["asrkit", *sys.argv[3:]]
try:
    app(standalone_mode=False)
finally:
    print("events", events, flush=True)
"""


def events_of(limit: int, folder: Path, words: list[str]) -> int | None:
    """How many events the command has; None where it was killed before the one of number ``limit`` (0: never)."""
    command = [sys.executable, "-c", KILLER, str(limit), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("events ")[-1])


def sweep(words: Callable[[Path], list[str]], folder: Path, same: Callable[[Path, Path], None], kills: int) -> None:
    """Kill the command at ``kills`` of its events, evenly spread and each in a directory of its own, and run it again.

    Args:
        words: the command that writes to a path.
        same: asserts that two outputs are equal.
    """
    total = events_of(0, folder, words(folder / "whole"))
    assert total is not None and total >= kills
    for number in range(kills):
        out = folder / f"killed-{number}"
        at = 1 + number * total // kills
        assert events_of(at, folder, words(out)) is None, f"event {at} of {total} did not come"
        events_of(0, folder, words(out))
        same(folder / "whole", out)
        assert not list(out.rglob(".tmp-*")), at


def same_run(one: Path, other: Path) -> None:
    assert weights_equal(one, other)
    for name in ("tokens.txt", "tokenizer.model", "model.yaml"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert (other / "done").exists()


@pytest.mark.slow
def test_a_training_completes_wherever_it_is_killed(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", 6)
    settings = quick(
        "model.size=tiny", "model.num_layers=1", "model.dim=8", "model.feedforward_dim=8", "model.kernel_size=3",
        "model.predictor_dim=8", "model.joiner_dim=8", "tokenizer.vocab_size=18", "training.steps=4",
    )  # fmt: skip

    def words(out: Path) -> list[str]:
        manifest = tmp_path / "corpus" / "train.jsonl.gz"
        options = ["--manifest", manifest, "--dev", manifest, "--max-duration", 10, "--out", out]
        return ["train-backbone", *map(str, options), *settings]

    sweep(words, tmp_path, same_run, 8)


@pytest.mark.slow
def test_an_export_completes_wherever_it_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    run = write_run(tmp_path / "run")

    def same(one: Path, other: Path) -> None:
        files = [sorted(path.relative_to(folder) for path in folder.rglob("*.onnx")) for folder in (one, other)]
        assert files[0] == files[1] != []
        assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files[0])
        with tarfile.open(other.with_suffix(".tar")) as archive:
            assert {Path(name).name for name in archive.getnames()} >= {path.name for path in files[0]}

    def words(out: Path) -> list[str]:
        return ["export", "--from", str(run), "--out", str(out), "--pack", str(out.with_suffix(".tar"))]

    sweep(words, tmp_path, same, 5)


@pytest.mark.slow
def test_an_evaluation_completes_wherever_it_is_killed(tmp_path: Path) -> None:
    run, manifest = write_run(tmp_path / "run"), make_corpus(tmp_path / "corpus", 4)

    def same(one: Path, other: Path) -> None:
        names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (one, other)]
        assert names[0] == names[1] != []
        results = [[path.read_text() for path in sorted(folder.rglob("alignments.txt"))] for folder in (one, other)]
        assert results[0] == results[1] != []

    sweep(
        lambda out: ["evaluate", "--from", str(run), "--manifest", str(manifest), "--out", str(out)], tmp_path, same, 4
    )


@pytest.mark.slow
def test_an_import_completes_wherever_it_is_killed(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", 4)
    sounds = sorted((tmp_path / "corpus" / "train").glob("*.wav"))
    table = tmp_path / "table.tsv"
    table.write_text("path\ttext\n" + "".join(f"{sound}\tword{'s' * number}\n" for number, sound in enumerate(sounds)))

    def same(one: Path, other: Path) -> None:
        names = [sorted(path.name for path in folder.rglob("*.jsonl.gz")) for folder in (one, other)]
        assert names[0] == names[1] != []

    sweep(lambda out: ["data", "import", str(table), "--out", str(out)], tmp_path, same, 4)
