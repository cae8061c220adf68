"""Stages on a GPU as a user runs them, on made sound: every stage for 20 steps, resuming after SIGKILL, two processes on one
GPU, arithmetic, and training from files with loader processes.

    python benchmarks/gpu_stages.py stages --out results.jsonl      # or resume, processes, precision, loader; see gpu.sh
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from gpu_report import Report, run_part
from lhotse import CutSet, Recording, SupervisionSegment
from safetensors.torch import load_file

from asrkit.run_dir import METRICS, WEIGHTS
from helpers.aligned import SHAPE
from helpers.commands import asrkit, sets
from helpers.tones import RATE, WORDS, make_corpus, say

DEVICE = os.environ.get("DEVICE", "cuda")
TORCHRUN = [
    *[sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"],
    *["--nproc_per_node", "2", "--redirects", "1", "--tee", "1", "-m", "asrkit"],
]
PLAIN = [sys.executable, "-m", "asrkit"]
TWENTY = (
    "training.steps=20", "training.log_every=5", "training.evaluate_every=20", "training.save_every=10",
    "training.tensorboard=false", "data.num_workers=2", "data.num_buckets=1", "loss.backend=torch",
)  # fmt: skip
# So that it knows the words, and can align and teach them.
KNOWING = (
    "training.steps=150", "training.save_every=150", "training.log_every=50", "training.average_decay=0.9", "loss.ctc_scale=1",
    "training.optimizer.name=adamw", "training.optimizer.learning_rate=0.005", "training.optimizer.warm_up_steps=10",
)  # fmt: skip
STILL = (
    "model.dropout=0", "model.predictor_dropout=0", "data.augment.spec_augment=null", "data.num_workers=0",
    "data.num_buckets=1", "training.tensorboard=false", "loss.backend=torch", "loss.warm_up_steps=10",
    "training.optimizer.warm_up_steps=10",
)  # fmt: skip


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "timing"} for row in lines]


def losses(run: Path) -> list[float]:
    return [round(row["loss"], 5) for row in rows(run) if "loss" in row]


def compared(run: Path, other: Path) -> dict[str, Any]:
    """Whether two runs are the same bit by bit, and if not, how far they are apart."""
    weights, others = load_file(run / WEIGHTS), load_file(other / WEIGHTS)
    far = max(float((weights[name].float() - others[name].float()).norm()) for name in weights)
    size = max(float(weights[name].float().norm()) for name in weights)
    pairs = [(a, b) for a, b in zip(losses(run), losses(other), strict=True)]
    return {
        "same_weights": far == 0.0,
        "same_metrics": rows(run) == rows(other),
        "largest_difference": far,
        "largest_norm": size,
        "loss_difference": max(abs(a - b) / abs(a) for a, b in pairs),
        "last_losses": pairs[-1],
    }


def stages(report: Report, quick: bool) -> None:
    """Every stage for 20 steps, in the precision that ``auto`` takes, each from the one before."""
    steps = (*TWENTY, "training.steps=2") if quick else TWENTY
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = ["--manifest", folder / "train.jsonl.gz", "--dev", folder / "dev.jsonl.gz", "--max-duration", 30]
        device = ["--device", DEVICE]

        def stage(name: str, *words: object, out: str = "", train: bool = True) -> None:
            target = ["--out", folder / (out or name)]

            def run() -> dict[str, Any]:
                asrkit(*words, *target, *device)
                return {"losses": losses(folder / (out or name))} if train else {}

            report.attempt(name, run)

        for seed, (part, count) in enumerate((("train", 24), ("dev", 6))):
            make_corpus(folder, count, seed, part, language="en")
        knowing = (*KNOWING, "training.steps=40", "training.evaluate_every=40") if quick else KNOWING
        stage("parent", "train-backbone", *data, *sets(*SHAPE, *steps, *knowing))
        parent = ["--from", folder / "parent"]
        stage("train-backbone", "train-backbone", *data, *sets(*SHAPE, *steps))
        joint = (
            "model.attention_dropout.probability=0.5",
            "model.attention_heads=2",
            "contexts.train=[full,'chunk=4,left=8']",
        )
        stage("train-backbone, joint", "train-backbone", *data, *sets(*SHAPE, *joint, *steps), out="joint")
        stage("add-submodel", "add-submodel", *parent, "--name", "near", "--context", "chunk=4,left=8", *data,
              *sets("submodel.heads=2", *steps), out="near")  # fmt: skip
        stage(
            "prune",
            "prune",
            *parent,
            "--sparsity",
            "2:4",
            "--shots",
            2,
            *data,
            *sets("schedule.score=activation", *steps),
        )
        stage(
            "qat", "qat", "--from", folder / "prune", "--bits", 4, "--teacher", folder / "parent", *data, *sets(*steps)
        )
        stage("qat, integer inputs", "qat", *parent, "--bits", 8, "--act-bits", 8, *data, *sets(*steps), out="integers")
        teacher = ["--teacher", folder / "parent", "--tokenizer", folder / "parent" / "tokenizer.model"]
        small = (*SHAPE, "model.dim=24", *steps)
        stage(
            "distill",
            "distill",
            *teacher,
            "--weight",
            "student-teacher",
            *data,
            *sets("teacher.encoder_scale=0.1", *small),
        )
        stage("distill from a cache", "distill", *teacher, "--cache", folder / "cache", *data,
              *sets("data.augment.speed=0", "teacher.ctc_scale=0", *small), out="cached")  # fmt: skip
        _language_models(report, folder, stage, steps)
        for run in ("parent", "near", "qat", "integers"):
            report.attempt(f"decoding {run}", _decoded_alike, folder, run)
        report.attempt("export", _exported, folder)


def _language_models(report: Report, folder: Path, stage: Callable[..., None], steps: tuple[str, ...]) -> None:
    for part in ("train", "dev"):
        stage(f"align {part}", "align", "--from", folder / "parent", "--manifest", folder / f"{part}.jsonl.gz", "--unit",
              "bpe", *sets("bad_cuts=skip"), out=f"aligned-{part}.jsonl.gz", train=False)  # fmt: skip
    own = [step for step in steps if step.startswith("training.")]
    text = [
        "--manifest",
        folder / "aligned-train.jsonl.gz",
        "--unit",
        "bpe",
        "--tokenizer",
        folder / "parent" / "tokenizer.model",
    ]
    for shape in ("lstm", "transformer"):
        words = sets("model.dim=16", "model.num_layers=1", f"model.architecture={shape}", *own)
        stage(f"train-lm, {shape}", "train-lm", *text, *words, out=shape)
    aligned = ["--manifest", folder / "aligned-train.jsonl.gz", "--dev", folder / "aligned-dev.jsonl.gz"]
    lm = ["--lm", f"bpe={folder / 'lstm'}", "--max-duration", 30]
    stage("distill-lm", "distill-lm", "--from", folder / "parent", *lm, *aligned, *sets(*steps))


def _decoded_alike(folder: Path, run: str) -> dict[str, Any]:
    """How many utterances are decoded to other words than on the CPU, by greedy and beam search."""
    texts: dict[str, list[str]] = {}
    for device in ("cpu", DEVICE):
        out = folder / f"decoded-{run}-{device}"
        methods = ["--method", "greedy", "--method", "beam", "--method", "ctc"]
        asrkit(
            "evaluate",
            "--from",
            folder / run,
            "--manifest",
            folder / "dev.jsonl.gz",
            *methods,
            "--out",
            out,
            "--device",
            device,
        )
        found = [
            json.loads(line) for file in sorted(out.rglob("utterances.jsonl")) for line in file.read_text().splitlines()
        ]
        texts[device] = [str(row["hyp"]) for row in found]
    pairs = list(zip(texts["cpu"], texts[DEVICE], strict=True))
    return {"utterances": len(pairs), "differ": sum(a != b for a, b in pairs)}


def _exported(folder: Path) -> dict[str, Any]:
    """Export checks its parity with torch by itself; here the model was trained on the GPU."""
    for run in ("parent", "integers"):
        asrkit("export", "--from", folder / run, "--out", folder / f"onnx-{run}")
    return {"exported": ["parent", "integers"]}


def _command(corpus: Path, out: Path, *settings: str) -> list[str]:
    words = ["train-backbone", "--manifest", corpus / "train.jsonl.gz", "--dev", corpus / "dev.jsonl.gz", "--out", out]
    return [str(word) for word in (*words, "--max-duration", 8, "--device", DEVICE, *sets(*SHAPE, *settings))]


def _launch(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=sys.stdout, stderr=sys.stderr, text=True)


def resume(report: Report, quick: bool) -> None:
    """A run twice, and once killed by SIGKILL and gone on with: the same metrics and weights, bit for bit?"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder, 16)
        make_corpus(folder, 6, seed=1, name="dev")
        steps = 12 if quick else 200
        settings = [*STILL, f"training.steps={steps}", "training.log_every=4", f"training.evaluate_every={steps}"]
        settings += ["training.save_every=4", "training.precision=float32"]
        runs = [_launch([*PLAIN, *_command(folder, folder / run, *settings)]) for run in ("one", "two", "killed")]
        while runs[2].poll() is None and not (folder / "killed" / METRICS).exists():
            time.sleep(0.01)
        time.sleep(0.2)
        runs[2].send_signal(signal.SIGKILL)
        killed = runs[2].wait() == -signal.SIGKILL
        again = _launch([*PLAIN, *_command(folder, folder / "killed", *settings)]).wait()
        codes = [run.wait() for run in runs[:2]]
        report.add("ends", killed=killed, codes=[*codes, again])
        report.attempt("two runs alike", compared, folder / "one", folder / "two")
        report.attempt("killed and gone on with", compared, folder / "one", folder / "killed")


