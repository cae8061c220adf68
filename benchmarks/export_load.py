"""What sherpa-onnx takes to load exported directories (transducers for whole recordings), and to decode with them, one thread.

Each is loaded in a process of its own; memory is the most that process had after loading, less that of one which only
imported the client. Seconds are of processor time; the directories take turns, and the smallest of the rounds counts, but
for memory the largest.

    python benchmarks/export_load.py exp/onnx exp/onnx-int4
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path, help="of asrkit export")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.directories)))
        return
    found: dict[Path, list[dict[str, float]]] = {path: [] for path in options.directories}
    empty = 0.0
    for _ in range(options.rounds):
        empty = max(empty, in_a_process()["memory"])
        for path, rounds in found.items():
            rounds.append(in_a_process(path))
    print(f"{'directory':30} {'encoder MB':>10} {'memory MB':>10} {'load s':>7} {'5 s in ms':>10} {'0.75 s':>7}")
    for path, rounds in found.items():
        least = {name: min(one[name] for one in rounds) for name in rounds[0]}
        size, memory = (path / "encoder.onnx").stat().st_size / 1e6, max(one["memory"] for one in rounds) - empty
        line = f"{str(path)[-30:]:30} {size:10.1f} {memory:10.0f} {least['load']:7.2f}"
        print(f"{line} {1000 * least['long']:10.1f} {1000 * least['short']:7.1f}")


def in_a_process(*directory: Path) -> dict[str, float]:
    """What ``measure`` finds in a new process."""
    arguments = [sys.executable, __file__, "--one", *map(str, directory)]
    found: dict[str, float] = json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE).stdout)
    return found


def measure(path: Path | None = None) -> dict[str, float]:
    """Memory of this process in MB, and the seconds it takes to load a directory and to decode long and short noise."""
    import numpy as np
    import sherpa_onnx

    if path is None:
        return {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    began = time.process_time()
    files = {name: str(path / f"{name}.onnx") for name in ("encoder", "decoder", "joiner")}
    recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(**files, tokens=str(path / "tokens.txt"), num_threads=1)
    load = time.process_time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    noise = 0.05 * np.random.default_rng(1).standard_normal(5 * 16000).astype(np.float32)

    def decode(samples: np.ndarray) -> float:
        stream = recognizer.create_stream()
        stream.accept_waveform(16000, samples)
        began = time.process_time()
        recognizer.decode_stream(stream)
        return time.process_time() - began

    decode(noise)
    long, short = min(decode(noise) for _ in range(6)), min(decode(noise[:12000]) for _ in range(12))
    return {"memory": memory, "load": load, "long": long, "short": short}


if __name__ == "__main__":
    main()
