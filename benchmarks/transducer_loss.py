"""Time and peak memory of the transducer losses, forward and backward, on shapes of LibriSpeech.

A batch holds 10,000 encoder frames (T' after subsampling by 4, summed over the padded utterances: what the
loss sees, and what gives memory of the size published with Kuang et al. 2022). Batches are sorted by
duration: lengths differ by at most a tenth. A step is the joiner (tanh, then a linear layer to the
vocabulary) and the loss, from projected encoder and predictor outputs. Every case runs in its own process, so
that its peak memory, above that of the inputs, is its own; cases take turns; medians are printed. On a shared
machine compare the CPU seconds, which waiting for a core does not lengthen.

    python benchmarks/transducer_loss.py
    python benchmarks/transducer_loss.py --shape 200x50 --loss k2-pruned --loss torch-pruned --repeats 5
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

LOSSES = ("k2-pruned", "torch-pruned", "k2-full", "torch-full")
SHAPES = ("100x20", "200x50", "400x100")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", action="append", choices=LOSSES, help="default: all")
    parser.add_argument("--shape", action="append", metavar="TxU", help=f"default: {', '.join(SHAPES)}")
    parser.add_argument("--frames", type=int, default=10_000, help="encoder frames a batch (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=500)
    parser.add_argument("--joiner-dim", type=int, default=512)
    parser.add_argument("--prune-range", type=int, default=5)
    parser.add_argument("--device", action="append", choices=("cpu", "cuda"), help="default: all there are")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a process, after one untimed")
    parser.add_argument("--repeats", type=int, default=3, help="processes per case, taking turns with the others")
    parser.add_argument("--one-case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_case:
        print(json.dumps(measure(options, *options.one_case.split())))
        return

    import torch

    losses = options.loss or [x for x in LOSSES if importlib.util.find_spec("k2") or not x.startswith("k2")]
    devices = options.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.frames} frames a batch, ", end="")
    print(f"V {options.vocab_size}, J {options.joiner_dim}, S {options.prune_range}, float32")
    print(
        f"{'device':6} {'T x U':>9} {'batch':>5}  {'loss':12} "
        f"{'seconds':>8} {'min':>8} {'max':>8} {'CPU s':>8} {'peak MB':>8}"
    )
    for device in devices:
        for shape in options.shape or SHAPES:
            results: dict[str, list[dict]] = {loss: [] for loss in losses}
            for _ in range(options.repeats):
                for loss in losses:
                    results[loss].append(run_alone(options, f"{device} {shape} {loss}"))
            for loss, found in results.items():
                batch = options.frames // int(shape.split("x")[0])
                print(f"{device:6} {shape:>9} {batch:5}  {loss:12} {summary(found)}", flush=True)


def summary(found: list[dict]) -> str:
    failed = [one["error"] for one in found if "error" in one]
    if failed:
        return failed[0]
    seconds = [second for one in found for second in one["seconds"]]
    cpu = statistics.median(second for one in found for second in one["cpu_seconds"])
    peak = statistics.median(one["peak_mb"] for one in found)
    return f"{statistics.median(seconds):8.3f} {min(seconds):8.3f} {max(seconds):8.3f} {cpu:8.3f} {peak:8.0f}"


def run_alone(options: argparse.Namespace, case: str) -> dict:
    """Measure one case in a fresh process; {"error": ...} when it does not end well (memory)."""
    command = [sys.executable, __file__, "--one-case", case]
    for name in ("frames", "vocab_size", "joiner_dim", "prune_range", "threads", "steps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": f"exit {done.returncode}: {lines[-1] if lines else 'killed, out of memory?'}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, device: str, shape: str, loss: str) -> dict:
    """Return seconds per step and the peak memory in MB above that of the inputs."""
    import torch

    torch.set_num_threads(options.threads)
    frames, symbols = (int(x) for x in shape.split("x"))
    step = make_step(options, device, frames, symbols, loss)
    before = peak_bytes(device)
    seconds, cpu_seconds = [], []
    for _ in range(options.steps + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "seconds": seconds[1:],
        "cpu_seconds": cpu_seconds[1:],
        "peak_mb": (peak_bytes(device) - before) / 1e6,
    }


def peak_bytes(device: str) -> int:
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_step(options: argparse.Namespace, device: str, frames: int, symbols: int, loss: str) -> Callable[[], None]:
    """Return a function that computes a loss from fixed inputs and all gradients."""
    import torch

    from asrkit.losses import transducer

    torch.manual_seed(0)
    batch = options.frames // frames
    dim, vocab = options.joiner_dim, options.vocab_size
    lens = torch.randint(frames - frames // 10, frames + 1, (batch,))
    symbol_lens = torch.randint(symbols - symbols // 10, symbols + 1, (batch,))
    lens[0], symbol_lens[0] = frames, symbols
    y = torch.randint(1, vocab, (batch, symbols)).to(device)
    lens, symbol_lens = lens.to(device), symbol_lens.to(device)
    linear = torch.nn.Linear(dim, vocab).to(device)
    leaves = [
        torch.randn(batch, length, width).to(device).requires_grad_()
        for length, width in ((frames, dim), (symbols + 1, dim), (frames, vocab), (symbols + 1, vocab))
    ]
    encoder, predictor, encoder_logits, predictor_logits = leaves

    def joiner(enc: torch.Tensor, dec: torch.Tensor) -> torch.Tensor:
        return linear((enc + dec).tanh())

    def full(backend: transducer.Backend) -> torch.Tensor:
        logits = joiner(encoder.unsqueeze(2), predictor.unsqueeze(1))
        return transducer.full_loss(logits, y, lens, symbol_lens, backend).sum()

    def torch_pruned() -> torch.Tensor:
        simple, pruned, *_ = transducer.transducer_loss(
            encoder,
            predictor,
            joiner,
            encoder_logits,
            predictor_logits,
            y,
            lens,
            symbol_lens,
            prune_range=options.prune_range,
            backend="torch",
        )
        return (0.5 * simple + pruned).sum()

    def k2_pruned() -> torch.Tensor:
        """As k2's users call it, nothing of asrkit."""
        import k2

        zeros = torch.zeros_like(lens)
        boundary = torch.stack([zeros, zeros, symbol_lens, lens], dim=1)
        simple, (px_grad, py_grad) = k2.rnnt_loss_smoothed(
            lm=predictor_logits,
            am=encoder_logits,
            symbols=y,
            termination_symbol=0,
            lm_only_scale=0.25,
            am_only_scale=0.0,
            boundary=boundary,
            reduction="sum",
            return_grad=True,
        )
        ranges = k2.get_rnnt_prune_ranges(px_grad, py_grad, boundary, options.prune_range)
        logits = joiner(*k2.do_rnnt_pruning(encoder, predictor, ranges))
        return 0.5 * simple + k2.rnnt_loss_pruned(logits, y, ranges, 0, boundary, reduction="sum")

    computes: dict[str, Callable[[], torch.Tensor]] = {
        "k2-pruned": k2_pruned,
        "torch-pruned": torch_pruned,
        "k2-full": partial(full, "k2"),
        "torch-full": partial(full, "torch"),
    }
    compute = computes[loss]

    def step() -> None:
        for tensor in (*leaves, *linear.parameters()):
            tensor.grad = None
        compute().backward()

    return step


if __name__ == "__main__":
    main()
