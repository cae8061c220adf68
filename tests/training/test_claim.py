"""Who may write to a run directory: settings, inputs by their content, locks, and what a refusal leaves behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from asrkit import disk
from asrkit.decoding.recognizer import load_recognizer
from asrkit.disk import atomic_directory, atomic_write, sha256_of
from asrkit.errors import UserError
from asrkit.models import load_model
from asrkit.run_dir import CONFIG, LINEAGE, MODEL, STATE, TOKENS, WEIGHTS, open_run, read_yaml, write_yaml
from asrkit.training.checkpoint import STATE_FILE
from asrkit.training.claim import DONE, LOCK, Claim, changes, claim, known_inputs, locked
from asrkit.training.distributed import World, join_world
from asrkit.training.run_writer import RunWriter
from helpers.commands import asrkit
from helpers.small_runs import write_run
from helpers.tones import make_corpus

ONE = World(0, 1, torch.device("cpu"))


def content(files: dict[str, Path], **settings: Any) -> dict[str, Any]:
    return {"stage": "train-backbone", **settings, "inputs": known_inputs(files)}


def claimed(path: Path, config: dict[str, Any]) -> Claim:
    with ExitStack() as lock:
        return claim(path, config, lock)


def saved(path: Path) -> None:
    """Let a run have something that must not be lost."""
    (path / "state").mkdir()
    (path / "state" / "latest.safetensors").touch()


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "m.jsonl"
    path.write_text("one\ntwo\n")
    return path


def test_the_same_bytes_elsewhere_go_on(manifest: Path, tmp_path: Path) -> None:
    """The manifest, one of data.also, the parent and a teacher have all been moved."""
    parent, also = write_run(tmp_path / "parent"), tmp_path / "also.jsonl"
    also.write_text("three\n")

    def config(manifest: Path, parent: Path, also: Path) -> dict[str, Any]:
        files = {"manifest": manifest, "set data.also.0": also, "from": parent / WEIGHTS, "teacher": parent / WEIGHTS}
        digest = sha256_of(parent / WEIGHTS)
        settings = {"from": str(parent), "from_weights_sha256": digest, "teachers": {"*": {str(parent): digest}}}
        return content(files, **settings, data={"also": [str(also)], "num_workers": 1})

    before = config(manifest, parent, also)
    assert claimed(tmp_path / "run", before).new
    saved(tmp_path / "run")
    (tmp_path / "moved").mkdir()
    moved = [shutil.move(path, tmp_path / "moved" / path.name) for path in (manifest, parent, also)]
    after = config(*map(Path, moved))
    assert before["inputs"]["manifest"] == {"path": str(manifest), "sha256": sha256_of(Path(moved[0]))}
    again = claimed(tmp_path / "run", after)
    assert not again.new and not again.fresh and again.config == before == read_yaml(tmp_path / "run" / CONFIG)
    after["data"]["num_workers"] = 0  # as the advice for a loader process that died
    assert not claimed(tmp_path / "run", after).new


def test_other_bytes_at_the_same_path_are_refused(manifest: Path, tmp_path: Path) -> None:
    before = content({"manifest": manifest, "dev": manifest}, data={"noise": str(manifest)})
    claimed(tmp_path / "run", before)
    saved(tmp_path / "run")
    manifest.write_text("one\n")
    with pytest.raises(UserError) as caught:
        claimed(tmp_path / "run", content({"manifest": manifest, "dev": manifest}, data={"noise": str(manifest)}))
    first, second, _ = caught.value.lines
    digests = before["inputs"]["manifest"]["sha256"][:12], sha256_of(manifest)[:12]
    assert f"started with different bytes: --manifest {manifest}: sha256 {digests[0]} -> {digests[1]}" in first
    assert "--dev" in second


def test_a_parent_of_another_spec_is_another_input(tmp_path: Path) -> None:
    """The same weights with another default variant."""
    parent = write_run(tmp_path / "parent")
    before = content({"from": parent / WEIGHTS})
    assert set(before["inputs"]) == {"from", "from model.yaml", "from tokenizer.model"}
    with open(parent / MODEL, "a") as file:
        file.write("# changed\n")
    (line,) = changes(before, content({"from": parent / WEIGHTS}))
    assert "--from model.yaml" in line


def test_a_shar_directory_is_known_by_its_cuts_and_the_sizes_of_its_sound(tmp_path: Path) -> None:
    shar = tmp_path / "shar"
    shar.mkdir()
    for name, text in (("cuts.000000.jsonl", "cut"), ("recording.000000.tar", "sound")):
        (shar / name).write_text(text)
    digests = [known_inputs({"manifest": shar})["manifest"]["sha256"]]
    for name, text in (("cuts.000000.jsonl", "tuc"), ("recording.000000.tar", "more sound")):
        (shar / name).write_text(text)
        digests.append(known_inputs({"manifest": shar})["manifest"]["sha256"])
    assert len(set(digests)) == 3


def test_every_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        known_inputs({"manifest": tmp_path / "m", "dev": None, "tokenizer": tmp_path / "t"})
    assert caught.value.lines == (
        f"{tmp_path}/m: no such file (--manifest)",
        f"{tmp_path}/t: no such file (--tokenizer)",
    )


def test_a_run_that_saved_nothing_begins_anew_with_other_settings(manifest: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    claimed(run, content({"manifest": manifest}, seed=1))
    (run / "tokenizer.model").touch()
    assert claimed(run, content({"manifest": manifest}, seed=2)).new
    assert read_yaml(run / CONFIG)["seed"] == 2 and not (run / "tokenizer.model").exists()
    saved(run)
    with pytest.raises(UserError, match="started with different settings: seed: 2 -> 3"):
        claimed(run, content({"manifest": manifest}, seed=3))


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_a_refusal_leaves_everything_as_it_was(manifest: Path, tmp_path: Path) -> None:
    foreign, run, other = tmp_path / "foreign", tmp_path / "run", tmp_path / "other"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    claimed(run, content({"manifest": manifest}))
    saved(run)
    write_yaml(other / CONFIG, {"stage": "align"})
    before = listing(tmp_path)
    config = content({"manifest": manifest}, seed=2)
    for path in (foreign, run, other, manifest, manifest / "below"):
        with pytest.raises(UserError):
            claimed(path, config)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("path", ["fresh", "a/b/fresh", "empty"])
def test_a_run_refused_before_it_trains_leaves_nothing(path: str, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    with pytest.raises(UserError, match="bad cuts"):  # noqa: SIM117
        with RunWriter.open(tmp_path / path, "train-backbone", {}, {"manifest": manifest}, "", ONE):
            (tmp_path / path / "tokenizer.model").touch()
            raise UserError("bad cuts")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, TOKENS, MODEL])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_finished_run_that_is_damaged_is_not_finished(name: str, damage: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_yaml(run / CONFIG, content({}))
    digests = {"config_file_sha256": sha256_of(run / CONFIG), "tokens_sha256": sha256_of(run / TOKENS)}
    write_yaml(run / LINEAGE, [read_yaml(run / LINEAGE)[0] | digests])
    (run / DONE).touch()
    assert claimed(run, content({})).finished
    damaged = bytearray((run / name).read_bytes())
    damaged[-2] ^= 1
    (run / name).write_bytes(damaged) if damage == "flipped" else (run / name).unlink()
    with pytest.raises(UserError):
        open_run(run)
    with pytest.raises(UserError):
        claimed(run, content({}))


def test_a_run_that_was_stopped_says_so_where_it_is_used(tmp_path: Path) -> None:
    """So does the refusal of other settings say how to go on: from a finished run, with --from; never into the run itself."""
    run, parts = write_run(tmp_path / "run"), {"training": {"steps": 4000}}
    write_yaml(run / CONFIG, content({}, **parts))
    entry = read_yaml(run / LINEAGE)[0] | {"step": 17, "config_file_sha256": sha256_of(run / CONFIG)}
    write_yaml(run / LINEAGE, [entry])
    said = "its training was stopped at step 17 of 4000; run the same command again to finish it"
    assert open_run(run).unfinished == [f"{run}: {said}"] == load_recognizer(run).warnings
    other = content({}, training={"steps": 8000})
    with pytest.raises(UserError, match="use the same settings and inputs to resume"):
        claimed(run, other)
    (run / DONE).touch()
    assert open_run(run).unfinished == []
    with pytest.raises(UserError, match=r"to train it further, give --from \S+ and another --out"):
        claimed(run, other)
    with pytest.raises(UserError, match="is the run that training starts from") as refused:
        claimed(run, content({}, training={"steps": 9}) | {"from": str(tmp_path / "." / "run")})
    assert len(refused.value.lines) == 1


def test_a_run_is_read_whole_while_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training may replace the weights between any two reads; a result is recorded under the digest of those that were used."""
    run, later = write_run(tmp_path / "run"), write_run(tmp_path / "later", seed=1)
    earlier = sha256_of(run / WEIGHTS)
    replacing = [True]

    def replaced(what: Any) -> Any:
        def first_publish(path: Any) -> Any:
            if replacing:
                replacing.clear()
                for name in (LINEAGE, WEIGHTS):
                    shutil.copy(later / name, run / name)
            return what(path)

        return first_publish

    monkeypatch.setattr("asrkit.run_dir.sha256_of", replaced(sha256_of))
    assert open_run(run).lineage[-1]["weights_sha256"] == sha256_of(later / WEIGHTS) != earlier

    monkeypatch.undo()
    shutil.rmtree(run)
    write_run(run)
    replacing.append(True)
    monkeypatch.setattr("asrkit.decoding.recognizer.load_model", replaced(load_model))
    recognizer = load_recognizer(run)
    assert recognizer.weights_sha256 == sha256_of(later / WEIGHTS)
    expected = load_model(open_run(later)).joiner.out.weight
    assert torch.equal(recognizer.model.model.joiner.out.weight, expected)  # type: ignore[attr-defined]


