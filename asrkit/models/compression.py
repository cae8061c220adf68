"""Which linear layers of a model are masked and quantized, and what that makes of its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from asrkit.config import config, from_dict, to_dict
from asrkit.errors import UserError
from asrkit.models.spec import ModelSpec
from asrkit.nn.compression import (
    ActivationQuantization,
    CompressedLinear,
    Compression,
    Mask,
    WeightQuantization,
    size_in_bits,
)

if TYPE_CHECKING:
    from asrkit.models.asr import AsrModel

Part = Literal["encoder", "submodels", "joiner", "ctc_head"]
# Layers that only serve training are never compressed: no export holds them.
TRAINING_ONLY = ("simple_encoder", "simple_predictor", "heads")


@config
class LayerChoice:
    """Which linear layers a stage compresses; the papers take the encoder's, all of them.

    ``only``: parts of the model. ``first``: of the encoder's blocks, the first so many (lower ones
    bear it best). ``include`` and ``exclude``: patterns of paths, such as ``*.conv.*``; a layer must match one of the
    first, if there are any, and none of the second. ``indivisible``: what to do with a layer whose inputs do not divide into
    groups or blocks: refuse, skip it, or pad the last group (N:M only).
    """

    only: Annotated[list[Part], Field(min_length=1)] = field(default_factory=lambda: ["encoder", "submodels"])
    first: Annotated[int, Field(ge=1)] | None = None
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    indivisible: Literal["refuse", "skip", "pad"] = "refuse"


def compress(model: nn.Module, how: Mapping[str, Compression]) -> None:
    """Replace the named linear layers by compressed ones with the same weights, in place; masks begin as all True.

    Raises:
        UserError: a path leads to no linear layer.
    """
    for path, one in how.items():
        holder, _, name = path.rpartition(".")
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            layer = None
        if not isinstance(layer, nn.Linear):
            raise UserError(f"model.yaml: compression: {path} is no linear layer of this model")
        made = CompressedLinear(layer.in_features, layer.out_features, one, layer.bias is not None)
        made.load_state_dict(layer.state_dict(), strict=False)
        setattr(model.get_submodule(holder), name, made)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer that an export could hold, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.partition(".")[0] not in TRAINING_ONLY
    }


def compressed_layers(model: nn.Module) -> dict[str, CompressedLinear]:
    """The layers that are masked or quantized, by path."""
    return {path: module for path, module in linear_layers(model).items() if isinstance(module, CompressedLinear)}


def choose_layers(model: nn.Module, choice: LayerChoice, active: Sequence[str] | None = None) -> dict[str, nn.Linear]:
    """The layers ``choice`` speaks of; of sub-models only the ``active`` ones, None being all.

    Raises:
        UserError: there is none.
    """
    every = linear_layers(model)
    for pattern in (*choice.include, *choice.exclude):
        if not any(fnmatchcase(path, pattern) for path in every):
            raise UserError(f"layers.include and exclude: {pattern} matches no linear layer; {_some(every)}")
    blocks = {block for path in every if (block := _block(path)) is not None}
    if choice.first is not None and choice.first > len(blocks):
        raise UserError(f"layers.first={choice.first}: the encoder has {len(blocks)} blocks")
    chosen = {
        path: layer
        for path, layer in every.items()
        if _part(path) in choice.only
        and (active is None or _part(path) != "submodels" or path.split(".")[2] in active)
        and (choice.first is None or _block(path) is None or _block(path) < choice.first)  # type: ignore[operator]
        and (not choice.include or any(fnmatchcase(path, pattern) for pattern in choice.include))
        and not any(fnmatchcase(path, pattern) for pattern in choice.exclude)
    }
    if not chosen:
        raise UserError(f"no linear layer matches layers.only, first, include and exclude; {_some(every)}")
    return chosen


def _some(layers: Mapping[str, nn.Linear]) -> str:
    return f"the model has {', '.join(list(layers)[:4])}, ... ({len(layers)} in all)"


def _part(path: str) -> str:
    if path.startswith("encoder.submodels."):
        return "submodels"
    return {"encoder": "encoder", "joiner": "joiner", "ctc_head": "ctc_head"}.get(path.partition(".")[0], "")


def _block(path: str) -> int | None:
    """The number of the encoder block a layer belongs to; None for one outside of blocks."""
    words = path.split(".")
    if words[:2] == ["encoder", "blocks"]:
        return int(words[2])
    return int(words[4]) if words[:2] == ["encoder", "submodels"] else None


def part_of(path: str) -> str:
    """The part a tensor is counted to: ``backbone``, ``submodel NAME``, ``predictor``, ``joiner`` or ``ctc_head``."""
    words = path.split(".")
    if words[:2] == ["encoder", "submodels"]:
        return f"submodel {words[2]}"
    return "backbone" if words[0] == "encoder" else words[0]


def sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What each part takes when stored for use, and what it would as float32: ``backbone``, ``submodel NAME``, ``predictor``,
    ``joiner``, ``ctc_head``.

    ``bytes`` and ``float_bytes``; ``weights``, how many are masked or quantized, and of those ``kept``; ``bits`` of the
    quantized ones, all that occur. Compressed layers count as ``size_in_bits`` says, all else 4 bytes a number; layers that
    only serve training are left out.
    """
    counted: dict[str, dict[str, Any]] = {}

    def row(path: str) -> dict[str, Any]:
        empty = {"bytes": 0.0, "float_bytes": 0, "weights": 0, "kept": 0, "bits": []}
        return counted.setdefault(part_of(path), empty)

    layers, inside = linear_layers(model), set()
    for path, layer in layers.items():
        mine = row(path)
        inside |= {f"{path}.{name}" for name, _ in layer.named_parameters()}
        mine["bytes"] += size_in_bits(layer) / 8
        mine["float_bytes"] += 4 * sum(parameter.numel() for parameter in layer.parameters())
        if isinstance(layer, CompressedLinear):
            mine["weights"] += layer.weight.numel()
            mine["kept"] += int(layer.mask.sum()) if layer.how.mask is not None else layer.weight.numel()
            if layer.how.weights is not None and layer.how.weights.bits not in mine["bits"]:
                mine["bits"] = sorted([*mine["bits"], layer.how.weights.bits])
    plain = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if not n.endswith(".mask"))]
    for name, tensor in plain:
        if name not in inside and name.partition(".")[0] not in TRAINING_ONLY:
            mine = row(name)
            mine["bytes"] += 4 * tensor.numel()
            mine["float_bytes"] += 4 * tensor.numel()
    for mine in counted.values():
        mine["bytes"] = round(mine["bytes"])
    return counted


