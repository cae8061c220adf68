"""Seconds of audio trained on per second: forward, backward, clipping, optimizer; one thread, made-up speech.

    python benchmarks/train_throughput.py                        # 15 utterances of 4 s, 20 labels each, `small`
    python benchmarks/train_throughput.py --size tiny --precision float32 --features
    python benchmarks/train_throughput.py --profile              # where the time goes
    python benchmarks/train_throughput.py --pretrain             # the same encoder under the loss of `asrkit pretrain`

``--features`` counts computing the features from samples, as data loading does without worker processes.
"""

from __future__ import annotations

import resource
import statistics
import time
from contextlib import nullcontext
from typing import Annotated

import numpy as np
import torch
import typer

from asrkit.config import from_dict, to_dict
from asrkit.data.batch import Batch
from asrkit.data.features import fbank
from asrkit.data.masked_batches import masked
from asrkit.frames import SAMPLE_RATE
from asrkit.methods.pretraining import PretrainConfig, pretraining_loss
from asrkit.models import SIZES, AsrModel, ModelSpec
from asrkit.models.pretrained import PretrainedEncoder
from asrkit.models.registry import build
from asrkit.models.spec import PretrainedEncoderSpec
from asrkit.training.asr_loss import LossConfig, asr_loss
from asrkit.training.config import TrainingConfig, resolve_precision
from asrkit.training.optim import OptimizerConfig, make_optimizer
from asrkit.training.step import LossOutput


def main(
    size: Annotated[str, typer.Option(help="tiny, small, medium or large.")] = "small",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    optimizer: Annotated[str, typer.Option(help="adamw or scaled_adam.")] = "scaled_adam",
    backend: Annotated[str, typer.Option(help="Of the transducer loss: auto, k2 or torch.")] = "torch",
    utterances: int = 15,
    seconds: float = 4.0,
    labels: int = 20,
    vocab_size: int = 500,
    threads: int = 1,
    device: str = "cpu",
    steps: int = 10,
    features: Annotated[bool, typer.Option(help="Count the computing of features.")] = False,
    profile: Annotated[bool, typer.Option(help="Print the operators that take most of the time.")] = False,
    pretrain: Annotated[
        bool, typer.Option(help="The contrastive loss, with masks and distractors as in training.")
    ] = False,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    place = torch.device(device)
    settings = PretrainConfig()
    model: AsrModel | PretrainedEncoder
    if pretrain:
        content = {"encoder": SIZES[size]["encoder"], "objective": to_dict(settings.quantizer)}
        model = build(from_dict(PretrainedEncoderSpec, content, "benchmark")).to(place)
    else:
        model = AsrModel(from_dict(ModelSpec, {"vocab_size": vocab_size, **SIZES[size]}, "benchmark")).to(place)
    step_taker = make_optimizer(model.parameters(), from_dict(OptimizerConfig, {"name": optimizer}, "benchmark"))
    loss_settings = from_dict(LossConfig, {"backend": backend}, "benchmark")
    dtype = resolve_precision(from_dict(TrainingConfig, {"precision": precision}, "benchmark"), place)
    samples = 0.1 * torch.randn(utterances, int(seconds * SAMPLE_RATE))
    symbols = torch.randint(2, vocab_size, (utterances, labels), device=place)
    symbol_lens = torch.full((utterances,), labels, device=place)

    def batch() -> Batch:
        frames = torch.stack([fbank(row) for row in samples]).to(place)
        lens = torch.full((utterances,), frames.shape[1], device=place)
        names = [str(i) for i in range(utterances)]
        return Batch(frames, lens, names, names, names, [seconds] * utterances, symbols, symbol_lens)

    def loss(given: Batch) -> LossOutput:
        if not isinstance(model, PretrainedEncoder):
            return asr_loss(model, given, 10_000, loss_settings)
        # Masks and distractors are drawn where features are made: in the loader.
        hidden = masked(given, settings.mask, np.random.default_rng(0)).to(place) if features else ready_masked
        return pretraining_loss(model, hidden, 10_000, settings)

    ready = batch()
    ready_masked = masked(ready, settings.mask, np.random.default_rng(0)).to(place)

    def step() -> None:
        given = batch() if features else ready
        with nullcontext() if dtype == torch.float32 else torch.autocast(place.type, dtype=dtype):
            output = loss(given)
        total = output.losses.sum() / output.count
        (total if output.regularizer is None else total + output.regularizer).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        step_taker.step()
        step_taker.zero_grad(set_to_none=True)
        if place.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    audio = utterances * seconds
    parameters = sum(p.numel() for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"torch {torch.__version__}, {device}, {threads} thread(s), {size} ({parameters / 1e6:.1f} M), "
        f"{str(dtype).removeprefix('torch.')}, {optimizer}, {'contrastive' if pretrain else backend} loss, features {'in' if features else 'ex'}cluded:"
    )
    print(
        f"{audio / statistics.median(times):.1f} s of audio per second "
        f"(step: median {1e3 * statistics.median(times):.0f} ms, {1e3 * min(times):.0f} to {1e3 * max(times):.0f}); "
        f"peak memory of the process {peak:.0f} MB"
    )
    if profile:
        with torch.profiler.profile() as record:
            step()
        print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


if __name__ == "__main__":
    typer.run(main)
