"""A linear layer that masks its weights, quantizes them and multiplies integers, in that order and in every forward pass, so
that what is trained is what is exported.

Shapes: N rows of activations, I inputs, O outputs, n blocks of an output's inputs, b bits.
Sources: native-integer quantization-aware training (arXiv 2203.15952, US20230298569A1), 2-bit and asymmetric weights
(arXiv 2305.16619 and the code its authors released), prune-then-quantize fine-tuning with N:M masks (arXiv 2312.08553,
US20250078815A1). What these leave open is an option below, and its default is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asrkit.errors import UserError
from asrkit.nn.compression_config import (
    ActivationQuantization,
    Compression,
    Mask,
    Rounding,
    WeightQuantization,
    stored_bits,
)

# A float32 holds every whole number up to this exactly, so sums of products below it are those of integers.
EXACT = 2**24
CLIP_GRID = 11  # shares of the largest weight that a clip search tries, from 1 down to 0.5


class Codes(NamedTuple):
    """Integer weights: whole numbers (O, I) in a float tensor, scales (O or 1, n), and for asymmetric ones the products
    scale * zero point (O, n). A weight is scale * code - offset."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def weights(self) -> Tensor:
        """(O, I), what the integers stand for."""
        return self.spread(self.scale) * self.codes - (0.0 if self.offset is None else self.spread(self.offset))

    def spread(self, per_block: Tensor) -> Tensor:
        """A value for each block, (O or 1, n), as one for each weight, or as it is where one serves all."""
        if per_block.shape[1] == 1:
            return per_block
        return per_block.repeat_interleave(self.codes.shape[1] // per_block.shape[1], dim=1)


def round_half(x: Tensor, rounding: Rounding) -> Tensor:
    """To the nearest whole number; a half goes up, or to the even neighbor."""
    return torch.floor(x + 0.5) if rounding == "half_up" else torch.round(x)


def weight_codes(weight: Tensor, how: WeightQuantization) -> Codes:
    """Quantize (O, I): equations 1 to 3 of arXiv 2203.15952, section 3; asymmetric: as praxis does for 2 bits.

    Differentiable through the scale alone; rounding has no gradient here.

    Raises:
        ValueError: block_size does not divide I.
    """
    outputs, inputs = weight.shape
    if how.scale == "block" and inputs % how.block_size:
        raise ValueError(f"block_size {how.block_size} does not divide {inputs} inputs")
    shape = {"tensor": (1, 1, -1), "channel": (outputs, 1, inputs), "block": (outputs, -1, how.block_size)}[how.scale]
    groups = weight.reshape(shape)
    if how.clip == "none":
        codes, scale, offset = _coded(groups, how, 1.0)
    else:
        tried = [_coded(groups, how, 1.0 - 0.5 * step / (CLIP_GRID - 1)) for step in range(CLIP_GRID)]
        errors = torch.stack([_error(groups, *one).sum(-1) for one in tried])  # (grid, O, n)
        best = errors.argmin(0, keepdim=True)
        codes = torch.stack([one[0] for one in tried]).gather(0, best.unsqueeze(-1).expand(-1, *groups.shape))[0]
        scale = torch.stack([one[1] for one in tried]).squeeze(-1).gather(0, best)[0].unsqueeze(-1)
        offsets = [one[2] for one in tried if one[2] is not None]
        offset = torch.stack(offsets).squeeze(-1).gather(0, best)[0].unsqueeze(-1) if offsets else None
    return Codes(codes.reshape(outputs, inputs), scale.squeeze(-1), None if offset is None else offset.squeeze(-1))


def _coded(groups: Tensor, how: WeightQuantization, share: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (O, n, B), scales (O, n, 1) and offsets of one clipping share; an all-zero group has scale 1."""
    if how.symmetric:
        bound = how.largest + (0.5 if how.bound == "edge" else 0.0)
        scale = _no_zero(share * groups.abs().amax(-1, keepdim=True) / bound)
        codes = round_half(groups / scale, how.rounding).clamp(-how.largest, how.largest)
        return codes, scale, None
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    least, most = -(2 ** (how.bits - 1)), how.largest
    scale = _no_zero(share * (high - low) / (most - least))
    zero_point = least - share * low / scale
    codes = round_half(groups / scale + zero_point, how.rounding).clamp(least, most)
    return codes, scale, scale * zero_point


def _error(groups: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    return (scale * codes - (0.0 if offset is None else offset) - groups).square()


def _no_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


class QuantizedInput(NamedTuple):
    """Integer activations: whole numbers (..., I) in a float tensor, scales (..., 1) or (1,), zero point (1,) or None."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


def input_codes(x: Tensor, how: ActivationQuantization) -> QuantizedInput:
    """Quantize (..., I) by its own largest values."""
    x = x.float()
    if x.numel() == 0:  # of audio without an encoder frame, which has no largest value
        return QuantizedInput(x, x.new_ones(1), x.new_zeros(1) if how.scale == "onnx" else None)
    if how.scale == "onnx":
        low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
        scale = _no_zero((high - low) / 255.0)
        zero_point = torch.round((0.0 - low) / scale).clamp(0, 255)
        return QuantizedInput((torch.round(x / scale) + zero_point).clamp(0, 255), scale.view(1), zero_point.view(1))
    largest = 2 ** (how.bits - 1) - 1
    peak = x.abs().amax(-1, keepdim=True) if how.scale == "token" else x.abs().amax().view(1)
    scale = _no_zero(peak / largest)
    return QuantizedInput(round_half(x / scale, how.rounding).clamp(-largest, largest), scale, None)


def integer_product(x: Tensor, codes: Tensor, largest_x: int, largest_w: int) -> Tensor:
    """x (..., I) and codes (O, I), whole numbers of at most the given sizes (x may have none below 0), to the exact (..., O).

    In int8 with int32 sums where torch can, and these are returned; else in float32 while every partial sum stays below 2^24
    (arXiv 2203.15952: integers emulated in float), else in float64.
    """
    rows = x.reshape(-1, x.shape[-1])
    if _fits_int8(len(rows), *codes.shape) and multiplies_int8(x.device.type):
        shift = 128 if largest_x > 127 else 0  # 0 to 255 as -128 to 127
        sums = _int8_product(rows - shift, codes)
        if shift:
            sums = sums + shift * codes.sum(1).to(torch.int32)
        return sums.view(*x.shape[:-1], len(codes))
    dtype = torch.float32 if x.shape[-1] * largest_x * largest_w < EXACT else torch.float64
    return F.linear(x.to(dtype), codes.to(dtype))


def _int8_product(rows: Tensor, codes: Tensor) -> Tensor:
    """Whole numbers from -128 to 127: (N, I), (O, I) -> (N, O) int32."""
    product: Tensor = cast(Any, torch)._int_mm(rows.to(torch.int8), codes.to(torch.int8).t())
    return product


def _fits_int8(rows: int, outputs: int, inputs: int) -> bool:
    """What the product wants of its shapes: refused on GPUs otherwise, and wrong on CPUs where an axis is 1 (torch 2.13)."""
    return rows > 16 and outputs % 8 == 0 and inputs % 8 == 0


@cache
def multiplies_int8(device: str) -> bool:
    """Whether torch multiplies int8 with int32 sums there, and keeps all of them: processors without VNNI may add in 16 bits."""
    try:
        largest = torch.full((32, 64), -128.0, device=device)
        smallest = torch.full((64, 64), -127.0, device=device)
        return bool((_int8_product(largest, smallest) == 64 * 128 * 127).all())
    except (AttributeError, RuntimeError):  # torch before 2.2, or a device it is not written for
        return False


class _NativeProduct(torch.autograd.Function):
    """The product of quantized operands with scales after it; backwards as if nothing had been rounded.

    Y = (q_x q_w^T) s_x s_w, scales multiplied in this order; dX = G (s_w q_w), dW = G^T (s_x q_x), the scales constant
    (arXiv 2203.15952 with the straight-through estimator of arXiv 2312.08553).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        codes: Tensor,
        scale: Tensor,
        largest: int,
        activations: ActivationQuantization | None,
    ) -> Tensor:
        """x (..., I), weight (O, I) latent and already masked, its codes (O, I) and scale (O or 1, 1) -> (..., O)."""
        per_output = scale.view(-1)
        # Codes below 1 and scales as much larger, a power of two, which changes no bit: sums of whole codes overflow float16.
        units, scale = codes / (largest + 1), scale * (largest + 1)
        if activations is None:
            ctx.save_for_backward(x, units, scale)
            # In float32: a bfloat16 scale would be off by up to 0.4 %, and the exported one is not.
            return (F.linear(x, units.to(x.dtype)) * scale.view(-1)).to(x.dtype)
        quantized = input_codes(x, activations)
        size = 255 if quantized.zero_point is not None else 2 ** (activations.bits - 1) - 1
        y = integer_product(quantized.codes, codes, size, largest)
        values = quantized.codes
        if quantized.zero_point is not None:  # while the sums are exact
            y = y - (quantized.zero_point.double() * codes.double().sum(1)).to(y.dtype)
            values = values - quantized.zero_point
        ctx.save_for_backward((values * quantized.scale).to(x.dtype), units, scale)
        return (y.float() * quantized.scale * per_output).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, units, scale = ctx.saved_tensors
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad * scale.view(-1).to(grad.dtype)) @ units.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            rows = grad.reshape(-1, grad.shape[-1])
            weight_grad = (rows.t() @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).to(units.dtype)
        return x_grad, weight_grad, None, None, None, None


class _StraightThroughMask(torch.autograd.Function):
    """weight * mask; backwards the whole gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None


class CompressedLinear(nn.Linear):
    """An ``nn.Linear`` by the same names whose weights are masked, quantized and multiplied as ``how`` says.

    ``weight`` stays the latent float32 tensor that the optimizer moves; ``mask`` (O, I), where there is one, is a buffer.
    ``switch`` turns the mask and the integers off and on: ``active`` is what is left of ``how``, and what the layer does now.
    ``straight_through`` False gives pruned weights no gradient (the papers' way); True lets theirs through as if they were there.
    ``reach`` (O / rows, I / columns) uint8, where ``how`` has levels, is at how many of them a block stays; ``level`` is the one whose
    mask counts, None being ``mask``.
    """

    mask: Tensor
    reach: Tensor
    straight_through: bool = False
    level: int | None = None

    def __init__(self, inputs: int, outputs: int, how: Compression, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.how = self.active = how
        if how.mask is not None:
            self.register_buffer("mask", torch.ones(outputs, inputs, dtype=torch.bool))
            rows, columns = how.mask.block
            if how.levels:
                every = torch.full((outputs // rows, inputs // columns), len(how.levels), dtype=torch.uint8)
                self.register_buffer("reach", every)

    def switch(self, *, masks: bool, integers: bool) -> None:
        """Run with or without the mask, and with or without the integers, from here on. Without a mask the latent weights count
        as they are, also those that the mask hides."""
        self.active = self.how.restricted(masks, integers)

    @property
    def multiplies_integers(self) -> bool:
        """Whether weights are multiplied as integers and scaled afterwards; otherwise they are scaled back first, as blocks and
        zero points need it (the runtime's MatMulNBits does the same)."""
        weights = self.active.weights
        return (
            weights is not None
            and (weights.scale != "block" or weights.block_size == self.in_features)
            and weights.symmetric
            and not weights.scale_gradient
            and self.active.product == "native"
        )

    def masked_weight(self) -> Tensor:
        """(O, I): the latent weights, zero where the mask is False; those zeros get no gradient."""
        if self.active.mask is None:
            return self.weight
        if self.straight_through:
            return _StraightThroughMask.apply(self.weight, self.mask)  # type: ignore[no-any-return]
        mask = self.mask if self.level is None else self.level_mask(self.level)
        return torch.where(mask, self.weight, torch.zeros_like(self.weight))

    def level_mask(self, level: int) -> Tensor:
        """The weights that stay at a level, bool (O, I)."""
        assert self.how.mask is not None
        return spread_blocks(self.reach > level, self.how.mask.block)

    def codes(self) -> Codes:
        """The integers and scales of the layer as it is now: what an export holds.

        Raises:
            ValueError: the layer's weights are not quantized.
        """
        if self.active.weights is None:
            raise ValueError("this layer has float weights")
        return weight_codes(self.masked_weight(), self.active.weights)

    def forward(self, x: Tensor) -> Tensor:
        weight, how = self.masked_weight(), self.active.weights
        if how is None:
            return F.linear(x, weight, self.bias)
        x = x.to(_autocast_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            y = self._product(x, weight, how)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, x: Tensor, weight: Tensor, how: WeightQuantization) -> Tensor:
        quantized = weight_codes(weight if how.scale_gradient else weight.detach(), how)
        if self.multiplies_integers:
            return _NativeProduct.apply(
                x, weight, quantized.codes, quantized.scale, how.largest, self.active.activations
            )  # type: ignore[no-any-return]
        values = quantized.weights()
        if how.scale_gradient:
            # Rounding passes straight through; the scale's own gradient flows as well.
            spread = quantized.spread(quantized.scale)
            straight = weight / spread + (
                0.0 if quantized.offset is None else quantized.spread(quantized.offset) / spread
            )
            # A clipped weight is the bound, whatever it is; more than half a step from its code, but for rounding errors.
            clipped = (straight - quantized.codes).abs() > 0.5 + 1e-3
            straight = torch.where(clipped, torch.zeros_like(values), straight - straight.detach())
            values = values + straight * spread.detach()
        else:
            values = weight + (values - weight).detach()
        if self.active.activations is not None:
            coded = input_codes(x.detach(), self.active.activations)
            codes = coded.codes if coded.zero_point is None else coded.codes - coded.zero_point
            x = x + ((codes * coded.scale).to(x.dtype) - x).detach()
        return F.linear(x, values.to(x.dtype))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast would have made of x; its own dtype where autocast is off."""
    kind, newer = x.device.type, cast(Any, torch)
    if hasattr(torch, "get_autocast_dtype"):  # torch >= 2.4
        return newer.get_autocast_dtype(kind) if newer.is_autocast_enabled(kind) else x.dtype
    if kind == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else x.dtype
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else x.dtype


def find_mask(scores: Tensor, how: Mask, among: Tensor | None = None) -> Tensor:
    """The weights to keep (O, I), from scores (O, I) such as their magnitudes: exactly N of every M inputs, ties included,
    or the best blocks of the layer.

    Args:
        among: (O, I) bool; blocks without any of these weights go first, whatever their scores.

    Raises:
        ValueError: the shape is not divisible.
    """
    outputs, inputs = scores.shape
    if how.keep is not None and how.group is not None:
        if inputs % how.group and not how.pad:
            raise ValueError(f"groups of {how.group} do not divide {inputs} inputs")
        groups = F.pad(scores, (0, -inputs % how.group), value=-torch.inf).reshape(outputs, -1, how.group)
        kept = groups.topk(how.keep, dim=-1).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True)
        return mask.reshape(outputs, -1)[:, :inputs].contiguous()
    assert how.sparsity is not None
    sums = block_sums(scores.square(), how.block)
    if among is not None:
        sums = sums.masked_fill(block_sums(among, how.block) == 0, -torch.inf)
    return spread_blocks(best_blocks(sums, how.sparsity), how.block)


def block_sums(values: Tensor, block: tuple[int, int]) -> Tensor:
    """The sum of each block of ``block`` rows x columns: (O, I) -> (O / rows, I / columns), float32.

    Raises:
        ValueError: the shape is not divisible.
    """
    (outputs, inputs), (rows, columns) = values.shape, block
    if outputs % rows or inputs % columns:
        raise ValueError(f"blocks of {rows}x{columns} do not divide {outputs}x{inputs}")
    return values.float().reshape(outputs // rows, rows, inputs // columns, columns).sum((1, 3))


def spread_blocks(each: Tensor, block: tuple[int, int]) -> Tensor:
    """A value for each block, (O / rows, I / columns), as one for each weight, (O, I)."""
    (down, across), (rows, columns) = each.shape, block
    return each.view(down, 1, across, 1).expand(down, rows, across, columns).reshape(down * rows, across * columns)


def ranks(scores: Tensor, first: Tensor | None = None) -> Tensor:
    """The place of each block by its score, the best being 0, in the shape of ``scores``; equal ones keep their order.

    Args:
        first: uint8, blocks with more of it come before those with less, whatever their scores.
    """
    order = scores.flatten().sort(descending=True, stable=True).indices
    if first is not None:
        order = order[first.flatten()[order].sort(descending=True, stable=True).indices]
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places).view_as(scores)


def best_blocks(scores: Tensor, sparsity: float) -> Tensor:
    """The blocks to keep, bool, of scores of any shape: the best of them, exactly 1 - ``sparsity`` of all to the nearest block."""
    flat = scores.flatten()
    kept = flat.topk(len(flat) - round(sparsity * len(flat))).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(0, kept, True).view_as(scores)


def size_in_bits(layer: nn.Linear) -> int:
    """What a layer's weights take when stored; see ``stored_bits``. What is switched off does not count."""
    shape, bias = (layer.out_features, layer.in_features), 0 if layer.bias is None else layer.bias.numel()
    if not isinstance(layer, CompressedLinear):
        return stored_bits(shape, bias, Compression(), layer.weight.numel())
    return stored_bits(shape, bias, layer.active, kept_weights(layer))


def kept_weights(layer: CompressedLinear) -> int:
    """How many weights the layer's mask leaves; all of them where it is off or there is none."""
    return int(layer.mask.sum()) if layer.active.mask is not None else layer.weight.numel()


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
        compressed = CompressedLinear(layer.in_features, layer.out_features, one, layer.bias is not None)
        compressed.weight, compressed.bias = layer.weight, layer.bias
        setattr(model.get_submodule(holder), name, compressed)


def switch_compression(model: nn.Module, *, masks: bool, integers: bool) -> None:
    """Run all compressed layers with or without their masks and integers from here on."""
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.switch(masks=masks, integers=integers)