@config
class QuantizationConfig:
    """What to quantize, and how; ``bits`` replaces ``weights.bits`` for the layers whose paths match a pattern, the last match
    counting, such as ``{"encoder.blocks.0.*": 8}``."""

    weights: WeightQuantization = field(default_factory=WeightQuantization)
    activations: ActivationQuantization | None = None
    product: Literal["native", "fake"] = "native"
    bits: dict[str, Literal[2, 4, 8]] = field(default_factory=dict)
    layers: LayerChoice = field(default_factory=LayerChoice)

    @model_validator(mode="after")
    def _possible(self) -> Any:
        if self.activations is not None and not self.weights.symmetric:
            raise ValueError("integer activations need symmetric integer weights")
        return self


def quantized_spec(model: AsrModel, settings: QuantizationConfig, active: Sequence[str] | None = None) -> ModelSpec:
    """The model's spec with the chosen layers quantized, of sub-models the ``active`` ones; masks that are there stay.

    Raises:
        UserError: a chosen layer is quantized already, a block does not divide a layer, mask and levels do not go together, or
            ``bits`` speaks of no chosen layer.
    """
    spec = model.spec
    findings, compression = [], to_dict(spec)["compression"]
    chosen = choose_layers(model, settings.layers, active)
    if done := [path for path in chosen if path in spec.compression and spec.compression[path].weights is not None]:
        raise UserError(
            f"{len(done)} of the layers are quantized already, such as {done[0]}; choose others (layers.only), or start from the "
            "run that was quantized, whose weights are float"
        )
    for pattern in settings.bits:
        if not any(fnmatchcase(path, pattern) for path in chosen):
            findings.append(f"bits: {pattern} matches no layer that is to be quantized, such as {next(iter(chosen))}")
    for path, layer in chosen.items():
        weights = to_dict(settings.weights)
        for pattern, bits in settings.bits.items():
            if fnmatchcase(path, pattern):
                weights["bits"] = bits
        if weights["scale"] == "block" and layer.in_features % weights["block_size"]:
            if settings.layers.indivisible != "skip":
                findings.append(
                    f"{path}: {layer.in_features} inputs are no multiple of block_size {weights['block_size']}; "
                    "take another, or leave such layers float by layers.indivisible=skip (of qat: quantization.layers.indivisible)"
                )
            continue
        activations = None if settings.activations is None else to_dict(settings.activations)
        before = compression.get(path, {})
        compression[path] = {**before, "weights": weights, "activations": activations, "product": settings.product}
        if before.get("mask") and not weights["symmetric"]:
            findings.append(
                f"{path}: is pruned, and asymmetric weights have no exact zero, so what was pruned would come back; "
                "use symmetric weights"
            )
    if not findings and not any(how.get("weights") for how in compression.values()):
        findings.append(
            "every chosen layer was skipped as indivisible, so nothing would be quantized; take another block_size"
        )
    if findings:
        raise UserError.of(findings)
    return from_dict(ModelSpec, {**to_dict(spec), "compression": compression}, "compression")


