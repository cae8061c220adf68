"""What the parts of a model take when stored for use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from asrkit.models.asr import AsrModel
from asrkit.models.compression import (
    TRAINING_ONLY,
    QuantizationConfig,
    choose_layers,
    compressed_layers,
    linear_layers,
    quantized_spec,
)
from asrkit.models.surgery import rebuild
from asrkit.nn.compression import CompressedLinear, size_in_bits


def part_of(path: str) -> str:
    """The part a tensor is counted to: ``backbone``, ``submodel NAME``, ``predictor``, ``joiner`` or ``ctc_head``."""
    words = path.split(".")
    if words[:2] == ["encoder", "submodels"]:
        return f"submodel {words[2]}"
    return "backbone" if words[0] == "encoder" else words[0]


def sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What each part takes when stored for use, and what it would as float32: ``backbone``, ``submodel NAME``, ``predictor``,
    ``joiner``, ``ctc_head``. Of a recognizer with variants: as the one that is selected.

    ``bytes`` and ``float_bytes``; ``weights``, how many are masked or quantized, and of those ``kept``; ``bits`` of the
    quantized ones, all that occur. What the variant switches off does not count. Compressed layers count as ``size_in_bits``
    says, all else 4 bytes a number; layers that only serve training are left out.
    """
    counted: dict[str, dict[str, Any]] = {}

    def row(path: str) -> dict[str, Any]:
        empty = {"bytes": 0.0, "float_bytes": 0, "weights": 0, "kept": 0, "bits": []}
        return counted.setdefault(part_of(path), empty)

    layers, inside = linear_layers(model), set()
    for path, layer in layers.items():
        part = row(path)
        inside |= {f"{path}.{name}" for name, _ in layer.named_parameters()}
        part["bytes"] += size_in_bits(layer) / 8
        part["float_bytes"] += 4 * sum(parameter.numel() for parameter in layer.parameters())
        if isinstance(layer, CompressedLinear) and (layer.active.mask or layer.active.weights):
            part["weights"] += layer.weight.numel()
            part["kept"] += int(layer.mask.sum()) if layer.active.mask is not None else layer.weight.numel()
            if layer.active.weights is not None and layer.active.weights.bits not in part["bits"]:
                part["bits"] = sorted([*part["bits"], layer.active.weights.bits])
    plain = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if not n.endswith(".mask"))]
    for name, tensor in plain:
        if name not in inside and name.partition(".")[0] not in TRAINING_ONLY:
            part = row(name)
            part["bytes"] += 4 * tensor.numel()
            part["float_bytes"] += 4 * tensor.numel()
    for part in counted.values():
        part["bytes"] = round(part["bytes"])
    return counted


def layer_sizes(
    model: AsrModel, settings: QuantizationConfig, active: Sequence[str] | None = None
) -> tuple[dict[str, dict[int, float]], float, float]:
    """Bytes of each layer to be quantized with 8, 4 and 2 bits; and, of the whole model, the bytes of all else and those of
    float32. Sub-models that are not active do not count."""
    layers = choose_layers(model, settings.layers, active)
    by_bits: dict[str, dict[int, float]] = {path: {} for path in layers}
    rest, plain = 0.0, 0.0
    for bits in (8, 4, 2):
        uniform = replace(settings, weights=replace(settings.weights, bits=bits, symmetric=True), bits={})
        made = rebuild(quantized_spec(model, uniform, active), model)
        for path, layer in compressed_layers(made).items():
            if path in by_bits:
                by_bits[path][bits] = size_in_bits(layer) / 8
        counted = [row for part, row in sizes(made).items() if _counts(part, active)]
        rest = sum(row["bytes"] for row in counted) - sum(layer_bytes[bits] for layer_bytes in by_bits.values())
        plain = sum(row["float_bytes"] for row in counted)
    return by_bits, rest, plain


def _counts(part: str, active: Sequence[str] | None) -> bool:
    return active is None or not part.startswith("submodel ") or part.removeprefix("submodel ") in active
