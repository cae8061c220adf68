"""The masked and quantized layers of an exported variant: which they are, how many bytes they take, and what ``--quantize`` makes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from asrkit.export.directory import CTC, PartRecord
from asrkit.export.onnx_file import GRAPH
from asrkit.models import AsrModel
from asrkit.models.compression import LayerChoice, QuantizationConfig, choose_layers, compressed_layers, quantized_spec
from asrkit.models.sizes import part_of, sizes
from asrkit.models.surgery import rebuild
from asrkit.nn.compression import CompressedLinear
from asrkit.nn.compression_config import ActivationQuantization, WeightQuantization

SILENT = -1e4  # a logit whose probability is 0 in float32

# Our choice of one setting for each value of --quantize; `asrkit quantize` has all others.
_SKIP_INDIVISIBLE = LayerChoice(indivisible="skip")
QUANTIZED: dict[str, QuantizationConfig] = {
    "int8": QuantizationConfig(weights=WeightQuantization(bits=8)),
    "int4": QuantizationConfig(
        weights=WeightQuantization(bits=4, scale="block", block_size=32), layers=_SKIP_INDIVISIBLE
    ),
    "int2": QuantizationConfig(
        weights=WeightQuantization(bits=2, scale="block", block_size=32, symmetric=False), layers=_SKIP_INDIVISIBLE
    ),
    "dynamic": QuantizationConfig(
        weights=WeightQuantization(bits=8),
        activations=ActivationQuantization(bits=8, scale="onnx", rounding="half_even"),
    ),
}


def quantized(model: AsrModel, name: str, submodels: Sequence[str], warn: Callable[[str], None]) -> AsrModel:
    """``model`` with the layers of its encoder and of ``submodels`` rounded as QUANTIZED[``name``] says.

    Raises:
        UserError: the model is quantized already.
    """
    settings = QUANTIZED[name]
    num_layers = len(choose_layers(model, settings.layers, submodels))
    model = rebuild(quantized_spec(model, settings, submodels), model)
    if skipped := num_layers - len(active_layers(model, submodels)):
        warn(
            f"--quantize {name}: {skipped} of {num_layers} layers stay float, because their number of inputs is not a "
            f"multiple of {settings.weights.block_size}; asrkit quantize can use other block sizes"
        )
    return model


def active_layers(model: AsrModel, submodels: Sequence[str]) -> dict[str, CompressedLinear]:
    """By path, the masked and quantized layers of the backbone and of ``submodels``."""
    return {
        path: layer
        for path, layer in compressed_layers(model).items()
        if not part_of(path).startswith("submodel ") or part_of(path).removeprefix("submodel ") in submodels
    }


def silence(model: AsrModel, special_ids: Collection[int]) -> None:
    """Make every search over ``model`` pass over ``special_ids``, the client's too: their logits get a bias of -1e4, in place.

    The blank stays as it is.
    """
    columns = sorted(set(special_ids) - {model.blank})
    with torch.no_grad():
        for layer in (model.joiner.out, model.ctc_head):
            layer.bias[columns] = SILENT


def multiplies_two_bits(layer: CompressedLinear) -> bool:
    """Whether the runtime multiplies a layer by MatMulNBits of 2 bits."""
    weights, integer_inputs = layer.how.weights, layer.how.activations is not None
    return weights is not None and weights.bits == 2 and not (integer_inputs and layer.multiplies_integers)


def describe_layers(layers: Mapping[str, CompressedLinear], untrained: bool, dense: bool) -> str:
    """One line on what the weights are.

    Args:
        untrained: they were rounded at export. dense: the files hold the float32 numbers they stand for.
    """
    if not layers:
        return "float32"
    weight_bits = sorted({layer.how.weights.bits for layer in layers.values() if layer.how.weights is not None})
    input_bits = sorted({layer.how.activations.bits for layer in layers.values() if layer.how.activations is not None})
    masked = [layer for layer in layers.values() if layer.how.mask is not None]
    parts = [f"{len(layers)} layers"]
    if weight_bits:
        parts.append(f"weights of {' and '.join(map(str, weight_bits))} bits")
    if input_bits:
        parts.append(f"inputs of {' and '.join(map(str, input_bits))} bits")
    if masked:
        share = sum(int(layer.mask.sum()) for layer in masked) / sum(layer.weight.numel() for layer in masked)
        parts.append(f"{100 * share:.0f} % of the masked weights kept")
    if untrained:
        parts.append("rounded without training")
    return ", ".join(parts) + (", as dense float32" if dense else "")


def part_records(model: AsrModel, tensors: Mapping[str, Mapping[str, int]]) -> dict[str, PartRecord]:
    """The bytes of each part in the transducer's ONNX files (of the CTC head in its own), beside those `asrkit info` counts.

    Args:
        tensors: bytes by file and part, as ``write_onnx`` returns them.
    """
    stored: dict[str, int] = {}
    for file, parts in tensors.items():
        for part, size in parts.items():
            if (part == "ctc_head") == file.startswith(CTC):
                stored[part] = stored.get(part, 0) + size
    stored.pop(GRAPH, None)
    return {
        part: PartRecord(stored=stored[part], counted=counted["bytes"], float32=counted["float_bytes"])
        for part, counted in sizes(model).items()
        if part in stored
    }
