"""Replicas by a real Ray: what they compute, what is sent, and what happens when something dies."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from asrkit.data import ray_session
from asrkit.data.ray_session import MARK, PREFIX, local_ray
from asrkit.errors import UserError
from asrkit.extras import EXTRAS
from asrkit.training.asynchronous import ray_driver
from asrkit.training.asynchronous.ray_driver import RayRunning
from asrkit.training.asynchronous.replica import Replica
from asrkit.training.asynchronous.server import ParameterServer
from helpers.replicas import corpus_and_parent, driver, train_with
from helpers.run_dirs import metrics, weights_equal

if find_spec("ray") is None:  # to import it is up to asrkit
    pytest.skip("Ray is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_and_parent(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def session() -> Iterator[Callable[[], None]]:
    """One Ray for several tests, because it takes seconds to start."""
    with local_ray(2, 0) as check_alive:
        yield check_alive


@pytest.fixture
def shared(session: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def started(cpus: int, gpus: int) -> Iterator[Callable[[], None]]:
        yield session

    monkeypatch.setattr(ray_driver, "local_ray", started)


def kill_after(pushes: int, pids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the first of ``pids`` when that many pushes have come."""
    real, seen = ParameterServer.receive, []

    def receive(self: ParameterServer, *push: Any) -> None:
        seen.append(push)
        if len(seen) == pushes:
            os.kill(pids[0], signal.SIGKILL)
        real(self, *push)

    monkeypatch.setattr(ParameterServer, "receive", receive)


@pytest.mark.slow
def test_two_replicas_at_a_barrier_are_data_parallel_though_one_is_killed(
    shared: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last bit: nothing was lost or counted twice."""
    serial = train_with(driver(), folder, tmp_path / "serial", "training.steps=6", "training.accumulate=2")
    pids: list[int] = []
    real = RayRunning.check_replicas

    def check(self: RayRunning) -> None:
        real(self)
        pids.extend(self._get([worker.actor.pid.remote() for worker in self.workers]))

    monkeypatch.setattr(RayRunning, "check_replicas", check)
    kill_after(5, pids, monkeypatch)
    both = driver(driver="ray", workers=2, max_staleness=0)
    assert weights_equal(serial, train_with(both, folder, tmp_path / "two", "training.steps=6", "data.num_workers=1"))
    assert "replica 0 died and is started again" in capsys.readouterr().err
    for one, other in zip(metrics(tmp_path / "serial"), metrics(tmp_path / "two"), strict=True):
        assert {**one, "timing": 0} == {**other, "timing": 0}
        assert other["timing"]["staleness"] == {"0": 2} and other["timing"]["version"] == other["step"]


@pytest.mark.slow
def test_shards_are_one_server_and_a_run_goes_on_after_one_is_killed(
    shared: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serial = train_with(driver(), folder, tmp_path / "serial", "training.steps=6", "training.save_every=2")
    pids: list[int] = []
    real = ray_driver.ShardedUpdater.__init__

    def made(self: Any, *arguments: Any, actors: list[Any], **options: Any) -> None:
        real(self, *arguments, actors=actors, **options)
        pids.append(options["get"](actors[1].pid.remote()))

    monkeypatch.setattr(ray_driver.ShardedUpdater, "__init__", made)
    one = driver(driver="ray", workers=1, shards=2)
    with monkeypatch.context() as patch:
        kill_after(4, pids, patch)
        with pytest.raises(
            UserError, match="a server shard was lost .*; run the same command again to go on from the last save"
        ):
            train_with(one, folder, tmp_path / "shards", "training.steps=6", "training.save_every=2")
    assert len(pids) == 1 and metrics(tmp_path / "shards")[-1]["step"] >= 2
    train_with(driver(), folder, tmp_path / "shards", "training.steps=6", "training.save_every=2")
    assert weights_equal(serial, tmp_path / "shards")


@pytest.mark.slow
def test_a_slow_replica_and_a_loss_that_is_no_number(shared: None, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    (tmp_path / "spoiled").write_text("train-3")
    both = driver(driver="ray", workers=2, max_staleness=3)
    train_with(both, folder, tmp_path / "run", "training.steps=12", "training.log_every=1", odd=True)
    rows = metrics(tmp_path / "run")
    dropped = [row for row in rows if "skipped_cuts" in row]  # any step may be one of them, the last too
    assert dropped and all("train-3" in row["skipped_cuts"] for row in dropped)
    timings = [row["timing"] for row in rows if "staleness" in row.get("timing", {})]
    ages = [int(age) for timing in timings for age in timing["staleness"]]
    assert ages and max(ages) <= 3  # the slow one is waited for
    assert all(len(timing["replicas"]) == 2 for timing in timings)
    assert len(timings) == 12


@pytest.mark.slow
def test_audio_and_texts_stay_where_they_are(
    shared: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is sent is looked at, and this process opens no replica's manifest."""
    import asrkit.training.datasets

    ray, sent = ray_session.import_ray(local=True), []
    real_get, real_put, real_open = ray.get, ray.put, asrkit.training.datasets.open_cuts

    def get(answers: Any, **options: Any) -> Any:
        sent.append(pickle.dumps(got := real_get(answers, **options)))
        return got

    def put(value: Any) -> Any:
        sent.append(pickle.dumps(value))
        return real_put(value)

    def open_cuts(path: Path, *options: Any) -> Any:
        assert path.name == "dev.jsonl.gz"
        return real_open(path, *options)

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "put", put)
    monkeypatch.setattr(asrkit.training.datasets, "open_cuts", open_cuts)
    names = ("train", "other")
    both = driver(2, driver="ray", max_staleness=0)
    run = train_with(both, folder, tmp_path / "own", manifests=names)
    monkeypatch.undo()
    assert len(sent) > 10 and sum(map(len, sent)) > 100_000
    for words in (b"alpha", b"bravo", b"carol", b"delta", b"train-", b"other-", b"wav"):
        assert not any(words in each for each in sent), words
    assert weights_equal(run, train_with(driver(2, driver="simulated"), folder, tmp_path / "same", manifests=names))


