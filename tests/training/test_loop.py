"""The loop as a user meets it: processes that are killed, interrupted, run in parallel, or given bad input."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
import torch
from lhotse import CutSet
from safetensors.torch import load_file

from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.migration import FORMAT
from asrkit.models import load_model
from asrkit.run_dir import LINEAGE, MODEL, open_run, write_yaml
from asrkit.training.checkpoint import Progress, load_state, saved_seconds
from asrkit.training.config import TrainingConfig
from asrkit.training.ema import MovingAverage
from asrkit.training.logs import RunLog, earlier_lines
from asrkit.training.run_writer import read_sealed, write_sealed
from asrkit.training.step import BatchStream, out_of_memory_named
from helpers.clock import set_clock
from helpers.commands import ONE, TWO, Finished, asrkit, finish, launched, sets
from helpers.run_dirs import metrics, weights_equal
from helpers.tones import make_corpus

TINY = [
    "model.size=tiny", "model.dim=16", "model.num_layers=1", "model.feedforward_dim=16", "model.predictor_dim=16",
    "model.joiner_dim=16", "model.kernel_size=3", "model.subsampling_channels=[2, 3]", "tokenizer.vocab_size=30",
    "data.num_buckets=2", "data.num_workers=0", "training.tensorboard=false", "loss.warm_up_steps=4",
    "training.optimizer.warm_up_steps=4", "training.precision=float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, 16)
    make_corpus(folder, 6, seed=1, name="dev")
    return folder


def command(corpus: Path, out: Path, *changes: str, **options: object) -> list[str]:
    """The words after ``asrkit``."""
    flags = {"manifest": corpus / "train.jsonl.gz", "out": out, "max_duration": 8, **options}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["train-backbone", *words, *sets(*TINY, *changes)]


def rows(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    return [{key: value for key, value in row.items() if key != "timing"} for row in metrics(out)]


RHYTHM = [
    "data.bpe_dropout=0.1",
    "training.steps=30",
    "training.log_every=3",
    "training.save_every=4",
    "training.evaluate_every=10",
]


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    asrkit(*command(corpus, out, *RHYTHM, dev=corpus / "dev.jsonl.gz"))
    return out


def test_a_run_directory_is_complete(uninterrupted: Path, corpus: Path) -> None:
    opened = open_run(uninterrupted)
    entry = opened.lineage[-1]
    assert entry["stage"] == "train-backbone" and "train-backbone" in entry["command"]
    assert set(entry["manifests"]) == {str(corpus / "train.jsonl.gz"), str(corpus / "dev.jsonl.gz")}
    measured = [row["dev_wer"] for row in rows(uninterrupted) if "dev_wer" in row]
    assert len(measured) == 3 and entry["metrics"]["wer"] == min(measured)  # the best weights are kept
    assert entry["seconds"] >= saved_seconds(uninterrupted) - 0.1 > 0  # the time of all steps, whichever were the best
    assert opened.config["training"]["optimizer"]["betas"] == [0.9, 0.98]  # defaults are written out
    assert (uninterrupted / "tokens.txt").read_text().startswith("<blk> 0\n<unk> 1\n")
    assert rows(uninterrupted)[-1]["step"] == 30
    assert not [path for path in uninterrupted.rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]


@pytest.mark.slow
@pytest.mark.parametrize("wait_for", [6, 13, 21])
def test_killed_and_resumed_equals_uninterrupted(
    wait_for: int, uninterrupted: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    words = command(corpus, out, *RHYTHM, dev=corpus / "dev.jsonl.gz")
    process = subprocess.Popen([*ONE, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 120:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= wait_for // 3:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "done").exists(), "the run ended before it could be killed"
    if (out / "model.safetensors").exists():
        open_run(out)  # whatever was published is whole
    again = asrkit(*words)
    if (out / "state").exists() and wait_for > 6:
        assert "resuming after step" in again
    assert rows(out) == rows(uninterrupted)
    assert weights_equal(out, uninterrupted)


@pytest.mark.slow
def test_sigint_saves_and_says_so(uninterrupted: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    words = command(corpus, out, *RHYTHM, "training.save_every=1000", dev=corpus / "dev.jsonl.gz")
    process = subprocess.Popen([*ONE, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "run the same command again to resume" in errors and "Traceback" not in errors
    assert "resuming after step" in asrkit(*words)
    assert weights_equal(out, uninterrupted)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(corpus: Path, tmp_path: Path) -> None:
    same = [
        "training.steps=6", "training.log_every=2", "model.dropout=0", "model.predictor_dropout=0",
        "data.augment.spec_augment=null",
    ]  # fmt: skip
    launched(TWO, *command(corpus, tmp_path / "two", *same))
    # accumulating two parts is the third way to the same batch
    asrkit(*command(corpus, tmp_path / "one", *same, "training.accumulate=2"))
    asrkit(*command(corpus, tmp_path / "wide", *same, max_duration=16))
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "wide")}
    for name, tensor in weights["one"].items():
        torch.testing.assert_close(tensor, weights["two"][name], rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["audio_seconds"] == pytest.approx(theirs["audio_seconds"])
    assert rows(tmp_path / "wide")[0]["loss"] == pytest.approx(rows(tmp_path / "one")[0]["loss"], rel=0.3)


def test_non_finite_losses_name_the_cuts_and_touch_nothing(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "nan"
    # a rate that sends the weights to infinity at once
    words = command(
        corpus, out, "training.steps=40", "training.optimizer.name=adamw", "training.optimizer.learning_rate=1e30",
        "training.max_skipped_in_a_row=3",
    )  # fmt: skip
    error = lines_of(finish(*words))
    assert "3 steps in a row" in error and "train-" in error
    skipped = [row for row in rows(out) if "skipped_cuts" in row]
    assert len(skipped) == 3 and all(cut.startswith("train-") for cut in skipped[0]["skipped_cuts"])


def lines_of(done: Finished) -> str:
    """The error lines; nothing but lines, and exit code 1."""
    assert done.code == 1, done.err
    assert "Traceback" not in done.err
    return "\n".join(line for line in done.err.splitlines() if line.startswith("error: "))


def test_bad_input_ends_in_one_line(corpus: Path, tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "out"
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("")
    with gzip.open(corpus / "train.jsonl.gz", "rt") as file:
        broken.write_text(file.readline() + '{"id": \n')
    cases = {
        "no such": command(corpus, out, manifest=tmp_path / "nowhere.jsonl.gz"),
        "empty": command(corpus, out, manifest=empty),
        "broken.jsonl": command(corpus, out, manifest=broken),
        "did you mean training.steps": command(corpus, out, "training.step=3"),
        "vocab_size=5": command(corpus, out, "tokenizer.vocab_size=5"),
        "sentencepiece": command(corpus, out, tokenizer=broken),
        "started with different settings: seed: 1 -> 2": command(
            corpus, uninterrupted, *RHYTHM, dev=corpus / "dev.jsonl.gz", seed=2
        ),
        "holds other files": command(corpus, corpus),
        "kernel_size": command(corpus, out, "model.kernel_size=4"),
    }
    for expected, words in cases.items():
        assert expected in lines_of(finish(*words)), expected
        assert not out.exists(), "something half written was left"


def test_bad_cuts_are_refused_or_left_out(tmp_path: Path) -> None:
    import soundfile

    make_corpus(tmp_path, 8)
    audio = tmp_path / "train" / "3.wav"
    samples, rate = soundfile.read(audio)
    soundfile.write(audio, samples * 0, rate)
    (tmp_path / "train" / "5.wav").write_bytes(b"RIFF")
    refused = lines_of(finish(*command(tmp_path, tmp_path / "refused", "training.steps=2")))
    assert "train-3" in refused and "train-5" in refused and "2 unusable cuts" in refused
    skipped = asrkit(*command(tmp_path, tmp_path / "skipped", "training.steps=2", "bad_cuts=skip"))
    assert "left out: cut train-3" in skipped and "6 utterances" in skipped


def test_sound_in_which_nobody_speaks_is_trained_on_if_asked(tmp_path: Path) -> None:
    make_corpus(tmp_path, 6)
    manifest = tmp_path / "train.jsonl.gz"
    cuts = CutSet.from_file(manifest).to_eager()
    for cut in list(cuts)[:3]:
        cut.supervisions[0].text = ""
    manifest.unlink()
    cuts.to_file(manifest)
    refused = lines_of(finish(*command(tmp_path, tmp_path / "refused", "training.steps=2")))
    assert "train-0" in refused and "text" in refused and not (tmp_path / "refused").exists()
    trained = asrkit(*command(tmp_path, tmp_path / "run", "training.steps=2", "data.empty_texts=silence"))
    assert "6 utterances" in trained
    assert all(0 < row["loss"] < float("inf") for row in rows(tmp_path / "run") if "loss" in row)


def test_noise_that_cannot_be_read_is_named_before_training(tmp_path: Path) -> None:
    make_corpus(tmp_path, 4)
    noise = make_corpus(tmp_path, 2, 3, "noise")
    (tmp_path / "noise" / "1.wav").write_bytes(b"RIFF")
    refused = lines_of(
        finish(
            *command(
                tmp_path,
                tmp_path / "run",
                "training.steps=2",
                f"data.noise={noise}",
                "data.augment.noise_probability=0.5",
            )
        )
    )
    assert "noise-1" in refused and "1 unusable cut" in refused and not (tmp_path / "run").exists()


def test_dev_audio_that_cannot_be_read_is_named_before_training(tmp_path: Path) -> None:
    make_corpus(tmp_path, 4)
    dev = make_corpus(tmp_path, 2, 3, "dev")
    (tmp_path / "dev" / "1.wav").unlink()
    refused = lines_of(finish(*command(tmp_path, tmp_path / "run", "training.steps=2", dev=dev)))
    assert "cut dev-1: unreadable" in refused and "1 unusable cut" in refused and not (tmp_path / "run").exists()


def test_what_a_resumed_run_reads_again_is_under_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "left_out.yaml"
    content = {"cut-1": "silent: no sound", "cut-2": "text: too long"}
    write_sealed(path, content)
    assert read_sealed(path) == content
    for broken in (path.read_text().replace("cut-2", "cut-3"), "cut-1: silent\n", "", "- 1\n"):
        path.write_text(broken)
        with pytest.raises(UserError, match=re.escape("left_out.yaml: is damaged")):
            read_sealed(path)


def test_the_last_line_of_the_metrics_may_be_half(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join([*whole, '{"step": 4, "lo']))
    assert earlier_lines(path, 2) == whole[:2] and earlier_lines(path, 9) == whole
    for broken in ('{"step": 2, "lo', '{"loss": 1.0}', '{"step": "2"}', "[]", "[" * 100_000):
        path.write_text("\n".join([whole[0], broken, whole[2]]))
        with pytest.raises(UserError, match=re.escape("metrics.jsonl:2: is not a logged step")):
            earlier_lines(path, 9)


def test_a_directory_in_use_is_refused(corpus: Path, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "busy"
    out.mkdir()
    with open(out / ".lock", "w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        assert "another run is training there" in launched(ONE, *command(corpus, out), code=1)


def test_a_damaged_checkpoint_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="digest"):
        open_run(copy)
    (copy / "model.yaml").unlink()
    with pytest.raises(UserError, match=re.escape("model.yaml")):
        open_run(copy)


def test_a_model_of_another_version_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy)
    found = open_run(copy)
    write_yaml(
        copy / MODEL, {"format": FORMAT, "kind": "asr", "spec": {**found.model_spec, "variants": {"backbone": []}}}
    )
    lineage = [*found.lineage[:-1], {**found.lineage[-1], "model_spec_sha256": sha256_of(copy / MODEL)}]
    write_yaml(copy / LINEAGE, lineage)
    with pytest.raises(UserError, match="another version of asrkit made it .model.yaml: variants.backbone"):
        load_model(open_run(copy))


def test_a_rate_that_is_not_finite_is_refused(corpus: Path, tmp_path: Path) -> None:
    text = lines_of(finish(*command(corpus, tmp_path / "run", "training.optimizer.learning_rate=.inf")))
    assert "training.optimizer.learning_rate: Input should be a finite number" in text


@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_a_flipped_byte_of_the_state_is_refused(
    place: float, uninterrupted: Path, corpus: Path, tmp_path: Path
) -> None:
    """In the header, in a tensor, in the optimizer's: whatever it changes, nothing goes on from it."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy)
    state = copy / "state" / "latest.safetensors"
    damaged = bytearray(state.read_bytes())
    damaged[int(place * len(damaged))] ^= 1
    state.write_bytes(damaged)
    model = load_model(open_run(copy))
    with pytest.raises(UserError, match="cannot resume from it"):
        load_state(copy, model, model, torch.optim.AdamW(model.parameters()))


