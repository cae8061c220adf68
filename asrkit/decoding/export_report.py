"""What ``export --report`` measures: errors of the files and of each part's integers alone, speed, and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lhotse.cut import Cut

from asrkit.data.batch import evaluation_batches
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import AcousticModel, TorchAcousticModel
from asrkit.decoding.evaluation import measure_wer
from asrkit.decoding.exported import ExportedAcousticModel
from asrkit.decoding.search import Method
from asrkit.decoding.speed import measure_speed
from asrkit.export.layers import active_layers
from asrkit.models.sizes import part_of
from asrkit.models.surgery import recompressed
from asrkit.reporting.machine import processor

METHODS: tuple[Method, ...] = ("greedy", "beam")
MAX_DURATION = 200.0  # seconds of padded audio decoded at once


def measure_export(
    directory: Path, original: TorchAcousticModel, files: ExportedAcousticModel, tokenizer: Tokenizer, cuts: list[Cut]
) -> dict[str, Any]:
    """WER of the files, of the model with float weights, and of each part compressed alone; speed and memory of the files.

    Args:
        directory: the export, complete but for this report; ``files`` are its.
    """
    model, variant, context = original.model, original.variant, original.context
    systems: dict[str, AcousticModel] = {"exported": files}
    how = model.spec.compression
    if how:
        systems["float"] = TorchAcousticModel(recompressed(model, {}), variant, context)
        for part in dict.fromkeys(map(part_of, active_layers(model, model.submodels_of(variant)))):
            alone = {path: one for path, one in how.items() if part_of(path) == part}
            systems[f"{part} alone"] = TorchAcousticModel(recompressed(model, alone), variant, context)
    rows = {}
    for name, system in systems.items():
        rates: dict[str, Any] = {}
        for method in METHODS:
            words, _, _ = measure_wer(system, evaluation_batches(cuts, MAX_DURATION), tokenizer, method=method)
            rates[method] = {
                "wer": words.rate if words.words else None,
                "errors": words.errors,
                "words": words.words,
            }
        rows[name] = rates
    speed = measure_speed(directory, variant, context)
    pieces = [1000 * seconds for seconds in speed.pieces]
    return {
        "systems": rows,
        "speed": {
            "real_time_factor": speed.real_time_factor,
            "peak_memory_mb": speed.memory_mb,
            "threads": 1,
            "piece_ms": {"median": float(np.median(pieces)), "99th": float(np.percentile(pieces, 99))},
            "processor": processor(),
        },
    }
