"""One member of a supernet as a model by itself, and the search for a good one within a byte budget.

Source: omni-sparsity DNN (arXiv 2110.08352), which cuts any member out without training and finds layer-wise sparsities by evolution.
What it leaves open of the evolution is an option, and its default is our choice.

A *group* is an encoder block, or all masked layers outside of blocks; its layers have one sparsity. A *choice* is a sparsity by its number
in ``sparsities``, ascending.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from asrkit.config import Positive, Share, config
from asrkit.errors import UserError
from asrkit.methods.supernet.members import DENSE, SPARSE
from asrkit.models import AsrModel
from asrkit.models.compression import block_of, masked_layers
from asrkit.models.sizes import sizes
from asrkit.models.surgery import in_variant, is_mask, rebuild
from asrkit.nn.compression import CompressedLinear
from asrkit.nn.compression_config import stored_bits

Group = int | None
Genome = tuple[int, ...]  # a choice for each group


@config
class SearchConfig:
    """Settings of the search for layer-wise sparsities. The paper has 4,000 evaluations; these defaults make 128."""

    population: Positive = 16
    """Members that are compared in a generation."""
    generations: Positive = 8
    """Generations."""
    parents: Positive = 4
    """Best ones that the next generation comes from."""
    mutation: Share = 0.2
    """Probability that a block gets another sparsity, in a mutated member."""
    max_cuts: Positive = 200
    """At most this many dev cuts, evenly spread, are what the loss is measured on."""
    max_duration: Positive = 200
    """Seconds of padded audio computed at once."""
    seed: int = 1
    """Seed of the search."""


def groups(model: AsrModel) -> list[Group]:
    """The groups of a supernet's masked layers, in the order of the layers; None is what lies outside of blocks."""
    return list(dict.fromkeys(block_of(path) for path, _, _ in masked_layers(model)))


def check_supernet(model: AsrModel, where: str) -> None:
    """Refuse a model that no member can be cut out of.

    Raises:
        UserError: it is no supernet.
    """
    if {DENSE, SPARSE} - set(model.spec.variants) or not any(True for _ in masked_layers(model)):
        raise UserError(f"{where}: is no supernet, so there is nothing to cut out; train one with `asrkit supernet`")


def sparsities(model: AsrModel) -> list[float]:
    """The sparsities that a group can have, ascending."""
    _, layer, mask = next(masked_layers(model))
    assert mask.sparsity is not None
    return [*layer.how.levels, mask.sparsity]


def cut(model: AsrModel, chosen: Mapping[Group, float]) -> AsrModel:
    """The member with the ``chosen`` sparsities as a model of one variant, ``sparse``, whose other weights are zero. A sparsity of 0
    everywhere, where no group of a random member has it, is the dense member."""
    known = sparsities(model)
    if set(chosen.values()) == {0.0} and 0.0 not in known:
        return in_variant(model, DENSE)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not is_mask(name)}
    compression = dict(model.spec.compression)
    for path, layer, mask in masked_layers(model):
        share = chosen[block_of(path)]
        compression[path] = replace(layer.how, levels=[], mask=replace(mask, sparsity=share) if share > 0 else None)
        if share > 0:
            tensors[f"{path}.mask"] = kept = mask_at(layer, known.index(share))
            tensors[f"{path}.weight"] = layer.weight.detach() * kept
    left = {path: how for path, how in compression.items() if how.mask or how.weights}
    variants = {SPARSE: model.spec.variants[SPARSE]}
    return rebuild(replace(model.spec, compression=left, variants=variants, variant=SPARSE), tensors)


def mask_at(layer: CompressedLinear, choice: int) -> torch.Tensor:
    """The weights (O, I) that a layer keeps at a choice."""
    return layer.mask if choice == len(layer.how.levels) else layer.level_mask(choice)


def levels_of(model: AsrModel, genome: Sequence[int]) -> dict[str, int | None]:
    """The level of each masked layer, by path; None is its own mask."""
    choices = dict(zip(groups(model), genome, strict=True))
    layers = {path: layer for path, layer, _ in masked_layers(model)}
    return {path: choice if (choice := choices[block_of(path)]) < len(layer.how.levels) else None
            for path, layer in layers.items()}  # fmt: skip


def byte_costs(model: AsrModel) -> tuple[list[list[float]], float, float]:
    """Bytes of each group at each choice, of all else, and of the whole model as float32: what recognizing needs, as stored."""
    known, order = sparsities(model), groups(model)
    costs = [[0.0] * len(known) for _ in order]
    for path, layer, mask in masked_layers(model):
        for choice, share in enumerate(known):
            how = replace(layer.how, levels=[], mask=mask if share > 0 else None)
            kept = int(mask_at(layer, choice).sum())
            costs[order.index(block_of(path))][choice] += (
                stored_bits((layer.out_features, layer.in_features), 0, how, kept) / 8
            )
    model.select(SPARSE)
    rows = sizes(model).values()
    rest = sum(row["bytes"] for row in rows) - sum(row[-1] for row in costs)
    return costs, rest, float(sum(row["float_bytes"] for row in rows))


def search(
    loss: Callable[[Genome], float],
    costs: Sequence[Sequence[float]],
    allowed: float,
    settings: SearchConfig,
    tell: Callable[[int, Genome, float], None] = lambda generation, best, value: None,
) -> Genome:
    """The member with the lowest loss that evolution finds among those whose groups cost at most ``allowed`` bytes together.

    Args:
        loss: of a member; asked once for each.
        costs: bytes by group and choice, falling with the choice.
        tell: is given each generation's number, its best member so far and that one's loss.

    Raises:
        UserError: even the sparsest member costs more.
    """
    last, draw = len(costs[0]) - 1, random.Random(settings.seed)
    least = sum(row[-1] for row in costs)
    if least > allowed:
        raise UserError(
            f"the budget leaves {allowed:,.0f} bytes for the masked layers, and the sparsest member needs {least:,.0f}; raise it"
        )
    known: dict[Genome, float] = {}

    def fitted(genome: Sequence[int]) -> Genome:
        made = list(genome)
        while sum(row[choice] for row, choice in zip(costs, made, strict=True)) > allowed:
            group = draw.choice([group for group, choice in enumerate(made) if choice < last])
            made[group] += 1
        return tuple(made)

    def born(ranked: Sequence[Genome]) -> Genome:
        """A random one at first; later a mutation of a parent, or each group from one of two parents."""
        if not ranked:
            return fitted([draw.randrange(last + 1) for _ in costs])
        one, other = draw.choice(ranked), draw.choice(ranked)
        if draw.random() < 0.5:
            return fitted([draw.choice(pair) for pair in zip(one, other, strict=True)])
        return fitted([draw.randrange(last + 1) if draw.random() < settings.mutation else choice for choice in one])

    ranked: list[Genome] = []
    for generation in range(settings.generations):
        members = {fitted([choice] * len(costs)) for choice in range(last + 1)} - {*known}  # the uniform ones first
        for _ in range(20 * settings.population):  # there may be fewer different ones than wanted
            if len(members) >= settings.population:
                break
            members |= {born(ranked)} - {*known}
        known |= {genome: loss(genome) for genome in sorted(members)}
        ranked = sorted(known, key=lambda genome: (known[genome], genome))[: settings.parents]
        tell(generation, ranked[0], known[ranked[0]])
    return ranked[0]