LENGTH = ["training.steps=12", "training.save_every=2"]
PROGRAM = """
import sys
from pathlib import Path
from asrkit.training.stopping import Interrupted
from helpers.replicas import driver, train_with
try:
    train_with(driver(driver="ray", workers=2, max_staleness=0), Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
except Interrupted as stop:
    sys.exit(stop.code)
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A place for temporary files of its own, as other tests start Rays meanwhile; its name is short enough for Ray's sockets."""
    place = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def begun(folder: Path, out: Path, line: str, temporary: Path) -> subprocess.Popen[str]:
    """The training of ``PROGRAM`` in a process group of its own that has said a line that begins with ``line``."""
    here = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(out), *LENGTH], stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{here}:{here / 'tests'}", "OMP_NUM_THREADS": "1",
             "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    for text in process.stderr:
        said.append(text)
        if text.startswith(line):
            return process
    raise AssertionError("".join(said))


def left_behind(temporary: Path) -> tuple[list[Path], list[int]]:
    """Directories of local Rays, and processes that have one of those in their environment."""
    made = list(temporary.glob(f"{PREFIX}*"))
    return made, [pid for folder in made for pid in ray_session._marked(folder)]


@pytest.mark.slow
def test_a_run_that_is_killed_and_stopped_loses_nothing(folder: Path, tmp_path: Path, temporary: Path) -> None:
    """Killed it leaves processes, which the next start ends; stopped by a signal to all processes, nothing."""
    out = tmp_path / "run"
    process = begun(folder, out, "step 5/", temporary)
    process.kill()
    process.wait()
    assert len(left_behind(temporary)[0]) == 1  # and perhaps processes, some of which notice by themselves
    process = begun(folder, out, "step 7/", temporary)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait() == 143 and "Traceback" not in said, said
    assert left_behind(temporary) == ([], [])
    train_with(driver(), folder, out, *LENGTH)  # by whom does not matter: the batches of a step are the same
    serial = train_with(driver(), folder, tmp_path / "serial", *LENGTH, "training.accumulate=2")
    assert weights_equal(serial, out)