@pytest.fixture
def held(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``tmp_path``, and a process forked from it that outlives it."""
    code = (
        "import os, sys, time; from pathlib import Path; from asrkit.training.claim import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child: print(child, flush=True)\n"
        "    time.sleep(100)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        yield process
        os.kill(child, 9)
        process.kill()


@pytest.mark.slow
def test_a_lock_says_who_holds_it_and_dies_with_its_process(held: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"another run is training there \(process {held.pid} on .* since 20"):  # noqa: SIM117
        with locked(tmp_path):
            pass
    held.kill()
    held.wait()
    with locked(tmp_path) as notes:  # at once, although the forked process still runs
        assert notes == []
    assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_who_is_refused_leaves_the_lock_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has made the directory that the other one has locked since."""
    run = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from asrkit.training.claim import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(100)"
    )
    others: list[subprocess.Popen[str]] = []

    def overtaken(path: Path) -> Any:
        others.append(subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True))
        assert others[0].stdout is not None and others[0].stdout.readline() == "held\n"
        return locked(path)

    monkeypatch.setattr("asrkit.training.claim.locked", overtaken)
    try:
        with pytest.raises(UserError, match="another run is training there"):
            claimed(run, content({}))
        assert (run / LOCK).is_file()
    finally:
        others[0].kill()
        others[0].wait()


