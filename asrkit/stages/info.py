"""info: what a run directory holds, how it came about, and how good it is known to be. Read from its files, without torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from asrkit.config import to_dict
from asrkit.disk import sha256_of
from asrkit.models.registry import ASR, NGRAM, kind_of, spec_of_kind
from asrkit.models.sizes import linear_paths, stored_sizes
from asrkit.models.spec import ModelSpec, NgramSpec
from asrkit.nn.context import parse_context
from asrkit.reporting.results import read_results
from asrkit.run_dir import RunDir, open_run

# Beside the encoder, what recognizing needs; the rest only serves training.
DECODER = ("predictor", "joiner", "ctc_head")
BEST = ("manifest", "manifest_sha256", "context", "search", "wer", "words")


def describe_run(path: Path) -> dict[str, Any]:
    """What a run directory holds, as plain data: its kind, stages, parameters by part, sub-models, variants, evaluations; of
    language models and pretrained encoders, which have no variants, the rest.

    Raises:
        UserError: the directory is incomplete or damaged.
    """
    run = open_run(path)
    kind_of(run)  # refuses one that this version does not know
    spec = spec_of_kind(run, run.kind)
    recognizer: ModelSpec | None = spec if run.kind == ASR else None
    parts = _ngrams(run, spec) if run.kind == NGRAM else _parts(run)
    evaluations = _evaluations(run)
    compression = None if recognizer is None else _compression(run, recognizer)
    return {
        "path": str(path),
        "kind": run.kind,
        "stages": run.lineage,
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts),
        "bytes": run.weights_path.stat().st_size,
        "vocabulary": run.model_spec.get("vocab_size"),
        "features": run.model_spec.get("features"),
        "languages": [] if recognizer is None else recognizer.languages,
        "submodels": [] if recognizer is None else _submodels(recognizer, parts),
        "variants": [] if recognizer is None else _variants(recognizer, parts, evaluations, compression),
        "evaluations": evaluations,
        "compression": compression,
    }


def _compression(run: RunDir, spec: ModelSpec) -> dict[str, Any] | None:
    """What each part takes when stored for use in each variant (``parts``: in the default one), and which linear layers stayed
    float; None where nothing is compressed."""
    if not spec.compression:
        return None
    by_variant = {
        name: [{"part": part, **row} for part, row in sorted(stored_sizes(run, spec, name).items())]
        for name in spec.variants
    }
    return {
        "parts": by_variant[spec.variant],
        "variants": by_variant,
        "layers": {path: {"bits": how.weights and how.weights.bits, "masked": how.mask is not None}
                   for path, how in spec.compression.items()},
        "float_layers": [path for path in linear_paths(run.tensor_shapes()) if path not in spec.compression],
    }  # fmt: skip


def _parts(run: RunDir) -> list[dict[str, Any]]:
    """Parameters, statistics included, and bytes of each part, from the file's header alone.

    An encoder's are ``backbone`` and, for each sub-model, ``submodel NAME``.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, (numbers, size) in run.tensor_sizes().items():
        part = parts.setdefault(_part_of(name), {"parameters": 0, "bytes": 0})
        masks = name.endswith((".mask", ".reach")) and not name.startswith("objective.")  # whose mask is a vector
        part["parameters"] += 0 if masks else numbers
        part["bytes"] += size
    return [{"part": name, **part} for name, part in sorted(parts.items())]


def _ngrams(run: RunDir, spec: NgramSpec) -> list[dict[str, Any]]:
    """The n-grams as a part; a back-off weight counts as a parameter."""
    size = run.weights_path.stat().st_size
    return [
        {"part": f"{spec.order}-grams and shorter", "parameters": 2 * sum(spec.counts) - spec.counts[-1], "bytes": size}
    ]


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


def _submodels(spec: ModelSpec, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sub-model's make and size."""
    parameters = {part["part"]: part["parameters"] for part in parts}
    return [
        {
            "submodel": name,
            "kind": submodel.kind,
            "layers": submodel.layers,
            "position": submodel.position,
            "dim": submodel.dim,
            "heads": submodel.heads if submodel.kind == "attention" else None,
            "context": submodel.context,
            "parameters": parameters.get(_submodel(name), 0),
        }
        for name, submodel in spec.submodels.items()
    ]


def _variants(
    spec: ModelSpec,
    parts: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    compression: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Each operating point: what is active, what it weighs when it runs, where it was trained, how good it is known to be.

    ``bytes``: as stored for use. ``best``: the lowest WER measured with the present weights for each manifest.
    """
    parameters = {part["part"]: part["parameters"] for part in parts}
    stored = dict.fromkeys(spec.variants, parts) if compression is None else compression["variants"]
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
                "masks": variant.masks,
                "integers": variant.integers,
                "parameters": sum(parameters.get(part, 0) for part in running),
                "bytes": sum(row["bytes"] for row in stored[name] if row["part"] in running),
                "contexts": [
                    {"context": text, "latency_ms": parse_context(text).latency_ms} for text in variant.contexts
                ],
                "best": list(best.values()),
            }
        )
    return rows


def _evaluations(run: RunDir) -> list[dict[str, Any]]:
    """What ``evaluate`` left in the run directory; ``current`` where it was these very weights."""
    weights = sha256_of(run.weights_path)
    return [
        {
            "manifest": result.manifest,
            "manifest_sha256": result.manifest_sha256,
            "variant": result.variant,
            "context": result.context,
            "method": result.method,
            "beam": result.beam,
            "search": result.search,
            "wer": result.total.wer,
            "cer": result.total.cer,
            "words": result.total.words,
            "emission_latency": None if result.emission_latency is None else to_dict(result.emission_latency),
            "real_time_factor": result.real_time_factor,
            "current": result.weights_sha256 == weights,
        }
        for result in read_results(run.path)
    ]
