"""What a report lets people hear and see of utterances: MP3, which every browser plays, and a spectrogram."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse.cut import Cut, MonoCut
from matplotlib import colormaps
from PIL import Image

from asrkit.data.cut_audio import CutError, cut_samples
from asrkit.data.features import fbank
from asrkit.errors import clip
from asrkit.frames import SAMPLE_RATE

LONGEST = 60.0  # seconds of an utterance that is embedded
MOST_BYTES = 6_000_000  # of all sounds and spectrograms together
QUANTILES = (0.02, 0.995)  # of the energies, for black and white


def to_embed(errors: Sequence[Sequence[int]], count: int, seed: int = 0) -> list[int]:
    """The utterances to embed, by number: the ``count`` worst, taking those of each system in turn, and as many at random.

    Args:
        errors: (systems, utterances).
    """
    if not errors or not count:
        return []
    ranked = [sorted(range(len(row)), key=lambda index: -row[index]) for row in errors]
    worst = list(dict.fromkeys(chain.from_iterable(zip_longest(*ranked))))[:count]
    others = sorted(set(range(len(errors[0]))) - set(worst))
    drawn = np.random.default_rng(seed).permutation(len(others))[:count]
    return [*worst, *(others[index] for index in sorted(drawn))]


def embed(cuts: Iterable[Cut]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """By cut id, ``audio`` and ``picture`` as base64 of MP3 and PNG; and a line for each cut that cannot be embedded."""
    embedded: dict[str, dict[str, Any]] = {}
    problems, spent = [], 0
    for cut in cuts:
        if cut.duration > LONGEST:
            problems.append(f"{clip(cut.id)}: is {cut.duration:.0f} s long, so its sound is not embedded")
            continue
        try:
            samples = cut_samples(cut).numpy()
        except CutError as error:
            problems.append(str(error))
            continue
        made = {"audio": _base64(_mp3(samples)), "picture": _base64(_spectrogram(samples))}
        spent += sum(map(len, made.values()))
        if spent > MOST_BYTES:
            problems.append(f"{clip(cut.id)} and those after it: the sounds before take {MOST_BYTES:,} bytes already")
            break
        embedded[cut.id] = made
    return embedded, problems


def _mp3(samples: np.ndarray) -> bytes:
    written = io.BytesIO()
    soundfile.write(written, samples.clip(-1.0, 1.0), SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return written.getvalue()


def _spectrogram(samples: np.ndarray) -> bytes:
    """PNG of the log-mel energies that the model sees: 80 rows, low frequencies at the bottom, a column each 10 ms."""
    import torch

    energies = fbank(torch.from_numpy(samples)).numpy()
    low, high = np.quantile(energies, QUANTILES)
    levels = ((energies - low) / max(1e-6, high - low)).clip(0, 1) * 255
    image = Image.fromarray(np.ascontiguousarray(levels.T[::-1]).astype(np.uint8), mode="P")
    image.putpalette((colormaps["magma"](np.arange(256))[:, :3] * 255).astype(np.uint8).tobytes())
    written = io.BytesIO()
    image.save(written, "PNG", optimize=True)
    return written.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def file_of(cut: Cut) -> dict[str, Any]:
    """Where a browser on this machine finds the sound of a cut: ``path``, and ``uri`` if the file is there; {} if it is not a stretch of one file."""
    if not isinstance(cut, MonoCut) or not cut.has_recording or len(cut.recording.sources) != 1:
        return {}
    (source,) = cut.recording.sources
    if source.type != "file" or cut.recording.transforms:
        return {}
    path = Path(str(source.source)).absolute()
    if not path.is_file():
        return {"path": str(path)}
    return {"path": str(path), "uri": f"{path.as_uri()}#t={cut.start:.3f},{cut.end:.3f}"}


def said_words(cut: Cut) -> list[tuple[str, float, float]]:
    """The aligned words of a cut with the seconds of the cut they begin and end at; [] without word alignments."""
    words: list[tuple[str, float, float]] = []
    for supervision in cut.supervisions:
        alignment: Mapping[str, Any] = supervision.alignment or {}
        words += [
            (item.symbol.strip(), round(item.start - cut.start, 3), round(item.end - cut.start, 3))
            for item in alignment.get("word", [])
            if item.symbol.strip()
        ]
    return sorted(words, key=lambda word: word[1])
