"""info: what a run directory holds, how it came about, and how good it is known to be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from asrkit.errors import UserError
from asrkit.run_dir import WEIGHTS, RunDir, open_run, sha256_of


def describe_run(path: Path) -> dict[str, Any]:
    """Stages, parameters by part, vocabulary, features and evaluations of a run directory, as plain data.

    Raises:
        UserError: the directory is incomplete or damaged.
    """
    run = open_run(path)
    parts = _parts(run)
    return {
        "path": str(path),
        "stages": run.lineage,
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts),
        "bytes": (run.path / WEIGHTS).stat().st_size,
        "vocabulary": run.model_spec.get("vocab_size"),
        "features": run.model_spec.get("features"),
        "configurations": run.model_spec.get("configurations", {}),
        "evaluations": _evaluations(run),
    }


def _parts(run: RunDir) -> list[dict[str, Any]]:
    """Parameters, buffers included, and bytes of each top-level part, from the file's header alone."""
    from safetensors import SafetensorError, safe_open

    parts: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(run.path / WEIGHTS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no iteration)
                tensor = file.get_slice(name)
                size = math.prod(tensor.get_shape())
                part = parts.setdefault(name.partition(".")[0], {"parameters": 0, "bytes": 0})
                part["parameters"] += size
                part["bytes"] += size * _bytes_of(tensor.get_dtype())
    except SafetensorError as error:
        raise UserError(f"{run.path / WEIGHTS}: not a safetensors file ({error}); restore it") from error
    return [{"part": name, **part} for name, part in sorted(parts.items())]


def _bytes_of(dtype: str) -> int:
    """4 of ``F32``, 1 of ``I8``, 2 of ``BF16``: the digits are bits."""
    return max(1, int("".join(filter(str.isdigit, dtype)) or 8) // 8)


def _evaluations(run: RunDir) -> list[dict[str, Any]]:
    """What ``evaluate`` left in the run directory; ``current`` where it was these very weights."""
    weights = sha256_of(run.path / WEIGHTS)
    found = []
    for file in sorted(run.path.glob("evaluation/*/result.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            found.append(
                {
                    "manifest": result["manifest"],
                    "method": result["method"],
                    "wer": result["total"]["wer"],
                    "cer": result["total"]["cer"],
                    "words": result["total"]["words"],
                    "real_time_factor": result["real_time_factor"],
                    "current": result["weights_sha256"] == weights,
                }
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not a result of evaluate ({error}); delete it") from error
    return found
