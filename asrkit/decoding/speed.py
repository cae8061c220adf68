"""How fast a model on disk recognizes and what memory that takes, in a process of its own with its own number of threads.

Made-up sound: the time of a transducer's greedy search depends little on what it recognizes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from asrkit.decoding.acoustic import EncoderOutput
from asrkit.decoding.recognizer import load_recognizer
from asrkit.decoding.search import search
from asrkit.errors import UserError
from asrkit.frames import FRAME_SHIFT, LOOK_AHEAD, count_window
from asrkit.nn.context import Context, parse_context

UTTERANCE = 1003  # feature frames of 10 s
WARM_UP = 3  # utterances or chunks before the clock runs


@dataclass(frozen=True)
class Speed:
    """real_time_factor: seconds of computation for a second of sound. pieces: seconds of each utterance of 10 s, or of each
    chunk, encoder and greedy search. memory_mb: by which the process grew, at most, over what it was before the model."""

    real_time_factor: float
    pieces: list[float]
    memory_mb: float


def measure_speed(path: Path, variant: str | None, context: Context, seconds: float = 30.0, threads: int = 1) -> Speed:
    """Run a model of a run directory or an exported one on ``seconds`` of sound, one stream, on the CPU.

    Raises:
        UserError: the process failed, for the reason it gives.
    """
    options = {"path": str(path), "variant": variant, "context": str(context), "seconds": seconds}
    command = [sys.executable, "-m", "asrkit.decoding.speed", json.dumps({**options, "threads": threads})]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{path.name}: cannot be measured: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return Speed(**json.loads(done.stdout))


def _measure(path: str, variant: str | None, context: str, seconds: float, threads: int) -> Speed:
    torch.set_num_threads(threads)
    before = _peak_mb(reset=True)
    recognizer = load_recognizer(Path(path), "cpu", variant, parse_context(context), ["greedy"])
    model, chunk = recognizer.model, recognizer.context.chunk
    length = UTTERANCE if chunk is None else count_window(chunk)
    random = torch.Generator().manual_seed(1)
    caches = None if chunk is None else model.start(1)
    pieces: list[float] = []
    audio_seconds = 0.0
    for number in range(WARM_UP + max(1, round(seconds / (FRAME_SHIFT * (length - LOOK_AHEAD))))):
        features = 3.0 * torch.randn(1, length, 80, generator=random) - 8.0
        began = time.perf_counter()
        encoded: EncoderOutput
        if chunk is None:
            encoded = model.encode(features, torch.tensor([length]))
        else:
            encoded, caches = model.step(features, caches)
        search(model, encoded, "greedy")
        if number >= WARM_UP:
            pieces.append(time.perf_counter() - began)
            audio_seconds += FRAME_SHIFT * (length - LOOK_AHEAD)
    return Speed(sum(pieces) / audio_seconds, pieces, _peak_mb() - before)


def _peak_mb(reset: bool = False) -> float:
    """The most memory the process has had since the last reset, or, where the system cannot reset it, ever."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_measure(**json.loads(sys.argv[1])))))
    except UserError as wrong:
        sys.exit("; ".join(wrong.lines))