@pytest.mark.slow
def test_where_ray_dies_the_state_is_saved(
    shared: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def check_alive() -> None:
        seen.append(1)
        ray_session._check_alive([os.getpid()])
        if len(seen) == 8:
            child = subprocess.Popen(["true"])
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has died, as raylet may
            ray_session._check_alive([child.pid])

    @contextmanager
    def started(cpus: int, gpus: int) -> Iterator[Callable[[], None]]:
        yield check_alive

    monkeypatch.setattr(ray_driver, "local_ray", started)
    one = driver(driver="ray", workers=1)
    with pytest.raises(UserError, match="Ray's processes on this machine were killed"):
        train_with(one, folder, tmp_path / "run", *LENGTH, "training.save_every=1000")
    saved = load_file(tmp_path / "run" / "state" / "latest.safetensors")
    assert saved and not (tmp_path / "run" / "done").exists()


def test_what_cannot_run_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpus = len(os.sched_getaffinity(0))
    with pytest.raises(
        UserError,
        match=f"{cpus + 1} workers need as many processors, but this machine has {cpus}; use --workers {cpus} or fewer",
    ):
        driver(workers=cpus + 1)
    with pytest.raises(UserError, match="1 workers with 99 GPUs each need 99, but this machine has"):
        driver(driver="ray", workers=1, gpus_per_worker=99)
    with (
        pytest.raises(
            UserError, match="127.0.0.1:1: no Ray cluster answers there .*; start one with `ray start --head`"
        ),
        ray_session.ray_cluster("127.0.0.1:1"),
    ):
        pass
    with pytest.raises(UserError, match="2 workers need asynchronous.driver=ray or simulated"):
        driver(driver="serial", workers=2)
    with pytest.raises(UserError, match="asynchronous.shards is for asynchronous.driver=ray, but the driver is serial"):
        driver(shards=2)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError,
        match=f"several workers: needs Ray, which is not installed; {EXTRAS['ray'].remedy}".replace("[", r"\["),
    ):
        driver(driver="ray", workers=1)


def test_replicas_that_find_no_processor_are_not_waited_for(
    shared: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = ray_session.import_ray(local=True)
    other = ray.remote(lambda: time.sleep(100)).remote()
    monkeypatch.setattr(ray_session, "START", 2.0)
    with pytest.raises(UserError, match="only [01] of 2 processes of the Ray cluster started .* use a lower --workers"):
        train_with(driver(driver="ray", workers=2), folder, tmp_path / "run", "training.steps=2")
    ray.cancel(other, force=True)


def test_replicas_of_other_versions_are_refused() -> None:
    running = RayRunning.__new__(RayRunning)
    here = Replica.versions(None)  # type: ignore[arg-type]
    running.settings, running.workers = driver(driver="ray", workers=1).settings, []  # type: ignore[attr-defined]
    running._ray = SimpleNamespace(wait=lambda *_, **__: ([], []))
    running._get = lambda answers: [here, {**here, "asrkit": "0.0.9"}]  # type: ignore[method-assign, misc]
    with pytest.raises(
        UserError,
        match=f"^replica 1 has asrkit 0.0.9, but this process has {here['asrkit']}; install the same everywhere$",
    ):
        running.check_replicas()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_ray_that_does_not_start_is_started_once_more(tmp_path: Path, failures: int) -> None:
    """A busy machine may need longer than Ray gives it."""
    calls: list[str] = []

    def init(**_: Any) -> None:
        calls.append("init")
        if calls.count("init") <= failures:
            raise Exception("the node timed out")  # as Ray does

    ray = SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown"))
    if failures == 1:
        ray_session._start(ray, 2, 0, tmp_path)
    else:
        with pytest.raises(
            UserError, match="does not start here .the node timed out.; run the same command again when"
        ):
            ray_session._start(ray, 2, 0, tmp_path)
    assert calls == ["init", "shutdown", "init"]


def test_only_dead_owners_lose_their_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "_base", lambda: tmp_path)
    hold = (
        "import sys, pathlib; from asrkit.data import ray_session as s\n"
        "s._base = lambda: pathlib.Path(sys.argv[1])\n"
        "with s._own_directory() as folder: print(folder, flush=True); input()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    child = subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: str(folder)})
    ray_session.remove_leftovers()
    assert folder.is_dir() and child.poll() is None
    owner.kill()
    owner.wait()
    ray_session.remove_leftovers()
    assert not folder.exists() and child.wait() == -signal.SIGKILL
