"""Training steps on a GPU, on data that lies there: gradients against the CPU's, throughput, a profile, the loss alone.

python benchmarks/gpu_steps.py throughput --out results.jsonl      # or gradients, profile, loss; see gpu.sh
DEVICE=cpu PYTHONPATH=tests python benchmarks/gpu_steps.py launches --out results.jsonl        # needs no GPU
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transducer_loss
from gpu_report import Report, run_part
from torch import Tensor

from asrkit.config import from_dict
from asrkit.data.batch import Batch
from asrkit.models import SIZES, AsrModel, ModelSpec
from asrkit.training.asr_loss import LossConfig, asr_loss
from asrkit.training.config import TrainingConfig
from asrkit.training.distributed import World
from asrkit.training.step import BatchStream, TrainTask, compute_gradients
from asrkit.training.stopping import Stopping
from asrkit.training.update import Updater
from helpers.pretend_gpu import GPU, pretend_gpu

DEVICE = torch.device("cuda:0" if os.environ.get("DEVICE", "cuda") == "cuda" else "cpu")
VOCAB = 500
LOSS = from_dict(LossConfig, {"backend": "torch"}, "benchmark")
ATTENTION: dict[str, Any] = {
    "submodels": {"near": {"kind": "attention", "layers": [0, 3, 5], "dim": 128, "heads": 4, "context": "full"}},
    "variants": {"near": {"submodels": ["near"], "contexts": ["full"]}},
    "variant": "near",
}


def make_model(size: str, attention: bool = False) -> AsrModel:
    torch.manual_seed(0)
    spec = {"vocab_size": VOCAB, **SIZES[size], **(ATTENTION if attention else {})}
    return AsrModel(from_dict(ModelSpec, spec, "benchmark"))


def make_batch(utterances: int, seconds: float, labels_a_second: float = 4.0) -> Batch:
    """Random features and labels; lengths differ by up to a tenth, as in a bucket."""
    random = torch.Generator().manual_seed(1)
    frames, labels = int(100 * seconds), int(labels_a_second * seconds)
    lens = torch.randint(frames - frames // 10, frames + 1, (utterances,), generator=random)
    symbol_lens = torch.randint(labels - labels // 10, labels + 1, (utterances,), generator=random)
    lens[0], symbol_lens[0] = frames, labels
    names = [str(number) for number in range(utterances)]
    return Batch(
        torch.randn(utterances, frames, 80, generator=random) * 4 - 8,
        lens,
        names,
        names,
        [""] * utterances,
        [float(length) / 100 for length in lens],
        torch.randint(2, VOCAB, (utterances, labels), generator=random),
        symbol_lens,
    )


class _OneBatch:
    """The same batch every time."""

    slices, steps_per_epoch = 1, 1000

    def __init__(self, batch: Batch) -> None:
        self.batch, self.plan = batch, self

    def __getitem__(self, number: int) -> Batch:
        return self.batch


class Training:
    """The loop of ``asrkit.training.loop.train``, a step at a time."""

    def __init__(
        self, size: str, batch: Batch, folder: Path, steps: int, precision: str, device: torch.device = DEVICE
    ) -> None:
        settings = from_dict(
            TrainingConfig, {"steps": steps, "precision": precision, "tensorboard": False, "log_every": 10}, "benchmark"
        )
        batches: Any = _OneBatch(batch)
        self.task = TrainTask(make_model(size), lambda model, given, step: asr_loss(model, given, step, LOSS), batches)
        self.updater = Updater(self.task, folder, settings, 1, World(0, 1, device), lambda *_: None)
        self.stream = BatchStream(batches, range(steps), 0, device)

    def step(self) -> None:
        number, updater = self.updater.step, self.updater
        updater.set_rate()
        result = compute_gradients(self.task, updater.model, self.stream, [number], 1, updater.arithmetic)
        self.stream.fetch()
        updater.apply(result)
        updater.finish_step(0, Stopping())


@contextmanager
def training(size: str, batch: Batch, steps: int, precision: str) -> Iterator[Training]:
    with tempfile.TemporaryDirectory() as folder:
        made = Training(size, batch, Path(folder), steps, precision)
        with made.updater.log:
            yield made


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def allow_tf32(products: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions


def gradients(report: Report, quick: bool) -> None:
    """Loss and gradients of every size against the CPU's in float32, without dropout, by float32, TF32 and bfloat16."""
    kinds = {
        "float32": (False, False),
        "torch's default": (False, True),
        "TF32": (True, True),
        "bfloat16": (True, True),
    }
    batch = make_batch(4, 4.0)
    for size in ("tiny",) if quick else ("tiny", "small", "medium", "large"):
        for attention in (False, True) if size == "small" else (False,):
            expected = _gradients(make_model(size, attention), batch, torch.device("cpu"), False)
            for kind, tf32 in kinds.items():
                allow_tf32(*tf32)
                name = f"{size}{' with attention' if attention else ''}, {kind}"
                report.attempt(name, _compared, expected, make_model(size, attention), batch, kind == "bfloat16")


