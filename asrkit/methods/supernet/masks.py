"""The masks of a supernet's sparse member, which grow while both members are trained, and the decay that prepares them.

Shapes: I inputs and O outputs of a layer, in blocks of r rows and c columns.
Sources: self-pruning and group lasso (arXiv 2207.11906); importance by Adam's second moment (arXiv 2110.08352).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asrkit.methods.pruning import sparsity_due
from asrkit.methods.supernet.config import GrowthConfig, SelfPruningConfig
from asrkit.models.compression import masked_layers
from asrkit.models.digests import tensors_digest
from asrkit.models.surgery import is_mask
from asrkit.nn.compression import CompressedLinear, block_sums, ranks, spread_blocks

SMALLEST = 1e-12  # norm of a block that is taken for 0


@torch.no_grad()
def block_scores(layer: CompressedLinear, block: tuple[int, int], score: str, moment: Tensor | None) -> Tensor:
    """How much each block matters, (O / r, I / c).

    Args:
        moment: Adam's second moment of the weights, (O, I), for ``adam``.

    Raises:
        ValueError: ``adam`` without a second moment.
    """
    weight = layer.weight.detach()
    if score == "adam":
        if moment is None:
            raise ValueError("Adam has no second moments yet")
        return block_sums(weight.abs() * moment.sqrt(), block)
    return block_sums(weight.abs() if score == "l1" else weight.square(), block)


def grow_masks(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, growth: GrowthConfig) -> None:
    """Compute the masks that are due before ``step``, in place, from the latent weights.

    Each layer keeps its own share of its blocks; every process has the same weights and so the same masks. Those of other members
    are nested: what stays at a sparsity stays at every lower one. None is sparser than the sparsest is at the time.
    """
    schedule = growth.schedule
    for _, layer, mask in masked_layers(model):
        how = layer.how
        due, sparsity = sparsity_due(schedule, mask, step)
        if not due or sparsity is None:
            continue
        moment = optimizer.state.get(layer.weight, {}).get("exp_avg_sq")
        scores = block_scores(layer, mask.block, growth.score, moment)
        before = None
        if growth.monotone:  # a block that has gone, from a member or from all, stays behind all others, zeros included
            before = blocks_of(layer.mask, mask.block).to(torch.uint8)
            if how.levels:
                before += layer.reach
        place = ranks(scores, before)
        layer.mask.copy_(spread_blocks(stays(place, sparsity), mask.block))
        if how.levels:
            layer.reach.copy_(torch.stack([stays(place, min(level, sparsity)) for level in how.levels]).sum(0))


def stays(place: Tensor, sparsity: float) -> Tensor:
    """Whether each block stays, by its place, the best being 0: 1 - ``sparsity`` of them, to the nearest block."""
    return place < place.numel() - round(sparsity * place.numel())


def blocks_of(mask: Tensor, block: tuple[int, int]) -> Tensor:
    """The blocks a mask (O, I) keeps, bool (O / r, I / c)."""
    return mask[:: block[0], :: block[1]]


@torch.no_grad()
def lasso_decay(model: nn.Module, scale: float, rate: float) -> None:
    """One step of group lasso on the latent weights of every masked layer, in place.

    W_g -= rate lambda_i W_g / ||W_g||_2 for each block g of layer i, with lambda_i = ``scale`` times the mean of its blocks' norms
    (arXiv 2207.11906); a block smaller than its step becomes 0. A layer that is not trained stays as it is.
    """
    for _, layer, mask in masked_layers(model):
        if not layer.weight.requires_grad:
            continue
        norms = block_sums(layer.weight.square(), mask.block).sqrt()
        factors = (1 - rate * scale * norms.mean() / norms.clamp(min=SMALLEST)).clamp(min=0)
        layer.weight.mul_(spread_blocks(factors, mask.block))


def density(model: nn.Module) -> float:
    """The share of the masked layers' weights that the masks keep."""
    layers = [layer for _, layer, _ in masked_layers(model)]
    return sum(int(layer.mask.sum()) for layer in layers) / sum(layer.mask.numel() for layer in layers)


def masks_digest(tensors: Mapping[str, Tensor]) -> str:
    """The hexadecimal SHA-256 of a model's masks."""
    return tensors_digest((name, tensor) for name, tensor in tensors.items() if is_mask(name))


def grow_and_decay(
    settings: SelfPruningConfig, begin: int = 0
) -> Callable[[nn.Module, torch.optim.Optimizer, int, Any], None]:
    """What is called before each step of a supernet's training: group lasso in its time, from step ``begin`` on at the earliest,
    and the masks that are due."""
    lasso, growth = settings.lasso, settings.growth
    decayed = lasso.steps(growth.final(settings.sparsity), begin)

    def before_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, batch: Any) -> None:
        if lasso.scale > 0 and step in decayed:
            lasso_decay(model, lasso.scale, optimizer.param_groups[0]["lr"] if lasso.times_learning_rate else 1.0)
        grow_masks(model, optimizer, step, growth)

    return before_step
