"""What the parts of a model take when stored for use, of a module or of a run directory, whose weights are then not read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asrkit.models.spec import TRAINING_ONLY, ModelSpec
from asrkit.nn.compression_config import Compression, stored_bits
from asrkit.run_dir import RunDir

if TYPE_CHECKING:
    from torch import nn

    from asrkit.models.asr import AsrModel
    from asrkit.models.compression import QuantizationConfig

# Matrices that belong to no linear layer, by the last part of their module's path.
NOT_LINEAR = ("embedding", "languages", "depthwise")


def part_of(path: str) -> str:
    """The part a tensor is counted to: ``backbone``, ``submodel NAME``, ``predictor``, ``joiner`` or ``ctc_head``."""
    words = path.split(".")
    if words[:2] == ["encoder", "submodels"]:
        return f"submodel {words[2]}"
    return "backbone" if words[0] == "encoder" else words[0]


def sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """``part_sizes`` of a module; of a recognizer with variants: as the one that is selected."""
    from asrkit.models.compression import compressed_layers
    from asrkit.nn.compression import kept_weights

    layers = compressed_layers(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kept = {path: kept_weights(layer) for path, layer in layers.items()}
    return part_sizes(shapes, {path: layer.active for path, layer in layers.items()}, kept)


def stored_sizes(run: RunDir, spec: ModelSpec, variant: str) -> dict[str, dict[str, Any]]:
    """``part_sizes`` of a run directory's recognizer in one of its variants, without building it."""
    masks, integers = spec.variants[variant].masks, spec.variants[variant].integers
    active = {path: how.restricted(masks, integers) for path, how in spec.compression.items()}
    return part_sizes(run.tensor_shapes(), active, run.kept_weights() if masks else {})


def part_sizes(
    shapes: Mapping[str, tuple[int, ...]], compression: Mapping[str, Compression], kept: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """What each part takes when stored for use, and what it would as float32: ``backbone``, ``submodel NAME``, ``predictor``,
    ``joiner``, ``ctc_head``.

    ``bytes`` and ``float_bytes``; ``weights``, how many are masked or quantized, and of those ``kept``; ``bits`` of the
    quantized ones, all that occur. Compressed layers count as ``stored_bits`` says, all else 4 bytes a number; layers that
    only serve training are left out.

    Args:
        shapes: of every tensor of the model, by name.
        compression: what is switched on of it, by layer path.
        kept: how many weights the mask of a layer leaves; all of them where it is not named.
    """
    counted: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        layer, _, tensor = name.rpartition(".")
        if name.partition(".")[0] in TRAINING_ONLY or tensor in ("mask", "reach"):
            continue
        part = counted.setdefault(part_of(name), {"bytes": 0.0, "float_bytes": 0, "weights": 0, "kept": 0, "bits": []})
        numbers = math.prod(shape)
        part["float_bytes"] += 4 * numbers
        how = compression.get(layer, Compression())
        if tensor != "weight" or not (how.mask or how.weights):
            part["bytes"] += 4 * numbers
            continue
        outputs, inputs = shape
        left = kept.get(layer, numbers)
        part["bytes"] += stored_bits((outputs, inputs), 0, how, left) / 8  # its bias is a tensor of its own
        part["weights"] += numbers
        part["kept"] += left
        if how.weights is not None:
            part["bits"] = sorted({*part["bits"], how.weights.bits})
    for part in counted.values():
        part["bytes"] = round(part["bytes"])
    return counted


def linear_paths(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The paths of the linear layers that an export could hold, from the shapes of a recognizer's tensors by name."""
    for name, shape in shapes.items():
        path, _, tensor = name.rpartition(".")
        other = path.rpartition(".")[2] in NOT_LINEAR or path.partition(".")[0] in TRAINING_ONLY
        if tensor == "weight" and len(shape) == 2 and not other:
            yield path


def layer_sizes(
    model: AsrModel, settings: QuantizationConfig, active: Sequence[str] | None = None
) -> tuple[dict[str, dict[int, float]], float, float]:
    """Bytes of each layer to be quantized with 8, 4 and 2 bits; and, of the whole model, the bytes of all else and those of
    float32. Sub-models that are not active do not count."""
    from asrkit.models.compression import choose_layers, compressed_layers, quantized_spec
    from asrkit.models.surgery import rebuild
    from asrkit.nn.compression import size_in_bits

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
