"""A tiny corpus anyone can hear: each word is a chord, each utterance a few words. It stands in for speech where a
test is about machinery; recognition itself is tested on recordings."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment

WORDS = {"alpha": (300, 900), "bravo": (500, 1500), "carol": (700, 2100), "delta": (1000, 2800)}
RATE = 16000


def say(words: list[str], random: np.random.Generator) -> np.ndarray:
    """0.3 s of chord and 0.1 s of near-silence for each word, float32 at 16 kHz."""
    parts = []
    for word in words:
        time = np.arange(int(0.3 * RATE)) / RATE
        chord = sum(np.sin(2 * np.pi * pitch * time + random.uniform(0, 6)) for pitch in WORDS[word])
        parts += [0.1 * chord * np.hanning(len(time)), np.zeros(int(0.1 * RATE))]
    audio = np.concatenate(parts)
    return (audio + 1e-3 * random.standard_normal(len(audio))).astype(np.float32)


def make_corpus(folder: Path, count: int, seed: int = 0, name: str = "train", language: str = "xx") -> Path:
    """Write ``count`` utterances and their manifest; returns the manifest's path."""
    random = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    cuts = []
    for number in range(count):
        words = [str(word) for word in random.choice(list(WORDS), size=random.integers(2, 6))]
        path = folder / name / f"{number}.wav"
        soundfile.write(path, say(words, random), RATE)
        recording = Recording.from_file(path, recording_id=f"{name}-{number}")
        cut = recording.to_cut()
        cut.id = recording.id
        cut.supervisions = [
            SupervisionSegment(
                recording.id, recording.id, 0, recording.duration, text=" ".join(words), language=language
            )
        ]
        cuts.append(cut)
    manifest = folder / f"{name}.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(manifest)
    return manifest


def data(folder: Path) -> list[object]:
    """The options of a stage for the manifests ``train`` and ``dev`` of a folder."""
    return ["--manifest", folder / "train.jsonl.gz", "--dev", folder / "dev.jsonl.gz", "--max-duration", 20]


Change = Callable[[int, dict[str, Any]], None]


def rewrite(path: Path, change: Change) -> Path:
    """The manifest with ``change`` (number, cut as a dictionary) applied to each line, in place."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        cuts = [json.loads(line) for line in file]
    for number, cut in enumerate(cuts):
        change(number, cut)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(cut) + "\n" for cut in cuts)
    return path


def copied(folder: Path, path: Path, change: Change) -> Path:
    """A copy of a folder's ``train`` with ``change`` applied to each line."""
    shutil.copy(folder / "train.jsonl.gz", path)
    return rewrite(path, change)
