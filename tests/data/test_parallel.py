"""One function over parts in several processes: the same results, errors and names as in one."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.data.corpora.importing import import_recordings
from asrkit.data.corpora.synthesize import synthesize
from asrkit.data.forks import may_fork
from asrkit.data.manifests import open_cuts
from asrkit.data.parallel import Workers, in_processes
from asrkit.data.ray_pool import RayWorkers
from asrkit.decoding.domain import Domain
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.stages.align import AlignConfig, align
from asrkit.stages.data_check import check_manifests
from asrkit.stages.evaluate import evaluate
from helpers.small_runs import TEXTS, noise, write_run
from helpers.tones import rewrite


@given(st.lists(st.integers(), max_size=40), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_results_come_in_order_whatever_the_number_of_processes(numbers: list[int], jobs: int) -> None:
    assert list(in_processes(lambda number: (number, number * number), numbers, Workers(jobs))) == [
        (number, number * number) for number in numbers
    ]


def test_the_parts_are_shared_out() -> None:
    assert os.getpid() not in (pids := set(in_processes(lambda _: os.getpid(), range(40), Workers(3)))) and pids
    assert set(in_processes(lambda _: os.getpid(), range(4), Workers(1))) == {os.getpid()}
    assert os.getpid() not in in_processes(lambda _: os.getpid(), [0], Workers(3))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_user_s_mistake_is_that_of_the_first_part_that_has_one(jobs: int) -> None:
    def work(number: int) -> int:
        if number in (7, 11):
            raise UserError(f"part {number}: is wrong", "another line")
        return number

    taken = []
    with pytest.raises(UserError) as error:
        for number in in_processes(work, range(20), Workers(jobs)):
            taken.append(number)
    assert error.value.lines == ("part 7: is wrong", "another line") and taken == list(range(7))


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    def work(number: int) -> float:
        return 1 / number

    with pytest.raises(RuntimeError, match=r"ZeroDivisionError[\s\S]*return 1 / number"):
        list(in_processes(work, [1, 0], Workers(2)))


def test_a_killed_process_is_named_and_none_is_left() -> None:
    def work(number: int) -> int:
        if number == 8:  # which is given out only when a result was taken
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    pids = []
    with pytest.raises(UserError, match=r"process \d of 2 \(pid \d+\) was killed by SIGKILL.*at part 8; run it again"):
        for pid in in_processes(work, range(9), Workers(2), lambda number: f"part {number}"):
            pids.append(pid)
    assert pids
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_tensors_take_no_open_files() -> None:
    """As many as one likes may be held: each would be a file, if torch shared it with the process that made it."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limit[1]))
    try:
        tensors = list(in_processes(lambda number: torch.full((3,), number), range(100), Workers(2)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert torch.stack(tensors).tolist() == [[number] * 3 for number in range(100)]


def test_a_process_that_ends_between_two_parts_is_named() -> None:
    def work(number: int) -> int:
        if number == 0:
            threading.Timer(0.2, os._exit, [3]).start()
        return number

    results = in_processes(work, range(40), Workers(2), lambda number: f"part {number}")
    assert next(results) == 0
    time.sleep(1.0)  # longer than the process of part 0 lives
    with pytest.raises(UserError, match=r"process 1 of 2 \(pid \d+\) ended with code 3, at part \d+; run it again"):
        list(results)


ENDLESS = """
import os, time
from asrkit.data.parallel import Workers, in_processes
pids = in_processes(lambda number: os.getpid() if number < 2 else time.sleep(600), range(4), Workers(2))
print(next(pids), next(pids), flush=True)
next(pids)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends processes with their parent")
def test_a_killed_parent_takes_its_processes_with_it() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    for pid in pids:
        status = Path(f"/proc/{pid}/stat")
        for _ in range(1000):
            if not status.exists() or ") Z " in status.read_text():  # a zombie waits for whoever adopted it
                break
            time.sleep(0.01)
        else:
            pytest.fail(f"process {pid} goes on")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recordings with their texts, imported."""
    folder, random = tmp_path_factory.mktemp("corpus"), np.random.default_rng(5)
    (folder / "wav").mkdir()
    for number in range(12):
        soundfile.write(folder / "wav" / f"{number}.wav", noise(random, 8000 + 900 * number), 8000)
        (folder / "wav" / f"{number}.txt").write_text(TEXTS[0])
    return folder


def _files(folder: Path) -> dict[str, str]:
    """The digests of all files of a folder, but for paths that manifests hold."""
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*.flac"))}


def _made(corpus: Path, tmp_path: Path, first: Workers, second: Workers) -> list[Any]:
    """What each of two makes of the same corpus."""
    run = write_run(tmp_path / "run")
    made = []
    for jobs, workers in enumerate((first, second)):
        out = tmp_path / "import"  # manifests name their files
        if out.exists():
            out.rename(tmp_path / "first")
        import_recordings(corpus / "wav", out, language="en", convert=True, workers=workers)
        manifest = out / "all.jsonl.gz"
        results = tmp_path / f"results-{jobs}"
        evaluate(run, manifest, methods=("greedy", "beam"), beam=2, max_duration=3.0, workers=workers, out=results)
        aligned = tmp_path / f"{jobs}.jsonl.gz"
        align(run, manifest, aligned, AlignConfig(max_duration=3.0, bad_cuts="skip"), workers=workers)
        broken = tmp_path / f"broken-{jobs}.jsonl.gz"
        broken.write_bytes(manifest.read_bytes())
        rewrite(broken, lambda number, cut: cut["recording"].update(sampling_rate=8000) if number in (3, 8) else None)
        findings = check_manifests([broken], [], run / "tokenizer.model", workers=workers).findings[str(broken)]
        utterances = [path.read_bytes() for path in sorted(results.glob("*/utterances.jsonl"))]
        made.append((_files(out), sha256_of(manifest), utterances, sha256_of(aligned), findings))
    assert len(made[0][0]) == 12 and len(made[0][2]) == 2 and {finding.kind for finding in made[0][4]} == {"rate"}
    return made


def test_imports_checks_evaluations_and_alignments_are_the_same(corpus: Path, tmp_path: Path) -> None:
    one, two = _made(corpus, tmp_path, Workers(1), Workers(2))
    assert one == two


@pytest.mark.slow
def test_synthetic_speech_is_the_same(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    (tmp_path / "texts").write_text("\n".join(TEXTS[::2]))
    made = []
    for jobs in (1, 2):
        out = tmp_path / "out"
        arguments = {
            "minutes": 0.5,
            "workers": Workers(jobs),
        }  # in a process each, as espeak-ng goes on from the state it is in
        speaking = multiprocessing.get_context("fork").Process(
            target=synthesize, args=([(tmp_path / "texts", "en")], out), kwargs=arguments
        )
        speaking.start()
        speaking.join()
        made.append((_files(out), [cut.to_dict() for cut in open_cuts(out / "train.jsonl.gz")]))
        out.rename(tmp_path / f"out-{jobs}")
    assert made[0] == made[1] and len(made[0][0]) > 5


@pytest.fixture
def ray_workers() -> Iterator[Workers]:
    """Two processes of a real Ray, which ends with the test: while it runs, this process cannot fork."""
    if find_spec("ray") is None:  # to import it is up to asrkit
        pytest.skip("Ray is not installed")
    with Workers(2, "local") as workers:
        yield workers


@pytest.mark.slow
def test_ray_makes_the_same_of_all_commands(corpus: Path, tmp_path: Path, ray_workers: Workers) -> None:
    one, two = _made(corpus, tmp_path, Workers(1), ray_workers)
    assert one == two


@pytest.mark.slow
def test_ray_gives_results_in_order_and_the_first_mistake(tmp_path: Path, ray_workers: Workers) -> None:
    results = list(in_processes(lambda number: (number, os.getpid(), torch.get_num_threads()), range(40), ray_workers))
    assert [number for number, *_ in results] == list(range(40)) and {threads for *_, threads in results} == {1}
    assert os.getpid() not in {pid for _, pid, _ in results} and may_fork() is False
    assert list(in_processes(str, [], ray_workers)) == []

    def work(number: int) -> int:
        if number in (7, 11):
            raise UserError(f"part {number}: is wrong")
        return number

    taken = []
    with pytest.raises(UserError, match="^part 7: is wrong$"):
        for number in in_processes(work, range(20), ray_workers):
            taken.append(number)
    assert taken == list(range(7))
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError[\s\S]*1 / number"):
        list(in_processes(lambda number: 1 / number, [1, 0], ray_workers))
    lock = threading.Lock()
    with pytest.raises(UserError, match="^--ray-address: this work cannot be sent to other processes .*; use --jobs"):
        list(in_processes(lambda _: lock, range(2), ray_workers))
    once = tmp_path / "once"

    def die(number: int) -> int:
        if number == 3 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    assert list(in_processes(die, range(6), ray_workers)) == list(range(6)), "another process computes the part"
    with pytest.raises(
        UserError, match="died 7 times in a row, .*, the last at part 0; run it again with a lower --jobs"
    ):
        list(in_processes(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(2), ray_workers, lambda _: "part 0"))
    assert list(in_processes(abs, [-1, 2], ray_workers)) == [1, 2]


class _NoErrors:
    class RayError(Exception): ...

    class RayActorError(RayError): ...


class _Ray:
    """As much of Ray as a process needs that never starts, or that dies as soon as it is sent anything."""

    exceptions = _NoErrors

    def __init__(self, starts: bool) -> None:
        self.starts = starts
        self.versions = self.use = SimpleNamespace(remote=lambda *_: "answer")

    def remote(self, *_: Any) -> _Ray:
        return self

    def options(self, **_: Any) -> _Ray:
        return self

    def put(self, function: Any) -> str:
        return "function"

    def wait(self, answers: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        return (answers, []) if self.starts else (answers[:1], answers[1:])

    def get(self, answers: list[str]) -> None:
        raise _NoErrors.RayActorError


def test_processes_of_a_cluster_that_do_not_start_are_not_waited_for() -> None:
    with pytest.raises(UserError, match="only 1 of 3 processes of the Ray cluster started within 300 s.*lower --jobs"):
        RayWorkers(_Ray(False), 3, lambda: None).check_versions()
    workers = RayWorkers(_Ray(True), 3, lambda: None)
    with pytest.raises(UserError, match="a process of the Ray cluster does not start"):
        workers.check_versions()
    with pytest.raises(UserError, match="died when it was sent its work, .* lower --jobs"):
        workers.pool(abs, [1, 2], str)


def test_a_cluster_that_is_not_there_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="127.0.0.1:1: no Ray cluster answers there"):
        list(in_processes(abs, [1], Workers(1, "127.0.0.1:1")))
    with pytest.raises(UserError, match="k2's graphs cannot be sent to other machines; use --jobs with --graph"):
        evaluate(Path("none"), Path("none"), workers=Workers(1, "auto"), domain=Domain(graph=Path("graph")))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="a Ray cluster: needs Ray, which is not installed"):
        list(in_processes(abs, [1], Workers(1, "auto")))


def test_a_session_of_onnxruntime_lives_through_a_fork(tmp_path: Path) -> None:
    """Also one with threads, which a fork does not have."""
    onnx = pytest.importorskip("onnx")
    from asrkit.export.runtime import OnnxFile

    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [256, 256]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "x"], ["y"])], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "g.onnx")
    file, values = OnnxFile(tmp_path / "g.onnx"), torch.rand(256, 256)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            (expected,) = file(values)
            signal.alarm(300)  # without threads it would wait for ever
            results = list(in_processes(lambda _: file(values)[0], range(4), Workers(2)))
            assert all(torch.allclose(result, expected) for result in results)
    finally:
        signal.alarm(0)
        torch.set_num_threads(threads)
    assert torch.allclose(pickle.loads(pickle.dumps(file))(values)[0], expected)
