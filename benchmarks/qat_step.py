"""What integers and masks cost a training step: CPU time of a compressed model's step over the float model's, one thread.

    python benchmarks/qat_step.py                          # `small`, 15 utterances of 4 s, 20 labels each
    python benchmarks/qat_step.py --size tiny --precision float32

The models take turns, step by step, so that whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Annotated, Any, cast

import torch
import typer

from asrkit.config import from_dict, to_dict
from asrkit.data.batch import Batch
from asrkit.models import SIZES, AsrModel, ModelSpec
from asrkit.models.compression import LayerChoice, choose_layers, compressed_layers
from asrkit.models.surgery import rebuild
from asrkit.nn.compression import find_mask
from asrkit.nn.compression_config import Compression
from asrkit.training.asr_loss import LossConfig, asr_loss
from asrkit.training.config import TrainingConfig, resolve_precision
from asrkit.training.optim import OptimizerConfig, make_optimizer

TWO_OF_FOUR = {"keep": 2, "group": 4}
SYSTEMS = {
    "float": {},
    "int8": {"weights": {"bits": 8}},
    "int4": {"weights": {"bits": 4}},
    "int4, fake": {"weights": {"bits": 4}, "product": "fake"},
    "int2, blocks of 64": {"weights": {"bits": 2, "symmetric": False, "scale": "block"}},
    "int4 + int8 inputs": {"weights": {"bits": 4}, "activations": {"bits": 8}},
    "2:4": {"mask": TWO_OF_FOUR},
    "int4 + 2:4": {"weights": {"bits": 4}, "mask": TWO_OF_FOUR},
}


def main(
    size: Annotated[str, typer.Option(help="tiny, small, medium or large.")] = "small",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    utterances: int = 15,
    seconds: float = 4.0,
    labels: int = 20,
    vocab_size: int = 500,
    threads: int = 1,
    device: str = "cpu",
    steps: int = 8,
) -> None:
    torch.set_num_threads(threads)
    place = torch.device(device)
    torch.manual_seed(0)
    origin = AsrModel(from_dict(ModelSpec, {"vocab_size": vocab_size, **SIZES[size]}, "benchmark"))
    dtype = resolve_precision(from_dict(TrainingConfig, {"precision": precision}, "benchmark"), place)
    frames = int(100 * seconds)
    names = [str(number) for number in range(utterances)]
    batch = Batch(
        torch.randn(utterances, frames, 80, device=place),
        torch.full((utterances,), frames, device=place),
        names,
        names,
        names,
        [seconds] * utterances,
        torch.randint(2, vocab_size, (utterances, labels), device=place),
        torch.full((utterances,), labels, device=place),
    )
    settings = from_dict(LossConfig, {"backend": "torch"}, "benchmark")
    models = {}
    for name, how in SYSTEMS.items():
        how_of_all = from_dict(Compression, cast(dict[str, Any], how), "benchmark")
        # Blocks of 64 leave out the layers they do not divide, as layers.indivisible=skip does.
        block = how_of_all.weights.block_size if how_of_all.weights and how_of_all.weights.scale == "block" else 1
        chosen = {
            path: to_dict(how_of_all)
            for path, layer in choose_layers(origin, LayerChoice()).items()
            if how and layer.in_features % block == 0
        }
        spec = from_dict(ModelSpec, {**to_dict(origin.spec), "compression": chosen}, "benchmark")
        model = rebuild(spec, origin).to(place).train()
        for layer in compressed_layers(model).values():
            if layer.how.mask is not None:
                layer.mask.copy_(find_mask(layer.weight.detach().abs(), layer.how.mask))
        models[name] = (model, make_optimizer(model.parameters(), OptimizerConfig(name="adamw")))
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(steps + 2):
        for name, (model, optimizer) in models.items():
            clock = time.process_time if place.type == "cpu" else time.perf_counter
            began = clock()
            with nullcontext() if dtype == torch.float32 else torch.autocast(place.type, dtype=dtype):
                output = asr_loss(model, batch, 10_000, settings)
            (output.losses.sum() / output.count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if place.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(clock() - began)
    plain = statistics.median(times["float"])
    print(
        f"torch {torch.__version__}, {device}, {threads} thread(s), {size}, {str(dtype).removeprefix('torch.')}; "
        f"{'CPU' if place.type == 'cpu' else 'wall'} time of a step, median of {steps} (least to most), over float's"
    )
    for name, measured in times.items():
        middle = statistics.median(measured)
        spread = f"{1e3 * min(measured):.0f} to {1e3 * max(measured):.0f}"
        print(f"{name:20s} {1e3 * middle:7.0f} ms ({spread})   {middle / plain:.2f}")


if __name__ == "__main__":
    typer.run(main)
