"""What a sequence criterion costs: CPU time of its training step over that of an ordinary one, on a trained model and real batches.

    python benchmarks/sequence_step.py --from exp/backbone --manifest data/prompts/train.jsonl.gz

The criteria take turns, step by step, so that whatever else the machine does meets all of them alike. A step is both halves' larger
one: forward, search, backward.
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
from asrkit.methods.sequence.config import SequenceTrainConfig
from asrkit.run_dir import TOKENIZER, open_run
from asrkit.stages.sequence_train import build_task, prepare
from asrkit.training.asr_loss import asr_loss
from asrkit.training.datasets import training_batches
from asrkit.training.distributed import World
from asrkit.training.step import Arithmetic, compute_gradients

ALL = ["mwer", "sampled-mbr", "mmi", "smbr", "mpe"]


def main(
    parent: Annotated[Path, typer.Option("--from", help="A trained run directory.")],
    manifest: Annotated[Path, typer.Option(help="Cuts to train on.")],
    criterion: Annotated[list[str] | None, typer.Option(help="Repeatable. [default: all]")] = None,
    seconds: Annotated[float, typer.Option(help="Audio in a step.")] = 60.0,
    steps: int = 6,
    threads: int = 1,
    profile: Annotated[bool, typer.Option(help="Print where the time of the first criterion goes.")] = False,
) -> None:
    torch.set_num_threads(threads)
    world = World(0, 1, torch.device("cpu"))
    tasks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / TOKENIZER).write_bytes(open_run(parent).tokenizer_path.read_bytes())
        for name in criterion or ALL:
            values = {"criterion": name, "data": {"max_duration": seconds, "num_workers": 0}}
            settings = from_dict(SequenceTrainConfig, values, "benchmark")
            batches = training_batches(manifest, settings.data, out, 1, settings.seed)
            run: Any = SimpleNamespace(path=out, world=world, note=print)
            prepare(settings, parent, run, batches)
            tasks[name] = build_task(settings, parent, out, batches)
        ordinary = build_task(from_dict(SequenceTrainConfig, {}, "benchmark"), parent, out, batches)
        loss = from_dict(SequenceTrainConfig, {}, "benchmark").loss
        tasks = {
            "ordinary": SimpleNamespace(
                **{**vars(ordinary), "loss": lambda model, batch, step: asr_loss(model, batch, step, loss)}
            ),
            **tasks,
        }
        loaded = {number: (batches[number], 0.0) for number in range(steps)}
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for number in range(steps):
            for name, task in tasks.items():
                began = time.process_time()
                compute_gradients(task, task.model, loaded, [number], 1, Arithmetic(torch.device("cpu")))
                times[name].append(time.process_time() - began)
        if profile:
            with torch.profiler.profile(with_stack=False) as trace:
                name = (criterion or ALL)[0]
                compute_gradients(tasks[name], tasks[name].model, loaded, [1], 1, Arithmetic(torch.device("cpu")))
            print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))
    base = statistics.median(times["ordinary"][1:])
    for name, spent in times.items():
        median = statistics.median(spent[1:])
        print(f"{name:12s} {median:7.3f} s a step, {median / base:5.2f} times an ordinary one")


if __name__ == "__main__":
    typer.run(main)
