"""Runs that are asked to stop, or lose a process: what is saved, printed and left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asrkit.errors import UserError
from asrkit.training.config import TrainingConfig
from asrkit.training.distributed import World
from asrkit.training.loop import train
from asrkit.training.step import LossOutput, TrainTask
from asrkit.training.stopping import Interrupted, Stopped, watched_signals
from helpers.clock import set_clock
from helpers.commands import ONE, QUICK, TWO, asrkit_process, launched, sets
from helpers.run_dirs import metrics, weights_equal
from helpers.tones import make_corpus

SHAPE = [
    "model.size=tiny", "model.num_layers=1", "model.dim=16", "model.feedforward_dim=16", "model.kernel_size=3",
    "model.predictor_dim=8", "model.joiner_dim=8", "tokenizer.vocab_size=18",
]  # fmt: skip
RARELY = ["training.steps=40", "training.save_every=1000", "training.log_every=1", "data.num_workers=2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, 8, 0, "train")
    return folder


def words(corpus: Path, out: Path, *settings: str) -> list[str]:
    options = ["train-backbone", "--manifest", corpus / "train.jsonl.gz", "--max-duration", 10, "--out", out]
    return [*map(str, options), *sets(*QUICK, *SHAPE, *settings)]


def begun(launcher: list[str], command: list[str], line: str) -> subprocess.Popen[str]:
    """A command in a process group of its own that has said a line that begins with ``line``."""
    process = subprocess.Popen(
        [*launcher, *command],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    assert any(text.startswith(line) for text in process.stderr), "it ended before"
    return process


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def whole(corpus: Path) -> Path:
    asrkit_process(*words(corpus, corpus / "whole", *RARELY))
    return corpus / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_process_group_saves_the_state(
    number: signal.Signals, code: int, whole: Path, corpus: Path, tmp_path: Path
) -> None:
    command = words(corpus, tmp_path / "run", *RARELY)
    with begun(ONE, command, "step 3/") as process:
        os.killpg(process.pid, number)
        os.killpg(process.pid, number)  # as GNU timeout does: to its child, and to the group that the child is in
        said = process.stderr.read() if process.stderr else ""
    assert process.returncode == code, said
    assert "the state is saved" in said and "Traceback" not in said
    assert "resuming after step" in asrkit_process(*command)
    assert weights_equal(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_signal_to_the_group_of_torchrun_saves_the_state(corpus: Path, tmp_path: Path) -> None:
    """And what all processes have measured since the last line."""
    seldom = [*RARELY, "training.log_every=4"]
    command = words(corpus, tmp_path / "run", *seldom)
    with begun(TWO, command, "step 4/") as process:
        os.killpg(process.pid, signal.SIGTERM)
        said = process.stderr.read() if process.stderr else ""
    assert "the state is saved" in said, said
    launched(TWO, *words(corpus, tmp_path / "whole", *seldom))
    assert "resuming after step" in launched(TWO, *command)
    assert weights_equal(tmp_path / "whole", tmp_path / "run")
    whole, stopped = ([row for row in metrics(tmp_path / name) if "loss" in row] for name in ("whole", "run"))
    for name in ("step", "loss", "ctc", "audio_seconds"):
        assert [row[name] for row in stopped] == pytest.approx([row[name] for row in whole])


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_no_lock(whole: Path, corpus: Path, tmp_path: Path) -> None:
    command = words(corpus, tmp_path / "run", *RARELY, "training.save_every=2")
    with begun(ONE, command, "step 5/") as process:
        loaders = children(process.pid)
        assert len(loaders) == 2
        process.kill()
        process.wait()
        said = asrkit_process(*command)  # at once
    assert "resuming after step" in said
    assert not [pid for pid in loaders if Path(f"/proc/{pid}").exists()]
    assert weights_equal(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_loader_process_that_is_killed_is_named(whole: Path, corpus: Path, tmp_path: Path) -> None:
    command = words(corpus, tmp_path / "run", *RARELY, "training.save_every=2")
    with begun(ONE, command, "step 5/") as process:
        os.kill(children(process.pid)[0], signal.SIGKILL)
        said = process.stderr.read() if process.stderr else ""
    assert process.returncode == 1, said
    errors = [line for line in said.splitlines() if not line.startswith("step ")]
    assert len(errors) == 1 and "was killed by SIGKILL" in errors[0] and "data.num_workers=0" in errors[0]
    assert "resuming after step" in asrkit_process(*command, "--set", "data.num_workers=0")  # as the line advises
    assert weights_equal(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_small_shared_memory_is_named(corpus: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "asrkit",
        *words(corpus, tmp_path / "run", "training.steps=4", "data.num_workers=1"),
    ]
    mounted = [
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"',
        "sh",
    ]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("no mounts are allowed here")
    done = subprocess.run([*mounted, *command], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1 and "--shm-size" in errors[0] and "data.num_workers=0" in errors[0]


class _Batch(SimpleNamespace):
    def to(self, device: torch.device) -> _Batch:
        return self


class _Batches:
    slices = 1
    plan = SimpleNamespace(steps_per_epoch=10)

    def __getitem__(self, number: int) -> _Batch:
        return _Batch(cut_ids=["cut"], durations=[1.0], input=torch.full((1, 2), float(number)), left_out={})


def small_task(measure: Callable[[Any], dict[str, float]] | None = None) -> TrainTask:
    torch.manual_seed(0)

    def loss(model: Any, batch: Any, step: int) -> LossOutput:
        return LossOutput(model(batch.input).square().sum(dim=1), 1.0)

    return TrainTask(torch.nn.Linear(2, 1), loss, _Batches(), measure=measure)  # type: ignore[arg-type]


def trained(task: TrainTask, run: Path, published: list[int]) -> torch.Tensor:
    run.mkdir(exist_ok=True)
    settings = TrainingConfig(steps=6, evaluate_every=3, save_every=100, tensorboard=False)
    world = World(0, 1, torch.device("cpu"))
    train(task, run, settings, 0, 1, world, lambda model, step, metrics: published.append(step))
    return task.model.weight.detach().clone()  # type: ignore[operator, union-attr]


def test_a_signal_cuts_a_measurement_short_and_it_is_made_at_the_next_start(tmp_path: Path) -> None:
    measured: list[int] = []

    def measure(model: Any) -> dict[str, float]:
        measured.append(len(measured))
        if len(measured) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                time.sleep(0.01)  # the handler runs as soon as it can, and raises
            raise AssertionError("the measurement went on")
        return {"wer": 1.0 / len(measured)}

    published: list[int] = []
    with pytest.raises(Interrupted) as stop:
        trained(small_task(measure), tmp_path / "run", published)
    assert stop.value.code == 143 and published == [3]  # nothing was published before, so the unmeasured average is
    weights = trained(small_task(measure), tmp_path / "run", published)
    assert measured == [0, 1, 2] and published == [3, 3, 6]  # again after step 3, then after the last
    expected = trained(small_task(lambda model: {"wer": 0.5}), tmp_path / "whole", [])
    assert torch.equal(weights, expected)


def test_only_a_person_who_asks_again_is_obeyed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    set_clock(monkeypatch, "asrkit.training.stopping", monotonic=lambda: now)
    with watched_signals() as stopping:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stopping.code == 143
        now = 102.0
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped), stopping.at_once():
            raise AssertionError("work was begun after a signal")


def test_errors_that_are_no_deaths_pass(tmp_path: Path) -> None:
    from asrkit.training.step import BatchStream

    stream = BatchStream(_Batches(), [0], 0, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="shapes"), stream.deaths_named():
        raise RuntimeError("shapes")
    with pytest.raises(UserError, match="x"), stream.deaths_named():
        raise UserError("x")


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    def spoil(model: Any, step: int) -> None:
        if step == 2:
            model.weight.data[0, 1] = torch.inf

    published: list[int] = []
    with pytest.raises(UserError, match=r"after step 6: weights are not finite: weight \(model\), weight \(average\);"):
        trained(replace(small_task(), after_step=spoil), tmp_path / "run", published)
    assert published == [] and not (tmp_path / "run" / "state").exists()