def processes(report: Report, quick: bool) -> None:
    """Two processes on one GPU, by gloo, against one that accumulates two batches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder, 16)
        make_corpus(folder, 6, seed=1, name="dev")
        steps = (*STILL, f"training.steps={4 if quick else 20}", "training.log_every=2", "training.precision=float32")
        shared = "cuda:0" if DEVICE == "cuda" else DEVICE
        words = _command(folder, folder / "two", *steps)
        words[words.index("--device") + 1] = shared
        two = _launch([*TORCHRUN, *words])
        one = _launch([*PLAIN, *_command(folder, folder / "one", *steps, "training.accumulate=2")])
        report.add("ends", codes=[one.wait(), two.wait()])
        report.attempt("two processes and one", compared, folder / "one", folder / "two")
        refused = subprocess.run([*TORCHRUN, *_command(folder, folder / "no", *steps)], capture_output=True, text=True)
        said = [line for line in refused.stderr.splitlines() if "error: " in line]
        report.add("two processes, a GPU each", code=refused.returncode, said=said[:2])


def precision(report: Report, quick: bool) -> None:
    """Losses of 30 steps in each arithmetic, from the same weights and data, and on the CPU."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder, 16)
        make_corpus(folder, 6, seed=1, name="dev")
        steps = (*STILL, f"training.steps={4 if quick else 30}", "training.log_every=1")
        runs = {"cpu": ("cpu", "float32")} | {kind: (DEVICE, kind) for kind in ("float32", "bfloat16", "float16")}
        if DEVICE == "cpu":
            del runs["float16"]
        for name, (device, kind) in runs.items():
            words = _command(folder, folder / name, *steps, f"training.precision={kind}")
            words[words.index("--device") + 1] = device
            report.attempt(name, _curve, folder / name, words)


