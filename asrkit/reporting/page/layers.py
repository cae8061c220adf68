"""The linear layers of a model one by one: bytes, bits, density, the weights' distribution over their integers, the mask."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from asrkit.reporting.page.figures import bare, color, svg

if TYPE_CHECKING:
    from torch import Tensor, nn

    from asrkit.models.asr import AsrModel
    from asrkit.nn.compression import CompressedLinear

BINS = 60
MOST_MASK = 64  # outputs and inputs of a mask that are shown


@dataclass(frozen=True)
class Layer:
    """``range``: the smallest and largest weight, of an integer layer the integers. ``histogram`` is SVG; ``mask`` a PNG as base64, of at most its first 64 outputs and inputs, None without a mask."""

    path: str
    outputs: int
    inputs: int
    bits: int | None
    kept: float
    bytes: int
    range: tuple[float, float]
    histogram: str
    mask: str | None


def describe_layers(model: AsrModel) -> list[Layer]:
    """Every linear layer that recognizing needs, in the model's default variant."""
    from asrkit.models.compression import linear_layers

    return [_described(path, layer) for path, layer in linear_layers(model).items()]


def _described(path: str, layer: nn.Linear) -> Layer:
    import torch

    from asrkit.nn.compression import CompressedLinear, size_in_bits

    compressed = layer if isinstance(layer, CompressedLinear) else None
    mask = None if compressed is None or compressed.active.mask is None else compressed.mask
    with torch.no_grad():
        left = torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask
        if compressed is None or compressed.active.weights is None:
            values, bits = layer.weight[left].numpy(), None
            grid, times = np.zeros(0), np.zeros(0, dtype=int)
        else:
            values, codes = _units(compressed, left)
            grid, times = np.unique(codes, return_counts=True)
            bits = compressed.active.weights.bits
    shown = grid if len(grid) else values
    limits = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 0.0)
    return Layer(
        path,
        layer.out_features,
        layer.in_features,
        bits,
        float(left.float().mean()),
        round(size_in_bits(layer) / 8),
        limits,
        _drawn(f"{path}: weights from {limits[0]:.3g} to {limits[1]:.3g}", values, grid, times),
        None if mask is None else _picture(mask),
    )


def _units(layer: CompressedLinear, left: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The weights that stay in units of their scales, where integers are one apart, and the integers that are stored for them."""
    quantized = layer.codes()
    scale = quantized.spread(quantized.scale)
    units = layer.weight / scale
    if quantized.offset is not None:
        units = units + quantized.spread(quantized.offset) / scale
    return units[left].numpy(), quantized.codes[left].numpy()


def _drawn(label: str, values: np.ndarray, grid: np.ndarray, times: np.ndarray) -> str:
    """The distribution of values, and bars of how often each integer of ``grid`` occurs."""
    counts, edges = np.histogram(values, BINS)
    with bare(2.4, 0.5) as (figure, axes):
        axes.stairs(counts / max(1, counts.max()), edges, fill=not len(grid), color=color(0), linewidth=1)
        if len(grid):
            axes.vlines(grid, 0, times / times.max(), color=color(1), linewidth=3 if len(grid) < 20 else 1)
        axes.set_ylim(0, 1.05)
        return svg(figure, label)


def _picture(mask: Tensor) -> str:
    """Dark where a weight stays."""
    shown = ~mask[:MOST_MASK, :MOST_MASK].cpu().numpy().astype(bool)
    written = io.BytesIO()
    Image.fromarray((shown * 255).astype(np.uint8), mode="L").convert("1", dither=Image.Dither.NONE).save(
        written, "PNG", optimize=True
    )
    return base64.b64encode(written.getvalue()).decode()
