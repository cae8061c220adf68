"""Real-time factor, memory and latency of an exported model in onnxruntime, in float32 and in integers, beside float torch.

Offline: utterances of 10 s, one at a time. Streaming: one stream, chunk by chunk; a chunk's latency is what the computation
adds to the sound's own length. Encoder and greedy search; torch computes the CTC head as well, which onnxruntime has in a
file of its own. Untrained weights (of --size), which take as long as trained ones but for the tokens emitted; or a run
directory of your own, of float weights, with --from. Each case runs in a process of its own, cases take turns, and the
rounds are pooled. On a shared machine compare the minima.

    python benchmarks/export_rtf.py
    python benchmarks/export_rtf.py --size tiny --size small --threads 1 --seconds 60 --rounds 5
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

CHUNK, LEFT = 16, 64
SYSTEMS = ("torch", "float32", "int8", "int4", "dynamic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="run", type=Path, help="a run directory instead of --size")
    parser.add_argument("--variant", help="of --from")
    parser.add_argument("--size", action="append", choices=("tiny", "small", "medium", "large"), help="default: small")
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="default: all")
    parser.add_argument("--threads", action="append", type=int, help="default: 1 and 2")
    parser.add_argument("--seconds", type=float, default=40.0, help="of sound in each case and round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    import onnxruntime
    import torch

    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, ", end="")
    print(f"{os.cpu_count()} processors; chunk={CHUNK},left={LEFT}; RTF is the smallest of {options.rounds} rounds")
    print(
        f"{'model':20} {'form':9} {'by':8} {'threads':>7} {'RTF':>8} {'MB':>6}  {'ms a chunk: median':>18} {'99th':>7}"
    )
    for size in options.size or ["small"]:
        with tempfile.TemporaryDirectory() as folder:
            run = options.run or make_run(Path(folder) / "run", size)
            name = run.name if options.run else size
            variants = [options.variant] if options.run else ["backbone", "near"]
            for variant in variants:
                compare(options, f"{name} {variant or ''}", run, variant, Path(folder))
        if options.run:
            break


def compare(options: argparse.Namespace, name: str, run: Path, variant: str | None, folder: Path) -> None:
    """Measure one variant in every form and print a line for each."""
    from asrkit.decoding.speed import Speed, measure_speed
    from asrkit.nn.context import FULL, Context
    from asrkit.stages.export import export

    for form, context in (("offline", FULL), ("streaming", Context(CHUNK, LEFT))):
        places = {}
        for system in options.system or SYSTEMS:
            places[system] = run if system == "torch" else folder / f"{form}-{variant}-{system}"
            if system != "torch":
                export(
                    run,
                    places[system],
                    variant=variant,
                    streaming=context.streaming,
                    chunk=context.chunk,
                    left=context.left if context.streaming else None,
                    quantize=None if system == "float32" else system,
                )
        for threads in options.threads or [1, 2]:
            found: dict[str, list[Speed]] = {system: [] for system in places}
            for _ in range(options.rounds):
                for system, path in places.items():
                    found[system].append(measure_speed(path, variant, context, options.seconds, threads))
            for system, rounds in found.items():
                rtf, memory = min(one.real_time_factor for one in rounds), max(one.memory_mb for one in rounds)
                line = f"{name:20} {form:9} {system:8} {threads:7} {rtf:8.4f} {memory:6.0f}"
                if context.streaming:
                    chunks = [1000 * second for one in rounds for second in one.pieces]
                    line += f"  {np.median(chunks):18.2f} {np.percentile(chunks, 99):7.2f}"
                print(line, flush=True)


def make_run(path: Path, size: str) -> Path:
    """A run directory of an untrained model: a backbone, and attention in its lower half."""
    import torch

    from asrkit.config import from_dict
    from asrkit.data.text.tokenizer import train_tokenizer
    from asrkit.models import SIZES, AsrModel, ModelSpec
    from asrkit.models.registry import write_model
    from asrkit.run_dir import CONFIG, LINEAGE, TOKENIZER, WEIGHTS, digests_of, write_yaml
    from asrkit.training.checkpoint import save_weights

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokenizer = train_tokenizer(
        [f"{a}{b} {b}{a}{c}" for a in letters for b in letters for c in letters], "bpe", 500, path / TOKENIZER
    )
    preset = SIZES[size]
    assert isinstance(preset["encoder"], dict)
    layers = list(range((preset["encoder"]["num_layers"] + 1) // 2))
    contexts = ["full", f"chunk={CHUNK},left={LEFT}"]
    near = {"kind": "attention", "layers": layers, "dim": preset["encoder"]["dim"], "heads": 4}
    spec = from_dict(
        ModelSpec,
        {
            **preset,
            "vocab_size": tokenizer.vocab_size,
            "submodels": {"near": near},
            "variants": {
                "backbone": {"contexts": contexts},
                "near": {"submodels": ["near"], "contexts": contexts},
            },
        },
        size,
    )
    torch.manual_seed(1)
    write_yaml(path / CONFIG, {"stage": "benchmark"})
    write_model(path, spec)
    save_weights(path / WEIGHTS, AsrModel(spec))
    entry = {"stage": "benchmark", "command": "benchmarks/export_rtf.py"}
    write_yaml(path / LINEAGE, [entry | digests_of(path)])
    return path


if __name__ == "__main__":
    main()
