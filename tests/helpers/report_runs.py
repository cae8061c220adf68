"""A chain of small run directories with curves and evaluations, for reports; its texts try to be more than texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from asrkit.config import to_dict
from asrkit.data.manifests import digest_of, make_cut, write_cuts
from asrkit.reporting.results import RESULT, UTTERANCES, Result, summarize, utterance_line
from asrkit.reporting.wer import Scored
from asrkit.run_dir import CONFIG, LINEAGE, WEIGHTS, digests_of, read_yaml, sha256_of, write_yaml
from helpers.small_runs import noise, write_run

# Each would show up as a dialog, an image or a request if any part of it were taken for markup, a script or a formula.
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=http://example.invalid/x.png onerror=alert(2)>",
    "'\"><svg/onload=alert(3)>",
    "$\\frac{$ {{ 7*7 }} {% raw %}",
]


def write_manifest(folder: Path, count: int = 12) -> Path:
    """A manifest of noise with a hostile id, speaker and text among its cuts."""
    random = np.random.default_rng(0)
    cuts = []
    for number in range(count):
        file = folder / f"{number}.wav"
        soundfile.write(file, noise(random, 16000 + 1600 * number), 16000)
        hostile = HOSTILE[number] if number < len(HOSTILE) else ""
        text = f"one two three {hostile} four".strip()
        cuts.append(
            make_cut(f"cut-{number} {hostile}".strip(), file, sampling_rate=16000, num_samples=16000 + 1600 * number,
                     text=text, language="en" if number % 2 else "fr", speaker=f"speaker {number % 3} {hostile}")
        )  # fmt: skip
    write_cuts(folder / "test.jsonl.gz", cuts)
    return folder / "test.jsonl.gz"


def write_evaluation(
    run: Path, manifest: Path, texts: list[tuple[str, str]], name: str, method: str = "greedy"
) -> None:
    """An evaluation by the run's present weights, of (cut id, reference) in which utterance i loses its first i % 4 words."""
    utterances = []
    for number, (cut_id, ref) in enumerate(texts):
        words = ref.split()[number % 4 if method == "greedy" else 0 :]
        speaker = f"speaker {number % 3}"
        pieces = tuple(f"▁{word}" for word in words)
        late = tuple(100.0 + number for _ in words)
        frames = tuple(range(0, 2 * len(words), 2))
        utterances.append(
            Scored(cut_id, ref, " ".join(words), "en" if number % 2 else "fr", speaker, pieces, frames, late)
        )
    result = Result(
        run=str(run), weights_sha256=sha256_of(run / WEIGHTS), variant="backbone", context="full", latency_ms=None,
        manifest=str(manifest), manifest_sha256=digest_of(manifest), method=method, beam=None, total=summarize(utterances),
        languages={}, emission_latency=None, audio_seconds=1.0, decode_seconds=1.0, real_time_factor=0.1, device="cpu",
        threads=1, warnings=[],
    )  # fmt: skip
    directory = run / "evaluation" / name
    directory.mkdir(parents=True)
    (directory / RESULT).write_text(json.dumps(to_dict(result)))
    (directory / UTTERANCES).write_text("".join(map(utterance_line, utterances)), encoding="utf-8")


def write_chain(folder: Path, manifest: Path, texts: list[tuple[str, str]]) -> list[Path]:
    """Two run directories, the second made from the first, with curves and evaluations."""
    first, second = folder / "first", folder / "second"
    layers = {
        "encoder.blocks.0.feedforward1.widen": {
            "weights": {"bits": 4, "scale": "channel"}, "mask": {"keep": 2, "group": 4}
        }
    }  # fmt: skip
    for run, spec in ((first, None), (second, {"compression": layers})):
        run.mkdir(parents=True)
        write_run(run, spec)
    history = [
        {**read_yaml(first / LINEAGE)[0], "command": HOSTILE[0], "manifests": {str(manifest): digest_of(manifest)}}
    ]
    write_yaml(first / LINEAGE, history)
    config: dict[str, Any] = {"stage": "qat", "from": "first", "training": {"steps": 7}, HOSTILE[1]: HOSTILE[2]}
    write_yaml(second / CONFIG, config)
    entry = {"stage": "qat", "command": "asrkit qat", "seconds": 2.0, "metrics": {"wer": 0.4}, **digests_of(second)}
    write_yaml(second / LINEAGE, [*history, entry])
    for run in (first, second):
        rows = [
            {"step": step, "loss": 1 / step, "lr": 0.1, "timing": {"audio_per_second": 9.0}} for step in range(1, 9)
        ]
        rows.append({"step": 8, "dev_wer": 0.5, f"\x01 {HOSTILE[1]} {HOSTILE[3]}": 1.0})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "lo')
        write_evaluation(run, manifest, texts, "test-greedy")
    write_evaluation(second, manifest, texts, "test-ctc", method="ctc")
    return [first, second]