def pruned_spec(model: AsrModel, mask: Mask, choice: LayerChoice, active: Sequence[str] | None = None) -> ModelSpec:
    """The model's spec with the chosen layers masked, of sub-models the ``active`` ones.

    Raises:
        UserError: the model is pruned or quantized already, or the groups or blocks do not divide a layer.
    """
    spec = model.spec
    if done := [path for path, how in spec.compression.items() if how.weights is not None]:
        raise UserError(
            f"the model is quantized already ({len(done)} layers, such as {done[0]}); prune first, then quantize"
        )
    if done := [path for path, how in spec.compression.items() if how.mask is not None]:
        raise UserError(
            f"the model is pruned already ({len(done)} layers, such as {done[0]}); start from the run that was pruned"
        )
    findings, compression = [], {}
    for path, layer in choose_layers(model, choice, active).items():
        mine = mask
        outputs, inputs = layer.out_features, layer.in_features
        whole = inputs % mask.group == 0 if mask.group else not (outputs % mask.block[0] or inputs % mask.block[1])
        if not whole:
            if choice.indivisible == "skip":
                continue
            if choice.indivisible == "pad" and mask.group:
                mine = from_dict(Mask, {**to_dict(mask), "pad": True}, "mask")
            else:
                shape = f"groups of {mask.group}" if mask.group else f"blocks of {mask.block[0]}x{mask.block[1]}"
                findings.append(
                    f"{path}: {shape} do not divide {outputs} x {inputs}; --set layers.indivisible=skip leaves it as it is"
                    + (", pad fills the last group up" if mask.group else "")
                )
        elif mask.sparsity is not None:
            blocks = outputs * inputs // (mask.block[0] * mask.block[1])
            if round(mask.sparsity * blocks) == blocks:
                findings.append(
                    f"{path}: has {blocks} blocks of {mask.block[0]}x{mask.block[1]}, and a share of {mask.sparsity} is all of them; "
                    "take smaller blocks or a lower share"
                )
        compression[path] = {"mask": to_dict(mine)}
    if not findings and not compression:
        findings.append(
            "every chosen layer was skipped as indivisible, so nothing would be pruned; take another pattern"
        )
    if findings:
        raise UserError.of(findings)
    return from_dict(ModelSpec, {**to_dict(spec), "compression": compression}, "compression")