def _compared(expected: tuple[Tensor, dict[str, Tensor]], model: AsrModel, batch: Batch, half: bool) -> dict[str, Any]:
    """Norms of the differences over the expected norms: of the losses, of all gradients, of the worst tensor."""
    found = _gradients(model, batch, DEVICE, half)
    assert expected[1].keys() == found[1].keys()
    each = {
        name: float((found[1][name] - grad).norm() / grad.norm()) for name, grad in expected[1].items() if grad.any()
    }
    worst = max(each, key=each.__getitem__)
    whole, other = (torch.cat([grad.flatten() for grad in side[1].values()]) for side in (expected, found))
    return {
        "losses": float((found[0] - expected[0]).norm() / expected[0].norm()),
        "gradients": float((other - whole).norm() / whole.norm()),
        "worst": [worst, each[worst]],
        "finite": bool(other.isfinite().all()),
    }


def _gradients(model: AsrModel, batch: Batch, device: torch.device, half: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model.to(device).eval()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        output = asr_loss(model, batch.to(device), 10_000, LOSS)
    (output.losses.sum() / output.count).backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return output.losses.detach().cpu(), grads


def throughput(report: Report, quick: bool) -> None:
    """Seconds of audio trained on per second, and peak memory, by size and arithmetic; 40 utterances of 15 s a step."""
    for size in ("tiny",) if quick else ("small", "medium", "large", "tiny"):
        for kind in ("float32",) if quick else ("bfloat16", "TF32", "float32"):
            allow_tf32(kind == "TF32", kind == "TF32")
            precision = "bfloat16" if kind == "bfloat16" else "float32"
            report.attempt(f"{size}, {kind}", _timed, size, precision, *((2, 3) if quick else (40, 12)))


def _timed(size: str, precision: str, utterances: int, steps: int) -> dict[str, Any]:
    batch = make_batch(utterances, 15.0).to(DEVICE)
    forget_peak()
    times = []
    with training(size, batch, steps + 3, precision) as run:
        for _ in range(steps + 3):
            began = time.perf_counter()
            run.step()
            wait()
            times.append(time.perf_counter() - began)
    median = sorted(times[3:])[steps // 2]
    return {
        "audio_per_second": sum(batch.durations) / median,
        "step_ms": 1e3 * median,
        "fastest_ms": 1e3 * min(times),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None,
        "audio": sum(batch.durations),
    }


def forget_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profile(report: Report, quick: bool) -> None:
    """One step: operators, launches and waits of the host by line, time the GPU works in it, and its longest kernels."""
    allow_tf32(True, True)
    for size in ("tiny",) if quick else ("small", "medium"):
        with training(
            size, make_batch(2 if quick else 40, 15.0).to(DEVICE), 8, "float32" if quick else "bfloat16"
        ) as run:
            for _ in range(4):
                run.step()
            wait()
            report.attempt(f"{size}, a step", _profiled, run)
            if DEVICE.type == "cuda":
                report.attempt(f"{size}, waits", _waits, run)


def _profiled(run: Training) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as record:
        began = time.perf_counter()
        run.step()
        wait()
        seconds = time.perf_counter() - began
    events = record.events() or []
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy: Counter[str] = Counter()
    for event in on_gpu:
        busy[event.name] += event.time_range.elapsed_us()
    calls = Counter(event.name for event in events if event.name.startswith(("cuda", "cuLaunch")))
    sort = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(record.key_averages().table(sort_by=sort, row_limit=25, max_name_column_width=70))
    return {
        "step_ms": 1e3 * seconds,
        "operators": sum(event.name.startswith("aten::") for event in events),
        "kernels": len(on_gpu),
        "gpu_busy_ms": sum(busy.values()) / 1e3,
        "runtime_calls": dict(calls.most_common(12)),
        "longest": {name[:80]: round(us / 1e3, 3) for name, us in busy.most_common(25)},
    }


def launches(report: Report, quick: bool) -> None:
    """What one step launches and waits for, counted on a pretended GPU that computes on the CPU; by length of the audio."""
    for size in ("tiny",) if quick else ("tiny", "small", "medium"):
        for seconds in (4.0,) if quick or size != "small" else (4.0, 8.0, 16.0):
            report.attempt(f"{size}, {seconds} s", _launched, size, make_batch(4, seconds, labels_a_second=5.0))


def _launched(size: str, batch: Batch) -> dict[str, Any]:
    with pretend_gpu() as counts, tempfile.TemporaryDirectory() as folder:
        run = Training(size, batch, Path(folder), 9, "float32", GPU)
        with run.updater.log:
            for _ in range(3):  # the first makes the optimizer's state
                counts.launches.clear()
                counts.waits.clear()
                run.step()
    return {
        "launches": sum(counts.launches.values()),
        "waits": sum(counts.waits.values()),
        "most": dict(counts.launches.most_common(12)),
    }


def _waits(run: Training) -> dict[str, Any]:
    """Where the host waits for the device in one step, by line of asrkit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{Path(str(one.filename)).name}:{one.lineno}" for one in caught if "synchronizing" in str(one.message)
    )
    return {"waits": sum(lines.values()), "lines": dict(lines.most_common(40))}


def loss(report: Report, quick: bool) -> None:
    """The pruned loss alone, joiner included, in milliseconds and megabytes: as k2's authors measured theirs on a V100 on
    LibriSpeech's shapes, 38.1 ms and 2,648 MB (batches of 10,000 frames, sorted), 63.4 ms and 3,820 MB (30 utterances)."""
    options = argparse.Namespace(
        frames=200 if quick else 10_000, vocab_size=500, joiner_dim=512, prune_range=5, threads=2
    )
    options.steps = 2 if quick else 20
    for name in ("torch-pruned", "torch-full"):
        for shape in ("100x20",) if quick else ("100x20", "200x50", "400x100"):
            report.attempt(f"{name} {shape}", _loss_alone, options, name, shape)


def _loss_alone(options: argparse.Namespace, name: str, shape: str) -> dict[str, Any]:
    forget_peak()
    found = transducer_loss.measure(options, DEVICE.type, shape, name)
    seconds = sorted(found["seconds"])
    return {"ms": 1e3 * seconds[len(seconds) // 2], "fastest_ms": 1e3 * seconds[0], "peak_mb": found["peak_mb"]}


if __name__ == "__main__":
    print(json.dumps({"torch": torch.__version__, "device": str(DEVICE)}))
    if DEVICE.type == "cuda":
        print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0))
    run_part({"gradients": gradients, "throughput": throughput, "profile": profile, "launches": launches, "loss": loss})
