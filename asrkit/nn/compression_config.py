"""What can be done to a linear layer: mask its weights, turn weights and inputs into integers. Settings without torch, which
model specs are made of; ``nn.compression`` does it, and names the sources.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from asrkit.config import Advanced, config

Rounding = Literal["half_up", "half_even"]


@config
class WeightQuantization:
    """How a layer's weights become integers (arXiv 2203.15952; asymmetric 2-bit levels of arXiv 2305.16619)."""

    bits: Literal[2, 4, 8] = 8
    """Bits per weight: 8, 4 or 2."""
    scale: Literal["tensor", "channel", "block"] = "channel"
    """What shares a scale: the whole tensor, each output channel (the paper's way), or each block of `block_size`
    inputs of an output."""
    block_size: Annotated[int, Field(ge=2)] = 64
    """Inputs per scale with `scale=block`."""
    bound: Advanced[Literal["center", "edge"]] = "center"
    """What the largest weight maps to: center, the last integer 2^(b-1) - 1 (the paper's way), or edge, the outer edge
    of its step, 2^(b-1) - 0.5."""
    rounding: Advanced[Rounding] = "half_up"
    """How a value halfway between two integers is rounded: half_up (the paper's way) or half_even (to the even one, as
    torch and ONNX round)."""
    symmetric: bool = True
    """Use symmetric integers without a zero point, which keep zeros exact. Set to false, with 2 bits only, to use all
    four levels."""
    scale_gradient: Advanced[bool] = False
    """Let the gradient flow through the scale to the largest weight. The paper stops it."""
    clip: Literal["none", "search"] = "none"
    """How to choose each scale: none covers the largest weight; search tries 11 ranges from 1 to 0.5 of it and takes
    the one with the smallest squared error."""

    @model_validator(mode="after")
    def _possible(self) -> Any:
        if not self.symmetric and self.bits != 2:
            raise ValueError(f"asymmetric weights are for 2 bits; with {self.bits} bits use symmetric=true")
        if not self.symmetric and self.bound == "edge":
            raise ValueError(
                "asymmetric weights use every level from the smallest to the largest; leave out bound=edge"
            )
        return self

    @property
    def largest(self) -> int:
        """The largest code: 127, 7 or 1; asymmetric codes run from -2 to 1."""
        return int(2 ** (self.bits - 1)) - 1


@config
class ActivationQuantization:
    """How a layer's inputs become integers. Scales are computed anew in every pass."""

    bits: Literal[4, 8] = 8
    """Bits per input value: 8 or 4."""
    scale: Literal["token", "tensor", "onnx"] = "token"
    """What shares a scale: token (each frame has its own), tensor (the whole batch), or onnx (the whole batch,
    asymmetric, as ONNX's DynamicQuantizeLinear computes it). With tensor and onnx an utterance's result depends on
    what it is batched with."""
    rounding: Advanced[Rounding] = "half_up"
    """How a value halfway between two integers is rounded: half_up or half_even. `scale=onnx` needs half_even."""

    @model_validator(mode="after")
    def _possible(self) -> Any:
        if self.scale == "onnx" and (self.bits != 8 or self.rounding != "half_even"):
            raise ValueError("scale=onnx is 8 bits with rounding=half_even, as the runtime's operator")
        return self


@config
class Mask:
    """Which weights stay: N of every M inputs (`keep` of `group`), or a share of the weights (`sparsity`), in blocks.

    The mask itself is a buffer of the layer; this says what shape it has.
    """

    keep: Annotated[int, Field(ge=1)] | None = None
    """N of N:M: how many weights to keep of every `group` consecutive inputs of an output."""
    group: Annotated[int, Field(ge=2)] | None = None
    """M of N:M: the number of consecutive inputs that are pruned together."""
    pad: bool = False
    """Prune a last group of fewer than `group` inputs as if it were filled up with weights that go first."""
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the weights to prune, between 0 and 1. Give this or `keep` and `group`."""
    block: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 1)
    """Outputs and inputs pruned as one block, with `sparsity`: [8, 1] is 8 outputs x 1 input."""

    @model_validator(mode="after")
    def _one_kind(self) -> Any:
        if (self.keep is None) != (self.group is None) or (self.keep is None) == (self.sparsity is None):
            raise ValueError("give either keep and group (N:M), or sparsity")
        if self.keep is not None and self.group is not None and self.keep > self.group:
            raise ValueError(f"cannot keep {self.keep} of {self.group}")
        return self


@config
class Compression:
    """What is done to one linear layer; with nothing set it is an ordinary layer."""

    weights: WeightQuantization | None = None
    """How the weights become integers; null keeps them float."""
    activations: ActivationQuantization | None = None
    """How the inputs become integers; null keeps them float."""
    mask: Mask | None = None
    """Which weights stay; null keeps them all."""
    levels: list[Annotated[float, Field(ge=0.0, lt=1.0)]] = field(default_factory=list)
    """Sparsities, ascending and all below the mask's, that the layer has in other members of a supernet; it then stores for each block at
    how many of them the block stays."""
    product: Literal["native", "fake"] = "native"
    """native multiplies the integers and scales the result (the papers' way); fake scales the weights before the
    product, for comparison."""

    @model_validator(mode="after")
    def _possible(self) -> Any:
        weights = self.weights
        if self.mask is not None and weights is not None and not weights.symmetric:
            raise ValueError(
                "asymmetric weights have no exact zero, so pruned ones would come back; use symmetric=true with a mask"
            )
        if self.levels and (
            self.mask is None
            or self.mask.sparsity is None
            or self.levels != sorted({*self.levels})
            or self.levels[-1] >= self.mask.sparsity
        ):
            raise ValueError("levels are ascending shares below the sparsity of a mask of blocks")
        if self.activations is not None and (weights is None or not weights.symmetric):
            raise ValueError("integer activations need symmetric integer weights")
        return self

    def restricted(self, masks: bool, integers: bool) -> Compression:
        """What is left without the mask, or without the integers of weights and inputs."""
        if masks and integers:
            return self
        return replace(
            self,
            mask=self.mask if masks else None,
            levels=self.levels if masks else [],
            weights=self.weights if integers else None,
            activations=self.activations if integers else None,
        )


def stored_bits(shape: tuple[int, int], bias: int, how: Compression, kept: int) -> int:
    """What a linear layer (O, I) with ``bias`` biases and ``kept`` weights takes when stored: codes at their bits, float32
    scales (and offsets), a bit a weight for an N:M mask or a bit a block, and its bias in float32 (arXiv 2312.08553's account,
    with what it leaves out)."""
    outputs, inputs = shape
    mask, weights = how.mask, how.weights
    extra = 0 if mask is None else outputs * inputs // (1 if mask.keep is not None else mask.block[0] * mask.block[1])
    if weights is None:
        return 32 * kept + extra + 32 * bias
    scales = {"tensor": 1, "channel": outputs, "block": outputs * inputs // weights.block_size}[weights.scale]
    return weights.bits * kept + extra + 32 * scales * (1 if weights.symmetric else 2) + 32 * bias
