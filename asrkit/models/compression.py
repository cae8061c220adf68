"""Which linear layers of a model are masked and quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from asrkit.config import Advanced, config, from_dict, to_dict
from asrkit.errors import UserError
from asrkit.models.asr import AsrModel
from asrkit.models.spec import TRAINING_ONLY, ModelSpec
from asrkit.nn.compression import CompressedLinear
from asrkit.nn.compression_config import ActivationQuantization, Compression, Mask, WeightQuantization

Part = Literal["encoder", "submodels", "joiner", "ctc_head"]


@config
class LayerChoice:
    """Which linear layers a stage compresses; the papers take all of the encoder's."""

    only: Annotated[list[Part], Field(min_length=1)] = field(default_factory=lambda: ["encoder", "submodels"])
    """Parts of the model: encoder, submodels (the active ones), joiner, ctc_head."""
    first: Annotated[int, Field(ge=1)] | None = None
    """Compress only the first N blocks of the encoder, which lose least by it; null: all."""
    include: list[str] = field(default_factory=list)
    """Patterns of layer paths such as *.conv.*; a layer must match one of them. Empty: every layer does."""
    exclude: list[str] = field(default_factory=list)
    """Patterns of layer paths that are left out."""
    indivisible: Literal["refuse", "skip", "pad"] = "refuse"
    """Layers whose inputs the groups or blocks do not divide: refuse to start, skip them, or pad the last group (N:M
    only)."""


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


def masked_layers(model: nn.Module) -> Iterator[tuple[str, CompressedLinear, Mask]]:
    """The layers that have a mask, with their paths and what shape it has."""
    for path, layer in compressed_layers(model).items():
        if layer.how.mask is not None:
            yield path, layer, layer.how.mask


@torch.no_grad()
def keep_pruned(model: nn.Module, step: int = 0) -> None:
    """Zero the latent weights that are pruned, whatever momentum or decay made of them; not of a model that has a variant
    without masks, which uses them."""
    variants = getattr(getattr(model, "spec", None), "variants", {})
    if not all(variant.masks for variant in variants.values()):
        return
    for _, layer, _ in masked_layers(model):
        layer.weight.mul_(layer.mask)


def choose_layers(model: nn.Module, choice: LayerChoice, active: Sequence[str] | None = None) -> dict[str, nn.Linear]:
    """The layers ``choice`` speaks of; of sub-models only the ``active`` ones, None being all.

    Raises:
        UserError: there is none.
    """
    every = linear_layers(model)
    for pattern in (*choice.include, *choice.exclude):
        if not any(fnmatchcase(path, pattern) for path in every):
            raise UserError(f"layers.include and exclude: {pattern} matches no linear layer; {_some(every)}")
    blocks = {block for path in every if (block := block_of(path)) is not None}
    if choice.first is not None and choice.first > len(blocks):
        raise UserError(f"layers.first={choice.first}: the encoder has {len(blocks)} blocks")
    chosen = {
        path: layer
        for path, layer in every.items()
        if _part_of(path) in choice.only
        and (active is None or _part_of(path) != "submodels" or path.split(".")[2] in active)
        and (choice.first is None or block_of(path) is None or block_of(path) < choice.first)  # type: ignore[operator]
        and (not choice.include or any(fnmatchcase(path, pattern) for pattern in choice.include))
        and not any(fnmatchcase(path, pattern) for pattern in choice.exclude)
    }
    if not chosen:
        raise UserError(f"no linear layer matches layers.only, first, include and exclude; {_some(every)}")
    return chosen


def _some(layers: Mapping[str, nn.Linear]) -> str:
    return f"the model has {', '.join(list(layers)[:4])}, ... ({len(layers)} in all)"


def _part_of(path: str) -> str:
    if path.startswith("encoder.submodels."):
        return "submodels"
    return {"encoder": "encoder", "joiner": "joiner", "ctc_head": "ctc_head"}.get(path.partition(".")[0], "")


def block_of(path: str) -> int | None:
    """The number of the encoder block a layer belongs to; None for one outside of blocks."""
    words = path.split(".")
    if words[:2] == ["encoder", "blocks"]:
        return int(words[2])
    return int(words[4]) if words[:2] == ["encoder", "submodels"] else None


