"""The loss of a supernet: each process draws one of its two members for each step.

Sources: self-pruning (arXiv 2207.11906); adaptive dropout and in-place distillation of omni-sparsity DNN (arXiv 2110.08352).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from asrkit.data.batch import Batch
from asrkit.methods.supernet.config import InPlaceConfig, SelfPruningConfig
from asrkit.methods.supernet.members import DENSE, RANDOM, SPARSE
from asrkit.models import AsrModel
from asrkit.models.compression import block_of, masked_layers
from asrkit.nn.context import Context
from asrkit.nn.dropout import Dropout
from asrkit.training.asr_loss import ForwardPass, LossConfig, forward_losses, in_place_divergence
from asrkit.training.contexts import drawn
from asrkit.training.step import LossOutput, Metric, add_metrics


def supernet_loss(
    model: AsrModel,
    batch: Batch,
    step: int,
    settings: LossConfig,
    contexts: Mapping[str, Context],
    *,
    pruning: SelfPruningConfig,
    random: int = 0,
    sparsity: float = 0.0,
    adaptive_dropout: bool = False,
    distillation: InPlaceConfig | None = None,
) -> LossOutput:
    """The recognizer's losses of a batch in one member, which torch's generator draws for each process and step; or, if there are
    ``random`` ones beside the two, of its parts in all of them.

    Args:
        contexts: of DENSE and SPARSE; random members run in that of SPARSE.
        pruning: says how often each of the two is drawn.
        random: number of random members.
        sparsity: of the sparse member at this step. adaptive_dropout: see ``sparse_dropout``.
    """
    members = [DENSE, SPARSE, *[RANDOM] * random]
    parts = split(batch, members) if random and step >= pruning.dense_steps else [(drawn_member(pruning, step), batch)]
    # Of all members in every process, so that they can be added up.
    losses, metrics = [], {member: Metric(0.0, 0.0) for member in members}
    if distillation is not None and distillation.scale > 0:
        metrics["distillation"] = Metric(0.0, 0.0)
    for member, part in parts:
        levels = random_levels(model) if member == RANDOM else {}
        sparsities = {} if member == DENSE else sparsities_of(model, levels, sparsity)
        frames = float(part.num_encoder_frames)
        with model.encoder.one_draw():
            with at_levels(model, levels), sparse_dropout(model, sparsities if adaptive_dropout else {}):
                own = forward_losses(model, part, step, settings, *_how(member, contexts), None)
            each = own.losses
            add_metrics(metrics, {**own.metrics, member: Metric(each.detach().sum(), frames)})
            if distillation is not None and distillation.scale > 0 and member != DENSE:
                divergence = divergence_from_dense(model, part, own, contexts[DENSE], distillation)
                each = each + distillation.scale * divergence
                add_metrics(metrics, {"distillation": Metric(divergence.detach().sum(), frames)})
        losses.append(each)
    metrics["sparsity"] = Metric(sparsity, 1.0)
    return LossOutput(torch.cat(losses), float(batch.num_encoder_frames), metrics)


def drawn_member(settings: SelfPruningConfig, step: int) -> str:
    """DENSE or SPARSE, drawn by torch's generator on the CPU; DENSE in the steps that are dense without a draw."""
    dense, sparse = settings.draws
    return DENSE if step < settings.dense_steps else drawn([DENSE] * dense + [SPARSE] * sparse)


def member_metrics(own: Mapping[str, Metric]) -> dict[str, Metric]:
    """A metric for each of the two members, of nothing for one that is not in ``own``, so that processes can add them up."""
    return {name: own.get(name, Metric(0.0, 0.0)) for name in (DENSE, SPARSE)}


def _how(member: str, contexts: Mapping[str, Context]) -> tuple[str, Context]:
    """The variant and the context of a member."""
    variant = DENSE if member == DENSE else SPARSE
    return variant, contexts[variant]


def split(batch: Batch, members: Sequence[str]) -> list[tuple[str, Batch]]:
    """The batch in equal parts, a member for each in random order: the sandwich rule within a batch. Where there are fewer utterances
    than members, some get none."""
    size, number = len(batch.cut_ids), len(members)
    order = torch.randperm(number).tolist()
    bounds = [size * index // number for index in range(number + 1)]
    return [
        (members[index], batch.part(begin, end))
        for index, begin, end in zip(order, bounds, bounds[1:], strict=False)
        if begin < end
    ]


def random_levels(model: nn.Module) -> dict[str, int | None]:
    """For each masked layer one of its levels, or None for its own sparsity: drawn for each encoder block by itself, by torch's
    generator on the CPU."""
    layers = {path: layer.how.levels for path, layer, _ in masked_layers(model)}
    drawn_levels = {block: drawn([*range(len(levels)), None]) for block, levels in _blocks(layers).items()}
    return {path: drawn_levels[block_of(path)] for path in layers}


def _blocks(layers: Mapping[str, list[float]]) -> dict[int | None, list[float]]:
    """The levels of each encoder block, those outside of blocks being one; all layers have the same."""
    return {block_of(path): levels for path, levels in layers.items()}


def sparsities_of(model: nn.Module, levels: Mapping[str, int | None], most: float) -> dict[str, float]:
    """The sparsity of each masked layer at its level, ``most`` at None."""
    every = {}
    for path, layer, _ in masked_layers(model):
        level = levels.get(path)
        every[path] = most if level is None else min(layer.how.levels[level], most)
    return every


@contextmanager
def at_levels(model: nn.Module, levels: Mapping[str, int | None]) -> Iterator[None]:
    """Within, masked layers have the masks of their levels; without a level, their own."""
    changed = [(layer, levels[path]) for path, layer, _ in masked_layers(model) if path in levels]
    for layer, level in changed:
        layer.level = level
    try:
        yield
    finally:
        for layer, _ in changed:
            layer.level = None


def divergence_from_dense(
    model: AsrModel, batch: Batch, own: ForwardPass, context: Context, how: InPlaceConfig
) -> Tensor:
    """The divergence of a sparse member's pass from the dense member's, (B,); the dense one gets no gradient, and has dropout, as in
    its own steps (our choice)."""
    assert own.joiner_in is not None  # refused before training
    with torch.no_grad():
        languages = model.language_ids(batch.languages)
        encoded, lens = model.encode(batch.features, batch.feature_lens, DENSE, context, languages=languages)
        teacher = (model.joiner.project_encoder(encoded), own.joiner_in[1].detach())
    torch.clear_autocast_cache()  # of weights that were cast without a gradient, which later passes would take
    return in_place_divergence(model, batch, own, teacher, lens, how.classes, how.delay)


@contextmanager
def sparse_dropout(model: nn.Module, sparsities: Mapping[str, float]) -> Iterator[None]:
    """Within, dropout beside masked layers drops (1 - sparsity) times as much: adaptive dropout (arXiv 2110.08352), for fewer
    weights need less of it.

    Args:
        sparsities: by layer path; of several layers beside one dropout the last counts.
    """
    beside = {}
    for path, sparsity in sparsities.items():
        for module in model.get_submodule(path.rpartition(".")[0]).children():
            if isinstance(module, Dropout):
                beside[module] = 1 - sparsity
    for dropout, factor in beside.items():
        dropout.scale(factor)
    try:
        yield
    finally:
        for dropout in beside:
            dropout.scale(1.0)