def _curve(run: Path, words: list[str]) -> dict[str, Any]:
    asrkit(*words)
    return {
        "losses": losses(run),
        "gradient_norms": [row.get("gradient_norm") for row in rows(run) if "loss" in row],
        "skipped": sum("skipped_cuts" in row for row in rows(run)),
        "dev": [row for row in rows(run) if "dev_wer" in row],
    }


def loader(report: Report, quick: bool) -> None:
    """``small`` from audio files by loader processes: audio per second and the share of time that waits for data."""
    with tempfile.TemporaryDirectory() as name:
        folder, workers = Path(name), max(1, len(os.sched_getaffinity(0)) - 2)
        size, steps, audio = ("tiny", 2, 60) if quick else ("small", 60, 600)
        settings = sets(
            f"model.size={size}", "tokenizer.vocab_size=18", f"data.num_workers={workers}", f"training.steps={steps}",
            f"training.log_every={max(1, steps // 6)}", "training.save_every=1000", "training.tensorboard=false",
        )  # fmt: skip
        manifest = _long_corpus(folder, 8 if quick else 600)
        words = ["--manifest", manifest, "--out", folder / "run", "--max-duration", audio, "--device", DEVICE]
        report.attempt(f"{size}, {workers} workers", _loaded, folder / "run", ["train-backbone", *words, *settings])


def _loaded(run: Path, words: list[str]) -> dict[str, Any]:
    asrkit(*words)
    return {"timing": [json.loads(line)["timing"] for line in (run / METRICS).read_text().splitlines()]}


def _long_corpus(folder: Path, count: int) -> Path:
    """Utterances of 4 to 16 s."""
    random = np.random.default_rng(0)
    cuts = []
    for number in range(count):
        words = [str(word) for word in random.choice(list(WORDS), size=random.integers(10, 41))]
        path = folder / f"{number}.wav"
        soundfile.write(path, say(words, random), RATE)
        cut = Recording.from_file(path, recording_id=str(number)).to_cut()
        cut.id = str(number)
        cut.supervisions = [SupervisionSegment(cut.id, cut.id, 0, cut.duration, text=" ".join(words))]
        cuts.append(cut)
    CutSet.from_cuts(cuts).to_file(folder / "long.jsonl.gz")
    return folder / "long.jsonl.gz"


if __name__ == "__main__":
    run_part({"stages": stages, "resume": resume, "processes": processes, "precision": precision, "loader": loader})