def test_a_lock_that_is_removed_before_it_is_held_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was refused removes its lock; who had opened it takes the next, as a third process would."""
    calls, lockf = [], fcntl.lockf

    def lock(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        lockf(descriptor, how)

    monkeypatch.setattr("asrkit.training.claim.fcntl.lockf", lock)
    with locked(tmp_path) as notes:
        assert notes == [] and len(calls) == 2
        assert (tmp_path / LOCK).read_text().startswith("process ")


def test_a_lock_file_that_is_never_the_one_at_its_path_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on network file systems that number a file anew each time: no endless loop."""
    monkeypatch.setattr("asrkit.training.claim.os.path.samestat", lambda one, other: False)
    with locked(tmp_path) as notes:
        assert "no locks" in notes[0]


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("asrkit.training.claim.fcntl.lockf", refuse)
    with locked(tmp_path) as notes:
        assert "no locks" in notes[0]


def test_what_killed_processes_left_is_removed(manifest: Path, tmp_path: Path) -> None:
    """That of this machine wherever it is met, that of others under the lock of a run directory alone."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    own, others = f".tmp-{dead.pid}-{disk._this_host()}-b.txt", f".tmp-{dead.pid}-00000000-b.txt"
    alive = f".tmp-{os.getppid()}-{disk._this_host()}-c.txt"
    folder, run = tmp_path / "folder", tmp_path / "run"
    for place in (folder, run, run / "state"):
        place.mkdir(parents=True)
        for name in (own, others, alive):
            (place / name).touch()
    part = folder / f".tmp-{dead.pid}-{disk._this_host()}-new" / "part"  # of an atomic directory
    part.parent.mkdir()
    part.touch()
    with atomic_write(folder / "a.txt") as temporary:
        temporary.touch()
    assert {path.name for path in folder.iterdir()} == {"a.txt", others, alive}
    write_yaml(run / CONFIG, content({"manifest": manifest}))
    claimed(run, content({"manifest": manifest}))
    assert {path.name for path in run.rglob("*")} == {LOCK, CONFIG, "state"}


def test_a_directory_is_listed_once_however_much_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    real = os.listdir
    monkeypatch.setattr("asrkit.disk.os.listdir", lambda folder: listed.append(folder) or real(folder))  # type: ignore[func-returns-value]
    for number in range(5):
        with atomic_write(tmp_path / f"{number}.txt") as temporary:
            temporary.touch()
    assert listed == [tmp_path]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_a_directory_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = number
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(failing, os.strerror(failing))
        real(descriptor)

    monkeypatch.setattr("asrkit.disk.os.fsync", fsync)
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
    with atomic_directory(tmp_path / "folder") as temporary:
        (temporary / "b").write_text("b")
    assert (tmp_path / "a.txt").read_text() == "a" and (tmp_path / "folder" / "b").read_text() == "b"
    failing = errno.EIO  # a real error of the disk
    with pytest.raises(UserError, match="Input/output error"), atomic_write(tmp_path / "c.txt") as temporary:
        temporary.touch()


@pytest.mark.parametrize(
    "number, frees", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False), (errno.EACCES, False)]
)
def test_space_is_to_be_freed_where_there_is_none_alone(number: int, frees: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, atomic_write(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number) in str(caught.value) and ("free some space" in str(caught.value)) == frees


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_a_number_of_torchrun_that_is_none_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "two")
    with pytest.raises(UserError, match=f"{name}=two: is no number"), join_world("cpu"):
        pass


@pytest.mark.parametrize(
    "change", ["model.dim=10000000", "model.num_layers=1000000000", "model.predictor_dim=100000000000"]
)
def test_a_model_that_no_memory_holds_is_refused_before_it_is_built(tmp_path: Path, change: str) -> None:
    manifest = make_corpus(tmp_path, 4)
    said = asrkit("train-backbone", "--manifest", manifest, "--out", tmp_path / "run", "--set", "tokenizer.vocab_size=30", "--set", change, code=1)  # fmt: skip
    assert "parameters" in said and "lower its dimensions" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_link_or_a_mount_point_is_refused_before_the_work(tmp_path: Path) -> None:
    """A rename replaces neither."""
    (tmp_path / "big").mkdir()
    for name, target in (("link", tmp_path / "big"), ("dangling", tmp_path / "nowhere")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(UserError, match=f"{name}: is a link, which a new directory cannot replace"):  # noqa: SIM117
            with atomic_directory(tmp_path / name):
                raise AssertionError("the work has begun")
    assert disk.occupied(Path("/proc")) == [
        "/proc: is a mount point, which a new directory cannot replace; choose another --out"
    ]
    assert disk.occupied(tmp_path / "big") == []


def test_the_time_before_a_stop_counts_though_nothing_was_published(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for saved_before in (False, True):
        with RunWriter.open(run, "prune", {"seed": 1}, {}, "asrkit prune", ONE) as writer:
            assert (time.monotonic() - writer._began > 999) == saved_before
        (run / STATE).mkdir(exist_ok=True)
        save_file({}, run / STATE / STATE_FILE, {"progress": '{"seconds": 1000.0}'})
