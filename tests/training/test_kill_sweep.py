"""Commands killed at one file-system event after another: the same command then completes, with the same weights."""

from __future__ import annotations

import json
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

# Imports the module it is given; then, for each line [limit, folder, words], runs the command in a forked process that kills itself
# before its event of that number (0: never): a sync, rename, new file or new directory under the folder. Answers with the exit
# code and how many events there were. Importing takes far longer than the commands.
KILLER = """
import importlib, json, os, sys, traceback
import torch
torch.set_num_threads(1)
from asrkit.cli import app
importlib.import_module(sys.argv[1])

def run(limit, folder, words):
    events = 0

    def watch(name):
        real = getattr(os, name)
        def watched(*given, **options):
            nonlocal events
            path = os.path.realpath(f"/proc/self/fd/{given[0]}") if isinstance(given[0], int) else os.path.abspath(given[0])
            writes = name != "open" or (given[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
            if writes and os.fsdecode(path).startswith(folder):
                events += 1
                if events == limit:
                    os.kill(os.getpid(), 9)
            return real(*given, **options)
        setattr(os, name, watched)

    for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "open"):
        watch(name)
    sys.argv = ["asrkit", *words]
    app(standalone_mode=False)
    return events

for line in sys.stdin:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.write(writing, str(run(*json.loads(line))).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    events = os.read(reading, 20).decode()
    os.close(reading)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), events]), flush=True)
"""


def sweep(
    module: str,
    words: Callable[[Path], list[str]],
    folder: Path,
    same: Callable[[Path, Path], None],
    kills: int,
) -> None:
    """Kill the command at ``kills`` of its events, evenly spread and each in a directory of its own, and run it again.

    Args:
        module: that of the command's stage.
        words: the command that writes to a path.
        same: asserts that two outputs are equal.
    """
    command = [sys.executable, "-c", KILLER, module]
    with (
        open(folder / "said", "w+") as said,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None

        def events_of(limit: int, out: Path) -> int | None:
            """How many events the command has; None where it was killed before the one of number ``limit``."""
            assert process.stdin is not None and process.stdout is not None
            print(json.dumps([limit, str(folder), words(out)]), file=process.stdin, flush=True)
            code, events = json.loads(process.stdout.readline())
            if code == -signal.SIGKILL:
                return None
            assert code == 0, (folder / "said").read_text()[-3000:]
            return int(events)

        total = events_of(0, folder / "whole")
        assert total is not None and total >= kills
        for number in range(kills):
            out = folder / f"killed-{number}"
            at = 1 + number * total // kills
            assert events_of(at, out) is None, f"event {at} of {total} did not come"
            events_of(0, out)
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

    sweep("asrkit.stages.train_backbone", words, tmp_path, same_run, 8)


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

    sweep("asrkit.stages.export", words, tmp_path, same, 5)


@pytest.mark.slow
def test_an_evaluation_completes_wherever_it_is_killed(tmp_path: Path) -> None:
    run, manifest = write_run(tmp_path / "run"), make_corpus(tmp_path / "corpus", 4)

    def same(one: Path, other: Path) -> None:
        names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (one, other)]
        assert names[0] == names[1] != []
        results = [[path.read_text() for path in sorted(folder.rglob("alignments.txt"))] for folder in (one, other)]
        assert results[0] == results[1] != []

    def words(out: Path) -> list[str]:
        return ["evaluate", "--from", str(run), "--manifest", str(manifest), "--out", str(out)]

    sweep("asrkit.stages.evaluate", words, tmp_path, same, 4)


@pytest.mark.slow
def test_an_import_completes_wherever_it_is_killed(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", 4)
    sounds = sorted((tmp_path / "corpus" / "train").glob("*.wav"))
    table = tmp_path / "table.tsv"
    table.write_text("path\ttext\n" + "".join(f"{sound}\tword{'s' * number}\n" for number, sound in enumerate(sounds)))

    def same(one: Path, other: Path) -> None:
        names = [sorted(path.name for path in folder.rglob("*.jsonl.gz")) for folder in (one, other)]
        assert names[0] == names[1] != []

    def words(out: Path) -> list[str]:
        return ["data", "import", str(table), "--out", str(out)]

    sweep("asrkit.data.corpora.importing", words, tmp_path, same, 4)