def layer_sizes(
    model: AsrModel, settings: QuantizationConfig, active: Sequence[str] | None = None
) -> tuple[dict[str, dict[int, float]], float, float]:
    """Bytes of each layer to be quantized with 8, 4 and 2 bits; and, of the whole model, the bytes of all else and those of
    float32. Sub-models that are not active do not count."""
    layers = choose_layers(model, settings.layers, active)
    by_bits: dict[str, dict[int, float]] = {path: {} for path in layers}
    rest, plain = 0.0, 0.0
    for bits in (8, 4, 2):
        weights = {**to_dict(settings.weights), "bits": bits, "symmetric": True}
        uniform = from_dict(QuantizationConfig, {**to_dict(settings), "weights": weights, "bits": {}}, "quantization")
        made = rebuilt(quantized_spec(model, uniform, active), model)
        for path, layer in compressed_layers(made).items():
            if path in by_bits:
                by_bits[path][bits] = size_in_bits(layer) / 8
        counted = [row for part, row in sizes(made).items() if _counts(part, active)]
        rest = sum(row["bytes"] for row in counted) - sum(sizes_of[bits] for sizes_of in by_bits.values())
        plain = sum(row["float_bytes"] for row in counted)
    return by_bits, rest, plain


def _counts(part: str, active: Sequence[str] | None) -> bool:
    return active is None or not part.startswith("submodel ") or part.removeprefix("submodel ") in active


def with_variant(spec: ModelSpec, name: str | None, contexts: Sequence[str] | None = None) -> ModelSpec:
    """The spec with ``name`` as its default variant, trained in ``contexts``; None leaves either as it is.

    Raises:
        UserError: there is no such variant.
    """
    name = spec.variant if name is None else name
    if name not in spec.variants:
        raise UserError(f"no variant {name}; there are {', '.join(spec.variants)}")
    content = {**to_dict(spec), "variant": name}
    if contexts is not None:
        content["variants"][name]["contexts"] = list(contexts)
    return from_dict(ModelSpec, content, "model")


def rebuilt(spec: ModelSpec, origin: AsrModel) -> AsrModel:
    """A model of ``spec`` with the weights of ``origin``, which has the same tensors but for masks; those begin as all True."""
    model = type(origin)(spec)
    missing, unexpected = model.load_state_dict(origin.state_dict(), strict=False)
    if unexpected or any(not name.endswith(".mask") for name in missing):
        raise RuntimeError(f"the weights do not fit the compressed model: {missing} {unexpected}")
    return model


def reinitialize(model: AsrModel, origin: AsrModel, active: Sequence[str]) -> None:
    """Give a model new weights, in place; buffers and sub-models of ``origin`` that are not ``active`` stay."""
    kept = {name for name, _ in model.named_buffers()}
    idle = tuple(f"encoder.submodels.{name}." for name in origin.spec.submodels if name not in active)
    fresh = type(model)(model.spec).state_dict()
    new = {name: tensor for name, tensor in fresh.items() if name not in kept and not name.startswith(idle)}
    model.load_state_dict(new, strict=False)


def recompressed(model: AsrModel, how: Mapping[str, Compression]) -> AsrModel:
    """The model with ``how`` in place of its own compression; the other layers have their latent float weights."""
    content = {**to_dict(model.spec), "compression": {path: to_dict(one) for path, one in how.items()}}
    made = type(model)(from_dict(ModelSpec, content, "model"))
    wanted = made.state_dict()
    made.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in wanted})
    return made.eval()


def dequantized_model(model: AsrModel) -> AsrModel:
    """An ordinary model whose float weights are what the masks and integers of ``model`` stand for; its inputs stay float."""
    plain = recompressed(model, {})
    for path, layer in compressed_layers(model).items():
        weight = layer.masked_weight() if layer.how.weights is None else layer.codes().weights()
        plain.get_submodule(path).weight.data.copy_(weight.detach())  # type: ignore[union-attr, operator]
    return plain