@config
class QuantizationConfig:
    """What to quantize, and how (arXiv 2203.15952)."""

    weights: WeightQuantization = field(default_factory=WeightQuantization)
    """How the weights become integers."""
    activations: ActivationQuantization | None = None
    """How the layers' inputs become integers; null keeps them float."""
    product: Advanced[Literal["native", "fake"]] = "native"
    """native multiplies the integers and scales the result (the paper's way); fake scales the weights before the
    product, for comparison."""
    bits: dict[str, Literal[2, 4, 8]] = field(default_factory=dict)
    """Bits of single layers, by patterns of their paths, such as {"encoder.blocks.0.*": 8}. The last pattern that
    matches counts."""
    layers: LayerChoice = field(default_factory=LayerChoice)
    """Which linear layers are quantized."""

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
    findings, compression = [], dict(spec.compression)
    chosen = choose_layers(model, settings.layers, active)
    if done := [path for path in chosen if path in spec.compression and spec.compression[path].weights is not None]:
        raise UserError(
            f"{len(done)} of the layers are quantized already, such as {done[0]}; choose others (layers.only), start from the run "
            "that was quantized, whose weights are float, or leave out what quantizes again, such as export --quantize"
        )
    for pattern in settings.bits:
        if not any(fnmatchcase(path, pattern) for path in chosen):
            findings.append(f"bits: {pattern} matches no layer that is to be quantized, such as {next(iter(chosen))}")
    for path, layer in chosen.items():
        weights = settings.weights
        if matching := [bits for pattern, bits in settings.bits.items() if fnmatchcase(path, pattern)]:
            # From plain values, as not all bits go with all other settings.
            weights = from_dict(WeightQuantization, {**to_dict(weights), "bits": matching[-1]}, f"bits of {path}")
        if weights.scale == "block" and layer.in_features % weights.block_size:
            if settings.layers.indivisible != "skip":
                findings.append(
                    f"{path}: {layer.in_features} inputs are no multiple of block_size {weights.block_size}; "
                    "take another, or leave such layers float by layers.indivisible=skip (of qat: quantization.layers.indivisible)"
                )
            continue
        before = compression.get(path, Compression())
        if before.mask is not None and not weights.symmetric:
            findings.append(
                f"{path}: is pruned, and asymmetric weights have no exact zero, so what was pruned would come back; "
                "use symmetric weights"
            )
            continue
        compression[path] = replace(before, weights=weights, activations=settings.activations, product=settings.product)
    if not findings and not any(how.weights for how in compression.values()):
        findings.append(
            "every chosen layer was skipped as indivisible, so nothing would be quantized; take another block_size"
        )
    if findings:
        raise UserError.of(findings)
    return replace(spec, compression=compression)


def pruned_spec(model: AsrModel, mask: Mask, choice: LayerChoice, active: Sequence[str] | None = None) -> ModelSpec:
    """The model's spec with the chosen layers masked, of sub-models the ``active`` ones.

    Raises:
        UserError: the model is pruned or quantized already, or the groups or blocks do not divide a layer.
    """
    return replace(model.spec, compression=masked_choice(model, model.spec.compression, mask, choice, active))


def masked_choice(
    model: nn.Module,
    before: Mapping[str, Compression],
    mask: Mask,
    choice: LayerChoice,
    active: Sequence[str] | None = None,
) -> dict[str, Compression]:
    """What ``pruned_spec`` puts into a spec whose compression was ``before``: the chosen layers of any module, by path."""
    if done := [path for path, how in before.items() if how.weights is not None]:
        raise UserError(
            f"the model is quantized already ({len(done)} layers, such as {done[0]}); prune first, then quantize"
        )
    if done := [path for path, how in before.items() if how.mask is not None]:
        raise UserError(
            f"the model is pruned already ({len(done)} layers, such as {done[0]}); start from the run that was pruned"
        )
    findings, compression = [], {}
    for path, layer in choose_layers(model, choice, active).items():
        layer_mask = mask
        outputs, inputs = layer.out_features, layer.in_features
        whole = inputs % mask.group == 0 if mask.group else not (outputs % mask.block[0] or inputs % mask.block[1])
        if not whole:
            if choice.indivisible == "skip":
                continue
            if choice.indivisible == "pad" and mask.group:
                layer_mask = replace(mask, pad=True)
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
        compression[path] = Compression(mask=layer_mask)
    if not findings and not compression:
        findings.append(
            "every chosen layer was skipped as indivisible, so nothing would be pruned; take another pattern"
        )
    if findings:
        raise UserError.of(findings)
    return compression
