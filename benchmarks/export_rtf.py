"""Real-time factor and latency of an exported model in onnxruntime, beside the same model in torch.

Offline: the encoder over utterances of 10 s, one at a time, then greedy search. Streaming: one stream, chunk by chunk,
encoder and greedy search of each chunk; the latency of a chunk is what the computation adds to the sound's own length.
torch computes the CTC head as well, which onnxruntime has in a file of its own.
Untrained weights (of --size), which take as long as trained ones but for the tokens emitted; or a run directory of your
own with --from. Each case runs in a process of its own, cases take turns, and the rounds are pooled. On a shared machine
compare the minima.

    python benchmarks/export_rtf.py
    python benchmarks/export_rtf.py --size tiny --size small --threads 1 --seconds 60 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHUNK, LEFT = 16, 64
UTTERANCE = 1003  # feature frames of 10 s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="run", type=Path, help="a run directory instead of --size")
    parser.add_argument("--configuration", help="of --from")
    parser.add_argument("--size", action="append", choices=("tiny", "small", "medium", "large"), help="default: small")
    parser.add_argument("--threads", action="append", type=int, help="default: 1 and 2")
    parser.add_argument("--seconds", type=float, default=40.0, help="of sound in each case and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_case:
        print(json.dumps(measure(**json.loads(options.one_case))))
        return

    import onnxruntime
    import torch

    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, float32, ", end="")
    print(f"{os.cpu_count()} processors; chunk={CHUNK},left={LEFT}; RTF is the smallest of {options.rounds} rounds")
    print(f"{'model':20} {'form':9} {'by':11} {'threads':>7} {'RTF':>8}  {'ms a chunk: median':>18} {'99th':>7}")
    for size in options.size or ["small"]:
        with tempfile.TemporaryDirectory() as folder:
            run = options.run or make_run(Path(folder) / "run", size)
            name = run.name if options.run else size
            configurations = [options.configuration] if options.run else ["backbone", "near"]
            for configuration in configurations:
                compare(options, f"{name} {configuration or ''}", run, configuration, Path(folder))
        if options.run:
            break


def compare(options: argparse.Namespace, name: str, run: Path, configuration: str | None, folder: Path) -> None:
    """Measure one configuration in every form and print a line for each."""
    from asrkit.stages.export import export

    for form in ("offline", "streaming"):
        exported = folder / f"{form}-{configuration}"
        chunk, left = (CHUNK, LEFT) if form == "streaming" else (None, None)
        export(run, exported, configuration=configuration, streaming=form == "streaming", chunk=chunk, left=left)
        for threads in options.threads or [1, 2]:
            found: dict[str, list[dict]] = {"torch": [], "onnxruntime": []}
            for _ in range(options.rounds):
                for by, path in (("torch", run), ("onnxruntime", exported)):
                    case = {"path": str(path), "configuration": configuration, "form": form}
                    found[by].append(run_alone({**case, "threads": threads, "seconds": options.seconds}))
            for by, rounds in found.items():
                rtf = min(one["rtf"] for one in rounds)
                line = f"{name:20} {form:9} {by:11} {threads:7} {rtf:8.4f}"
                if form == "streaming":
                    chunks = sorted(second for one in rounds for second in one["chunks"])
                    last = chunks[min(len(chunks) - 1, int(0.99 * len(chunks)))]
                    line += f"  {1000 * statistics.median(chunks):18.2f} {1000 * last:7.2f}"
                print(line, flush=True)


def make_run(path: Path, size: str) -> Path:
    """A run directory of an untrained model: a backbone, and attention in its lower half."""
    import torch

    from asrkit.config import from_dict, to_dict
    from asrkit.data.tokenizer import train_tokenizer
    from asrkit.models import SIZES, AsrModel, ModelSpec
    from asrkit.run_dir import CONFIG, LINEAGE, MODEL, TOKENIZER, WEIGHTS, sha256_of, write_yaml
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
            "configurations": {
                "backbone": {"contexts": contexts},
                "near": {"submodels": ["near"], "contexts": contexts},
            },
        },
        size,
    )
    torch.manual_seed(1)
    write_yaml(path / CONFIG, {"stage": "benchmark"})
    write_yaml(path / MODEL, to_dict(spec))
    save_weights(path / WEIGHTS, AsrModel(spec))
    digests = {"weights_sha256": WEIGHTS, "model_spec_sha256": MODEL, "tokenizer_sha256": TOKENIZER}
    entry = {"stage": "benchmark", "command": "benchmarks/export_rtf.py"}
    write_yaml(path / LINEAGE, [entry | {key: sha256_of(path / name) for key, name in digests.items()}])
    return path


def run_alone(case: dict) -> dict:
    """One case in a process of its own, with no threads but those asked for."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(case["threads"])}
    command = [sys.executable, __file__, "--one-case", json.dumps(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def measure(path: str, configuration: str | None, form: str, threads: int, seconds: float) -> dict:
    """Seconds of computation for a second of sound, and of each chunk."""
    import torch

    from asrkit.decoding.acoustic import EncoderOutput
    from asrkit.decoding.recogniser import load_recogniser
    from asrkit.decoding.search import search
    from asrkit.nn.context import FULL, Context

    torch.set_num_threads(threads)
    context = FULL if form == "offline" else Context(CHUNK, LEFT)
    model = load_recogniser(Path(path), "cpu", configuration, context, ["greedy"]).model
    random = torch.Generator().manual_seed(1)
    times, heard = [], 0.0
    caches = model.start(1) if form == "streaming" else None  # type: ignore[attr-defined]
    warm = 3
    while heard < seconds:
        length = UTTERANCE if form == "offline" else 4 * CHUNK + 3
        features = 3.0 * torch.randn(1, length, 80, generator=random) - 8.0
        began = time.perf_counter()
        if form == "offline":
            encoded: EncoderOutput = model.encode(features, torch.tensor([length]))
        else:
            encoded, caches = model.step(features, caches)  # type: ignore[attr-defined]
        search(model, encoded, "greedy")
        taken = time.perf_counter() - began
        if warm:
            warm -= 1
            continue
        times.append(taken)
        heard += 0.01 * (length - 3)
    return {"rtf": sum(times) / heard, "chunks": times}


if __name__ == "__main__":
    main()
