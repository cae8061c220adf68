"""What a sequence criterion costs: CPU time of the gradients of a step, on a trained model and real batches.

    python benchmarks/sequence_step.py --from exp/backbone --manifest data/prompts/train.jsonl.gz

The criteria take turns, step by step, so that whatever else the machine does meets all of them alike. Lattices need k2.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer

from asrkit.config import from_dict
from asrkit.methods.distillation.loss import build_loss
from asrkit.methods.sequence.config import SequenceTrainConfig
from asrkit.models import load_model
from asrkit.run_dir import TOKENIZER, open_run
from asrkit.stages.sequence_train import build_task, prepare
from asrkit.training.datasets import training_batches
from asrkit.training.distributed import World
from asrkit.training.step import Arithmetic, TrainTask, compute_gradients

SYSTEMS: dict[str, dict[str, Any]] = {
    "mwer": {},
    "mwer, 8 hypotheses": {"hypotheses": {"beam": 8}},
    "mwer, searched once": {"cache": True},
    "mwer of CTC": {"head": "ctc"},
    "sampled-mbr": {"criterion": "sampled-mbr"},
    "mmi": {"criterion": "mmi"},
    "smbr": {"criterion": "smbr"},
    "smbr, searched once": {"criterion": "smbr", "cache": True},
    "mpe": {"criterion": "mpe"},
}


def main(
    parent: Annotated[Path, typer.Option("--from", help="A trained run directory.")],
    manifest: Annotated[Path, typer.Option(help="Cuts to train on.")],
    system: Annotated[list[str] | None, typer.Option(help="Repeatable. [default: all]")] = None,
    seconds: Annotated[float, typer.Option(help="Audio in a step.")] = 60.0,
    steps: int = 6,
    threads: int = 1,
    profile: Annotated[bool, typer.Option(help="Print where the time of the first system goes.")] = False,
) -> None:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    names = system or list(SYSTEMS)
    with tempfile.TemporaryDirectory() as folder:
        tasks: dict[str, TrainTask] = {}
        for name in names:
            out = Path(folder) / name
            out.mkdir()
            (out / TOKENIZER).write_bytes(open_run(parent).tokenizer_path.read_bytes())
            # What was searched once is of audio with its own timing, so all have that.
            data = {"max_duration": seconds, "num_workers": 0, "augment": {"speed": 0.0}}
            settings = from_dict(SequenceTrainConfig, {**SYSTEMS[name], "data": data}, "benchmark")
            batches = training_batches(manifest, settings.data, out, 1, settings.seed)
            run: Any = SimpleNamespace(path=out, world=World(0, 1, device), note=lambda text: None)
            prepare(settings, parent, run, batches)
            tasks[name] = build_task(settings, parent, out, batches)
        model = load_model(open_run(parent))
        ordinary = TrainTask(model, build_loss(model.spec, settings.loss, settings.contexts), batches)
        loaded = {number: (batches[number], 0.0) for number in range(steps)}
        times: dict[str, list[float]] = {name: [] for name in ("ordinary", *names)}
        for number in range(steps):
            for name, task in {"ordinary": ordinary, **tasks}.items():
                began = time.process_time()
                compute_gradients(task, task.model, loaded, [number], 1, Arithmetic(device))
                times[name].append(time.process_time() - began)
        if profile:
            with torch.profiler.profile() as trace:
                task = tasks[names[0]]
                compute_gradients(task, task.model, loaded, [1], 1, Arithmetic(device))
            print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))
    base = statistics.median(times["ordinary"][1:])
    for name, spent in times.items():
        median = statistics.median(spent[1:])
        print(f"{name:20s} {median:7.3f} s of CPU time a step, {median / base:5.2f} times an ordinary one")


if __name__ == "__main__":
    typer.run(main)
