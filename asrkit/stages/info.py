"""info: what a run directory holds, how it came about, and how good it is known to be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from asrkit.config import to_dict
from asrkit.errors import UserError
from asrkit.models.asr import spec_of
from asrkit.models.lm import is_language_model
from asrkit.models.spec import ModelSpec
from asrkit.nn.context import parse_context
from asrkit.reporting.results import read_results
from asrkit.run_dir import WEIGHTS, RunDir, open_run, sha256_of

# Beside the encoder, what recognizing needs; the rest only serves training.
DECODER = ("predictor", "joiner", "ctc_head")
BEST = ("manifest", "manifest_sha256", "context", "method", "beam", "wer", "words")


def describe_run(path: Path) -> dict[str, Any]:
    """Stages, parameters by part, sub-models, variants and evaluations of a run directory, as plain data; of a language
    model, which has no variants, the rest.

    Raises:
        UserError: the directory is incomplete or damaged.
    """
    run = open_run(path)
    spec = None if is_language_model(run) else spec_of(run)
    parts = _parts(run)
    evaluations = _evaluations(run)
    return {
        "path": str(path),
        "stages": run.lineage,
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts),
        "bytes": (run.path / WEIGHTS).stat().st_size,
        "vocabulary": run.model_spec.get("vocab_size"),
        "features": run.model_spec.get("features"),
        "languages": [] if spec is None else spec.languages,
        "submodels": [] if spec is None else _submodels(spec, parts),
        "variants": [] if spec is None else _variants(spec, parts, evaluations),
        "evaluations": evaluations,
        "compression": None if spec is None else _compression(run, spec),
    }


def _compression(run: RunDir, spec: ModelSpec) -> dict[str, Any] | None:
    """What each part takes when stored for use, and which linear layers stayed float; None where nothing is compressed."""
    if not spec.compression:
        return None
    from asrkit.models import load_model
    from asrkit.models.compression import linear_layers
    from asrkit.models.sizes import sizes

    model = load_model(run)
    return {
        "parts": [{"part": name, **row} for name, row in sorted(sizes(model).items())],
        "layers": {path: {"bits": how.weights and how.weights.bits, "masked": how.mask is not None}
                   for path, how in spec.compression.items()},
        "float_layers": [path for path in linear_layers(model) if path not in spec.compression],
    }  # fmt: skip


def _parts(run: RunDir) -> list[dict[str, Any]]:
    """Parameters, statistics included, and bytes of each part, from the file's header alone.

    The encoder's are ``backbone`` and, for each sub-model, ``submodel NAME``.
    """
    from safetensors import SafetensorError, safe_open

    parts: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(run.path / WEIGHTS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no iteration)
                tensor = file.get_slice(name)
                size = math.prod(tensor.get_shape())
                part = parts.setdefault(_part_of(name), {"parameters": 0, "bytes": 0})
                part["parameters"] += 0 if name.endswith(".mask") else size
                part["bytes"] += size * _bytes_of(tensor.get_dtype())
    except SafetensorError as error:
        raise UserError(f"{run.path / WEIGHTS}: not a safetensors file ({error}); restore it") from error
    return [{"part": name, **part} for name, part in sorted(parts.items())]


def _part_of(tensor: str) -> str:
    """``joiner`` of ``joiner.out.weight``."""
    first, *rest = tensor.split(".")
    if first == "heads":
        return f"head {rest[0]} (training only)"
    if first != "encoder":
        return first
    return _submodel(rest[1]) if rest[0] == "submodels" else "backbone"


def _submodel(name: str) -> str:
    return f"submodel {name}"


def _bytes_of(dtype: str) -> int:
    """4 of ``F32``, 1 of ``I8``, 2 of ``BF16``: the digits are bits."""
    return max(1, int("".join(filter(str.isdigit, dtype)) or 8) // 8)


def _submodels(spec: ModelSpec, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sub-model's make and size."""
    sizes = {part["part"]: part["parameters"] for part in parts}
    return [
        {
            "submodel": name,
            "kind": part.kind,
            "layers": part.layers,
            "position": part.position,
            "dim": part.dim,
            "heads": part.heads if part.kind == "attention" else None,
            "context": part.context,
            "parameters": sizes.get(_submodel(name), 0),
        }
        for name, part in spec.submodels.items()
    ]


def _variants(spec: ModelSpec, parts: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each operating point: what is active, what it weighs when it runs, where it was trained, how good it is known to be.

    ``best`` holds the lowest WER measured with the present weights for each manifest.
    """
    sizes = {part["part"]: part["parameters"] for part in parts}
    rows = []
    for name, variant in spec.variants.items():
        running = ["backbone", *DECODER, *map(_submodel, variant.submodels)]
        best: dict[str, dict[str, Any]] = {}
        for row in evaluations:
            known = row["current"] and row["variant"] == name and row["wer"] is not None
            content = row["manifest_sha256"] or row["manifest"]  # two of one name are two
            if known and row["wer"] < best.get(content, {"wer": math.inf})["wer"]:
                best[content] = {key: row[key] for key in BEST}
        rows.append(
            {
                "variant": name,
                "default": name == spec.variant,
                "submodels": variant.submodels,
                "parameters": sum(sizes.get(part, 0) for part in running),
                "contexts": [
                    {"context": text, "latency_ms": parse_context(text).latency_ms} for text in variant.contexts
                ],
                "best": list(best.values()),
            }
        )
    return rows


def _evaluations(run: RunDir) -> list[dict[str, Any]]:
    """What ``evaluate`` left in the run directory; ``current`` where it was these very weights."""
    weights = sha256_of(run.path / WEIGHTS)
    return [
        {
            "manifest": result.manifest,
            "manifest_sha256": result.manifest_sha256,
            "variant": result.variant,
            "context": result.context,
            "method": result.method,
            "beam": result.beam,
            "wer": result.total.wer,
            "cer": result.total.cer,
            "words": result.total.words,
            "emission_latency": None if result.emission_latency is None else to_dict(result.emission_latency),
            "real_time_factor": result.real_time_factor,
            "current": result.weights_sha256 == weights,
        }
        for result in read_results(run.path)
    ]
