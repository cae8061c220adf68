"""Which layers bear fewer bits: each is quantized by itself, and the loss it costs is measured.

Greedy by loss per byte saved; the papers choose by hand (arXiv 2203.15952, tables 3 and 4: lower layers bear 4 bits best).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from asrkit.config import from_dict, to_dict
from asrkit.data.batch import Batch
from asrkit.errors import UserError
from asrkit.nn.compression import WeightQuantization, weight_codes
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
    """By layer and bits, what the mean loss of an encoder frame on ``batches`` grows by when that layer alone is quantized.

    The model is as before afterwards, and in evaluation mode.
    """
    model.eval()
    sample = list(batches)

    def mean_loss() -> float:
        outputs = [loss(model, batch, 0) for batch in sample]
        return float(sum(output.losses.sum() for output in outputs)) / sum(output.count for output in outputs)

    start = mean_loss()
    costs: dict[str, dict[int, float]] = {}
    for path, layer in layers.items():
        weight = layer.weight.detach().clone()
        costs[path] = {}
        for bits in BITS:
            settings = from_dict(WeightQuantization, {**to_dict(how), "bits": bits, "symmetric": True}, "weights")
            layer.weight.copy_(weight_codes(weight, settings).weights())
            costs[path][bits] = mean_loss() - start
        layer.weight.copy_(weight)
    return costs


def choose_bits(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, float]], allowed: float
) -> dict[str, int]:
    """Bits for each layer so that their sizes add up to at most ``allowed``: from 8 everywhere, the step down that costs the
    least loss for each byte it saves is taken again and again.

    Args:
        costs: by layer and bits, the growth of the loss.
        sizes: by layer and bits, bytes.

    Raises:
        UserError: even 2 bits everywhere are too much.
    """
    chosen = dict.fromkeys(costs, BITS[0])
    least = sum(sizes[path][BITS[-1]] for path in costs)
    if least > allowed:
        raise UserError(
            f"beside what stays float the budget leaves {max(0.0, allowed):,.0f} bytes for {len(chosen)} layers, which take {least:,.0f} even with "
            f"{BITS[-1]} bits; raise --budget, or compress more parts with --only"
        )

    def price(path: str) -> float:
        bits, fewer = chosen[path], _below(chosen[path], BITS)
        return max(0.0, costs[path][fewer] - costs[path][bits]) / (sizes[path][bits] - sizes[path][fewer])

    while sum(sizes[path][bits] for path, bits in chosen.items()) > allowed:
        cheapest = min((path for path, bits in chosen.items() if bits > BITS[-1]), key=price)
        chosen[cheapest] = _below(chosen[cheapest], BITS)
    return chosen


def _below(bits: int, choices: Sequence[int]) -> int:
    return choices[choices.index(bits) + 1]
