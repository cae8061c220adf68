"""Which layers tolerate fewer bits: quantize each layer by itself and measure the increase in loss.

Bits are then reduced greedily by loss per byte saved; the papers choose by hand (arXiv 2203.15952, tables 3 and 4: lower layers
tolerate 4 bits best).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from asrkit.config import from_dict, to_dict
from asrkit.data.batch import Batch
from asrkit.errors import UserError
from asrkit.nn.compression import weight_codes
from asrkit.nn.compression_config import WeightQuantization
from asrkit.training.step import LossOutput

BITS = (8, 4, 2)


@torch.no_grad()
def measure(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    how: WeightQuantization,
    loss: Callable[[nn.Module, Batch, int], LossOutput],
    batches: Iterable[Batch],
) -> dict[str, dict[int, float]]:
    """By layer and bits, the increase of the mean loss per encoder frame on ``batches`` if only that layer is quantized.

    Afterwards the model has its old weights and is in evaluation mode.
    """
    model.eval()
    sample = list(batches)

    def mean_loss() -> float:
        outputs = [loss(model, batch, 0) for batch in sample]
        return float(sum(output.losses.sum() for output in outputs)) / sum(output.count for output in outputs)

    float_loss = mean_loss()
    costs: dict[str, dict[int, float]] = {}
    for path, layer in layers.items():
        weight = layer.weight.detach().clone()
        costs[path] = {}
        for bits in BITS:
            settings = from_dict(WeightQuantization, {**to_dict(how), "bits": bits, "symmetric": True}, "weights")
            layer.weight.copy_(weight_codes(weight, settings).weights())
            costs[path][bits] = mean_loss() - float_loss
        layer.weight.copy_(weight)
    return costs


def choose_bits(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, float]], allowed: float
) -> dict[str, int]:
    """Bits for each layer so that their sizes add up to at most ``allowed``. Starting from 8 bits everywhere, the reduction that
    costs the least loss per byte saved is applied again and again.

    Args:
        costs: by layer and bits, the increase in loss.
        sizes: by layer and bits, bytes.

    Raises:
        UserError: even 2 bits everywhere take too much.
    """
    bits_of = dict.fromkeys(costs, BITS[0])
    least = sum(sizes[path][BITS[-1]] for path in costs)
    if least > allowed:
        raise UserError(
            f"after the parts that stay float, the budget leaves {max(0.0, allowed):,.0f} bytes for {len(bits_of)} layers, but they take "
            f"{least:,.0f} even with {BITS[-1]} bits; raise --budget, or compress more parts with --only"
        )

    def price(path: str) -> float:
        bits, fewer = bits_of[path], _below(bits_of[path], BITS)
        return max(0.0, costs[path][fewer] - costs[path][bits]) / (sizes[path][bits] - sizes[path][fewer])

    while sum(sizes[path][bits] for path, bits in bits_of.items()) > allowed:
        cheapest = min((path for path, bits in bits_of.items() if bits > BITS[-1]), key=price)
        bits_of[cheapest] = _below(bits_of[cheapest], BITS)
    return bits_of


def _below(bits: int, choices: Sequence[int]) -> int:
    return choices[choices.index(bits) + 1]