def test_a_truncated_state_is_refused(uninterrupted: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "truncated"
    words = command(corpus, out, *RHYTHM, dev=corpus / "dev.jsonl.gz")
    shutil.copytree(uninterrupted, out)
    (out / "done").unlink()
    state = out / "state" / "latest.safetensors"
    state.write_bytes(state.read_bytes()[:500])
    assert "cannot resume" in lines_of(finish(*words))


@pytest.mark.slow
def test_a_file_that_cannot_be_written_leaves_the_previous_state(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"
    words = command(corpus, out, "training.steps=8", "training.save_every=4", "training.log_every=2")
    # files may not grow past 40 blocks: the metrics fit, the state does not
    limit = ["bash", "-c", "ulimit -f 40; trap '' XFSZ; exec \"$@\"", "bash", *ONE]
    text = launched(limit, *words, code=1)
    assert "Traceback" not in text
    assert "cannot write (File too large); fix that" in text  # it is no lack of space
    assert not list(out.rglob(".tmp-*"))
    asrkit(*words)
    assert rows(out)[-1]["step"] == 8


def test_the_saved_weights_are_the_running_average() -> None:
    model, average = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = average.weight.detach().clone()
    MovingAverage(model, average).follow(0.75)
    torch.testing.assert_close(average.weight.detach(), 0.75 * before + 0.25 * model.weight.detach())


def test_an_average_of_nothing_is_the_last_step() -> None:
    """To the last bit, as the integers of the last step are promised; and weights that do not move stay with any decay."""
    torch.manual_seed(0)
    model, average = torch.nn.Linear(300, 300), torch.nn.Linear(300, 300)
    shadow = MovingAverage(model, average)
    shadow.follow(0.0)
    assert torch.equal(average.weight, model.weight)
    shadow.follow(0.37)
    assert torch.equal(average.weight, model.weight)


def test_memory_that_runs_out_names_the_batch() -> None:
    """A real allocation that fails, in the place where a step's would."""
    from asrkit.data.batch import Batch

    batch = Batch(torch.zeros(2, 9, 80), torch.tensor([9, 5]), ["short", "long"], ["a", "b"], ["", ""], [1.0, 30.0])
    with (
        pytest.raises(UserError, match="step 8: out of memory .*, the longest long of 30.0 s"),
        out_of_memory_named(batch, 7),
    ):
        torch.zeros(1 << 50)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_named(batch, 7):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


class _Broken(torch.utils.data.Dataset):
    def __getitem__(self, place: int) -> None:
        raise UserError("cut x: gone")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_loader_processes_stay_one_line(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        BatchStream(_Broken(), [0], workers, torch.device("cpu"))[0]  # type: ignore[arg-type]
    assert caught.value.lines == ("cut x: gone",)


@pytest.mark.slow
def test_a_terminal_shows_one_screen(uninterrupted: Path, corpus: Path, tmp_path: Path) -> None:
    """Where the run stands, below the lines that stay; what is written is the same as without a terminal."""
    out, shown = tmp_path / "run", b""
    terminal, other_end = pty.openpty()
    termios.tcsetwinsize(terminal, (30, 200))
    words = [*ONE, *command(corpus, out, *RHYTHM, dev=corpus / "dev.jsonl.gz")]
    process = subprocess.Popen(
        words, stderr=other_end, stdout=other_end, env={**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    )
    os.close(other_end)
    with contextlib.suppress(OSError):  # EIO: the process has ended
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    last = text[text.rindex(f"{out}: train-backbone, step 30 of 30") :]
    assert (
        f"[{'#' * 36}]" in last and re.search(r"loss .*[▁-█]{10} .*lowest", last) and re.search(r"dev WER .* %", last)
    )
    assert "s of audio a second" in last and "step 20: dev WER" in text
    assert rows(out) == rows(uninterrupted)


def test_the_end_of_another_process_is_named() -> None:
    from asrkit.training.distributed import peers_named

    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:598] Connection closed by peer [127.0.0.1]:9878"
    with (
        pytest.raises(UserError, match=r"another process of this training has ended .*go on from the last save"),
        peers_named(),
    ):
        raise RuntimeError(gloo)
    with pytest.raises(RuntimeError, match="shapes do not match"), peers_named():
        raise RuntimeError("shapes do not match")


def test_a_measurement_between_two_lines_is_no_part_of_the_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    set_clock(monkeypatch, "asrkit.training.logs", monotonic=lambda: now[0])
    progress = Progress(last_dev={"wer": 0.5})
    with RunLog(tmp_path, TrainingConfig(steps=4, tensorboard=False), 0, 1, True) as log:
        for step in range(1, 5):
            now[0] += 2.0
            progress.step = step
            log.count(step, 10.0, 0.5)
            if step == 3:
                now[0] += 100.0
                log.dev(progress, {"wer": 0.5}, 100.0)
            if step in (2, 4):
                log.step(progress, {"audio_seconds": 10.0}, 1e-3)
    timings = [row["timing"] for row in metrics(tmp_path) if "data_wait" in row["timing"]]
    assert [timing["step_seconds"] for timing in timings] == [2.0, 2.0]
    assert [(timing["audio_per_second"], timing["data_wait"]) for timing in timings] == [(5.0, 0.25)] * 2
