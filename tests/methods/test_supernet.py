"""A supernet's masks, its decay and its loss, against slow references."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asrkit.config import from_dict
from asrkit.data.batch import Batch
from asrkit.errors import UserError
from asrkit.methods.supernet import loss as loss_module
from asrkit.methods.supernet.config import (
    GrowthConfig,
    InPlaceConfig,
    MembersConfig,
    SelfPruningConfig,
    SupernetConfig,
    contradictions,
)
from asrkit.methods.supernet.cut import SearchConfig, byte_costs, cut, groups, search, sparsities
from asrkit.methods.supernet.loss import random_levels, sparse_dropout, split, supernet_loss
from asrkit.methods.supernet.masks import density, grow_masks, lasso_decay
from asrkit.methods.supernet.members import DENSE, RANDOM, SPARSE
from asrkit.models import AsrModel, ModelSpec
from asrkit.models.compression import block_of, compressed_layers, masked_layers
from asrkit.models.sizes import sizes
from asrkit.models.surgery import dequantized_model, in_variant
from asrkit.nn.compression import CompressedLinear, block_sums, find_mask, spread_blocks
from asrkit.nn.compression_config import Compression, Mask
from asrkit.nn.context import FULL, Context, parse_context
from asrkit.nn.dropout import Dropout
from asrkit.nn.masks import SpanMasks
from asrkit.training.asr_loss import LossConfig, forward_losses
from helpers.encoders import contexts, randomize

LOSS = LossConfig(backend="torch")
STREAMING = parse_context("chunk=2,left=3")
CONTEXTS = {DENSE: FULL, SPARSE: STREAMING}
AT_ONCE = GrowthConfig(kind="cubic", times=1, start=0)
# Each step draws one member for sure.
ONLY = {
    DENSE: {"pruning": SelfPruningConfig(dense_steps=10**9)},
    SPARSE: {"pruning": SelfPruningConfig(draws=(1, 10**6))},
}


def layers_of(block: tuple[int, int], sparsity: float, shapes: list[tuple[int, int]], seed: int) -> nn.ModuleDict:
    """Masked layers of (blocks down, blocks across)."""
    torch.manual_seed(seed)
    how = Compression(mask=Mask(sparsity=sparsity, block=block))
    return nn.ModuleDict(
        {
            f"l{number}": CompressedLinear(across * block[1], down * block[0], how)
            for number, (down, across) in enumerate(shapes)
        }
    )


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW after a step, so that it has second moments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


# --- masks

BLOCKS = st.sampled_from([(8, 1), (1, 8), (2, 3), (1, 1)])
SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=30)
@given(BLOCKS, SHAPES, st.integers(0, 3), st.integers(1, 3), st.sampled_from([0.1, 0.2, 0.5]), st.sampled_from([0.3, 0.67, 0.87]),
       st.sampled_from(["l1", "l2", "adam"]), st.integers(0, 10**6))  # fmt: skip
def test_masks_are_nested_and_have_the_density_of_the_formula(
    block: Any, shapes: Any, start: int, interval: int, share: float, sparsity: float, score: Any, seed: int
) -> None:
    """After n times (1 - share)^n of each layer's blocks are left, to one block, whatever the weights do meanwhile."""
    model, growth = (
        layers_of(block, sparsity, shapes, seed),
        GrowthConfig(start=start, interval=interval, share=share, score=score),
    )
    optimizer = optimizer_of(model)
    final = growth.final(sparsity)
    frozen: list[Tensor] = []
    for step in range(final + 3):
        before = [layer.mask.clone() for _, layer, _ in masked_layers(model)]
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.5)
            parameter.data[torch.rand_like(parameter) < 0.2] = 0.0  # zeros are not chosen in place of what is gone
        grow_masks(model, optimizer, step, growth)
        times = 0 if step < start else (step - start) // interval + 1
        left = max(1 - sparsity, (1 - share) ** times)
        assert growth.sparsity_at(step, sparsity) == pytest.approx(1 - left)
        for (_, layer, _), earlier in zip(masked_layers(model), before, strict=True):
            assert not (layer.mask & ~earlier).any()
            blocks = (
                layer.mask.view(-1, block[0], layer.in_features // block[1], block[1]).permute(0, 2, 1, 3).flatten(2)
            )
            assert torch.equal(blocks.all(-1), blocks.any(-1))
            assert abs(int(blocks.all(-1).sum()) - left * blocks[..., 0].numel()) <= 0.5 + 1e-6
        if step == final:
            frozen = [layer.mask.clone() for _, layer, _ in masked_layers(model)]
    assert all(torch.equal(layer.mask, mask) for (_, layer, _), mask in zip(masked_layers(model), frozen, strict=True))
    whole = sum(layer.mask.numel() for _, layer, _ in masked_layers(model))
    assert density(model) == pytest.approx(sum(int(mask.sum()) for mask in frozen) / whole)


@settings(deadline=None, max_examples=20)
@given(BLOCKS, st.sampled_from(["l1", "l2", "adam"]), st.integers(0, 10**6))
def test_the_blocks_that_matter_least_go(block: Any, score: Any, seed: int) -> None:
    model = layers_of(block, 0.5, [(3, 4)], seed)
    optimizer = optimizer_of(model)
    grow_masks(model, optimizer, 0, GrowthConfig(start=0, share=0.5, score=score))
    (layer,) = (layer for _, layer, _ in masked_layers(model))
    moment = optimizer.state[layer.weight]["exp_avg_sq"]
    importance = {}
    for down in range(3):
        for across in range(4):
            total = 0.0
            for row in range(down * block[0], (down + 1) * block[0]):
                for column in range(across * block[1], (across + 1) * block[1]):
                    weight = float(layer.weight.detach()[row, column])
                    power = {
                        "l1": abs(weight),
                        "l2": weight**2,
                        "adam": abs(weight) * float(moment[row, column]) ** 0.5,
                    }
                    total += power[score]
            importance[down, across] = total
    kept = {place for place in importance if layer.mask[place[0] * block[0], place[1] * block[1]]}
    assert kept == set(sorted(importance, key=importance.__getitem__)[6:])


def test_recomputed_masks_may_take_weights_back() -> None:
    model = layers_of((8, 1), 0.75, [(2, 6)], 0)
    (layer,) = (layer for _, layer, _ in masked_layers(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    growth = GrowthConfig(start=0, interval=1, share=0.5, monotone=False)
    grow_masks(model, optimizer, 0, growth)
    gone = ~layer.mask
    layer.weight.data[gone] = 100.0  # trained in the dense member
    grow_masks(model, optimizer, 1, growth)
    assert bool((layer.mask & gone).any()) and int(layer.mask.sum()) == layer.mask.numel() // 4


def test_the_cubic_schedule() -> None:
    growth = GrowthConfig(kind="cubic", times=4, start=2, interval=2)
    reached = [growth.sparsity_at(step, 0.8) for step in range(2, 12, 2)]
    assert reached == pytest.approx([0.8 * (1 - (1 - i / 4) ** 3) for i in (1, 2, 3, 4)] + [0.8])
    assert growth.final(0.8) == 8 and growth.sparsity_at(1, 0.8) == 0.0


@settings(deadline=None, max_examples=20)
@given(BLOCKS, st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_block_sums_and_back(block: Any, down: int, across: int, seed: int) -> None:
    values = torch.randn(down * block[0], across * block[1], generator=torch.Generator().manual_seed(seed))
    sums = block_sums(values, block)
    assert sums.shape == (down, across)
    for row in range(down):
        for column in range(across):
            part = values[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
            torch.testing.assert_close(sums[row, column], part.sum())
    spread = spread_blocks(sums, block)
    assert spread.shape == values.shape and torch.equal(spread[:: block[0], :: block[1]], sums)
    assert torch.equal(block_sums((spread == spread).float(), block), torch.full_like(sums, block[0] * block[1]))


# --- group lasso


@settings(deadline=None, max_examples=20)
@given(BLOCKS, SHAPES, st.floats(0.1, 2), st.floats(1e-4, 1), st.integers(0, 10**6))
def test_group_lasso_shrinks_blocks_by_the_formula(
    block: Any, shapes: Any, scale: float, rate: float, seed: int
) -> None:
    model = layers_of(block, 0.5, shapes, seed)
    before = [layer.weight.detach().clone() for _, layer, _ in masked_layers(model)]
    before[0][: block[0], : block[1]] = 0.0
    next(iter(masked_layers(model)))[1].weight.data.copy_(before[0])
    lasso_decay(model, scale, rate)
    for weight, (_, layer, _) in zip(before, masked_layers(model), strict=True):
        rows, columns = range(0, weight.shape[0], block[0]), range(0, weight.shape[1], block[1])
        places = [(slice(r, r + block[0]), slice(c, c + block[1])) for r in rows for c in columns]
        norms = [float(weight[place].square().sum().sqrt()) for place in places]
        strength = scale * sum(norms) / len(norms)
        for place, norm in zip(places, norms, strict=True):
            expected = weight[place] * max(0.0, 1 - rate * strength / norm) if norm > 0 else weight[place]
            torch.testing.assert_close(layer.weight[place], expected, rtol=1e-4, atol=1e-6)
            assert float(layer.weight[place].norm()) == pytest.approx(
                max(0.0, norm - rate * strength), rel=1e-3, abs=1e-5
            )


def test_group_lasso_empties_blocks_that_nothing_needs() -> None:
    """Half of the inputs are silent: without the decay their blocks stay, with it they vanish; the needed ones stay either way."""
    norms = {}
    for scale in (0.0, 1.0):
        model = layers_of((8, 1), 0.5, [(1, 6)], 3)
        (layer,) = (layer for _, layer, _ in masked_layers(model))
        layer.switch(masks=False, integers=False)
        torch.manual_seed(1)
        x = torch.randn(64, 6)
        x[:, 3:] = 0
        target = x[:, :3] @ torch.randn(3, 8) * 3
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
        for _ in range(150):
            lasso_decay(model, scale, 0.02)
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
        norms[scale] = layer.weight.detach().norm(dim=0)
    assert float(norms[0.0].min()) > 0.1 and float(norms[1.0][3:].max()) < 1e-3
    assert bool((norms[1.0][:3] > 0.5 * norms[0.0][:3]).all())


# --- the loss


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        torch.randn(2, 80, 80, generator=generator) * 3 - 6, torch.tensor([80, 61]), ["a", "b"], ["", ""], ["", ""], [0.8, 0.6],
        torch.tensor([[2, 3, 4], [5, 5, 0]]), torch.tensor([3, 2]),
    )  # fmt: skip


def super_model(dropout: float = 0.0, levels: tuple[float, ...] = ()) -> AsrModel:
    """A supernet with attention, some of whose layers are masked, at a sparsity of 0.5, in training mode."""
    torch.manual_seed(0)
    masked = [
        "encoder.blocks.0.feedforward1.widen",
        "encoder.blocks.1.conv.out",
        "encoder.submodels.joint.layers.0.query",
    ]
    spec: dict[str, Any] = {
        "vocab_size": 11,
        "encoder": {"dim": 16, "num_layers": 2, "feedforward_dim": 24, "kernel_size": 5, "dropout": dropout},
        "predictor": {"dim": 12},
        "joiner_dim": 14,
        "submodels": {"joint": {"kind": "attention", "layers": [0, 1], "dim": 16, "heads": 2, "dropout": dropout}},
        "variants": {
            DENSE: {"submodels": ["joint"], "masks": False},
            SPARSE: {"submodels": ["joint"], "contexts": [str(STREAMING)]},
        },
        "variant": SPARSE,
        "compression": {path: {"mask": {"sparsity": 0.5, "block": [8, 1]}, "levels": list(levels)} for path in masked},
    }
    model = AsrModel(from_dict(ModelSpec, spec, "test"))
    randomize(model, 5)
    grow_masks(model, optimizer_of(model), 0, AT_ONCE)
    return model.train()


def one_loss(model: AsrModel, member: str, **options: Any) -> Tensor:
    torch.manual_seed(3)
    return supernet_loss(model, batch(), 5, LOSS, CONTEXTS, **ONLY[member], **options).losses  # type: ignore[arg-type]


def test_each_member_is_a_model_by_itself() -> None:
    """Masked forward is forward with weights times masks, in the sparse context; dense sees no masks."""
    model = super_model()
    for member in (DENSE, SPARSE):
        plain = dequantized_model(in_variant(model, member)).train()
        assert not compressed_layers(plain)
        expected = forward_losses(plain, batch(), 5, LOSS, None, CONTEXTS[member], None).losses
        torch.testing.assert_close(one_loss(model, member), expected)
        other = forward_losses(
            plain, batch(), 5, LOSS, None, CONTEXTS[DENSE if member == SPARSE else SPARSE], None
        ).losses
        assert not torch.allclose(other, expected)


def test_masked_weights_learn_in_dense_steps_alone() -> None:
    model = super_model()
    for member in (SPARSE, DENSE):
        model.zero_grad()
        one_loss(model, member).sum().backward()
        for path, layer in compressed_layers(model).items():
            assert layer.weight.grad is not None and layer.weight.grad[layer.mask].any(), path
            assert bool(layer.weight.grad[~layer.mask].any()) == (member == DENSE), path


def test_members_are_drawn_in_their_ratio_and_logged_in_every_process() -> None:
    model, drawn = super_model(), {DENSE: 0, SPARSE: 0}
    for seed in range(40):
        torch.manual_seed(seed)
        output = supernet_loss(model, batch(), 0, LOSS, CONTEXTS, pruning=SelfPruningConfig(draws=(1, 3)))
        (member,) = (name for name in drawn if output.metrics[name].divisor)
        drawn[member] += 1
        assert {DENSE, SPARSE, "sparsity"} <= set(output.metrics)
        assert float(output.metrics[member].total) == pytest.approx(float(output.losses.sum()))
        (other,) = set(drawn) - {member}
        assert output.metrics[other].total == 0.0
    assert 3 <= drawn[DENSE] <= 18
    torch.manual_seed(1)
    assert (
        supernet_loss(model, batch(), 4, LOSS, CONTEXTS, pruning=SelfPruningConfig(draws=(1, 10**6), dense_steps=5))
        .metrics[DENSE]
        .divisor
    )


def test_adaptive_dropout_is_less_in_sparse_steps_beside_masks() -> None:
    model = super_model(dropout=0.5)
    everywhere = [module for module in model.modules() if isinstance(module, Dropout) and module.p > 0]
    block, submodel = model.encoder.blocks[0], model.encoder.submodels["joint"]
    beside = [block.feedforward1.dropout, model.encoder.blocks[1].conv.dropout, submodel.layers["0"].dropout]  # type: ignore[union-attr, index, operator]
    with sparse_dropout(model, dict.fromkeys(compressed_layers(model), 0.75)):
        assert [module.dropped_levels for module in beside] == [32, 32, 32]  # type: ignore[union-attr]
        assert all(module.dropped_levels == 128 for module in everywhere if not any(module is one for one in beside))
        x = torch.ones(20000)
        assert float((beside[0](x) == 0).float().mean()) == pytest.approx(0.125, abs=0.02)  # type: ignore[operator]
        assert float(beside[0](x).mean()) == pytest.approx(1.0, abs=0.02)  # type: ignore[operator]
    assert all(module.dropped_levels == 128 for module in everywhere)
    same = one_loss(model, DENSE, sparsity=0.75)
    assert torch.equal(one_loss(model, DENSE, sparsity=0.75, adaptive_dropout=True), same)
    assert not torch.equal(
        one_loss(model, SPARSE, sparsity=0.75, adaptive_dropout=True), one_loss(model, SPARSE, sparsity=0.75)
    )


def test_the_dense_member_teaches_and_learns_nothing_from_it() -> None:
    model, how = super_model(), InPlaceConfig(scale=0.7)
    plain = one_loss(model, SPARSE)
    taught = one_loss(model, SPARSE, distillation=how)
    divergence = (taught - plain) / 0.7
    assert bool((divergence > 1e-3).all())
    assert torch.equal(one_loss(model, DENSE, distillation=how), one_loss(model, DENSE))
    # No gradient reaches the teacher: what only the dense member uses has none.
    model.zero_grad()
    taught.sum().backward()
    for layer in compressed_layers(model).values():
        assert layer.weight.grad is not None and not layer.weight.grad[~layer.mask].any()
    # Without masks and in one context, the two are the same model, which has nothing to teach itself.
    for layer in compressed_layers(model).values():
        layer.mask.fill_(True)
    alike = {DENSE: STREAMING, SPARSE: STREAMING}
    for masks in (None, SpanMasks(torch.zeros(16), (0.2, 3), (0.1, 2))):  # hidden frames are the same for both
        model.encoder.masks = masks
        output = supernet_loss(model, batch(), 5, LOSS, alike, pruning=ONLY[SPARSE]["pruning"], distillation=how)
        assert float(output.metrics["distillation"].total) == pytest.approx(0.0, abs=1e-4)


@settings(deadline=None, max_examples=10)
@given(contexts, st.integers(0, 10**6))
def test_chunk_by_chunk_is_the_masked_pass_of_the_sparse_member(context: Context, seed: int) -> None:
    model = super_model().eval()
    randomize(model, seed)
    for _, layer, mask in masked_layers(model):
        layer.mask.copy_(find_mask(layer.weight.abs(), mask))
    assert context.chunk is not None
    chunks = 3
    features = torch.randn(1, 4 * context.chunk * chunks + 3, 80, generator=torch.Generator().manual_seed(seed)) * 3 - 6
    with torch.no_grad():
        whole, lens = model.encode(features, torch.tensor([features.shape[1]]), SPARSE, context)
        dense, _ = model.encode(features, torch.tensor([features.shape[1]]), DENSE, context)
        caches = model.encoder.initial_caches(1, context.left, ("joint",))
        parts = []
        for number in range(chunks):
            begin = 4 * context.chunk * number
            part, caches = model.streaming_step(features[:, begin : begin + 4 * context.chunk + 3], caches, SPARSE)
            parts.append(part)
    assert lens.tolist() == [context.chunk * chunks]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dense, whole, atol=1e-3)


# --- members between the two

LEVELS = (0.0, 0.2, 0.4)


@settings(deadline=None, max_examples=20)
@given(BLOCKS, st.booleans(), st.integers(0, 10**6))
def test_masks_of_members_are_nested_and_no_sparser_than_the_sparsest(block: Any, monotone: bool, seed: int) -> None:
    model = layers_of(block, 0.75, [(3, 8), (1, 5)], seed)
    for layer in compressed_layers(model).values():
        layer.how = layer.active = Compression(mask=layer.how.mask, levels=list(LEVELS))
        shape = (layer.out_features // block[0], layer.in_features // block[1])
        layer.register_buffer("reach", torch.full(shape, 3, dtype=torch.uint8))
    growth = GrowthConfig(kind="cubic", times=4, start=0, interval=1, monotone=monotone)
    gone: dict[tuple[str, int], Tensor] = {}
    for step in range(4):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        grow_masks(model, torch.optim.SGD(model.parameters(), lr=0.1), step, growth)
        now = growth.sparsity_at(step, 0.75)
        for path, layer, mask in masked_layers(model):
            number, scores = layer.reach.numel(), block_sums(layer.weight.detach().square(), mask.block)
            every = [*(layer.level_mask(level) for level in range(3)), layer.mask]
            for share, one in zip((*LEVELS, 0.75), every, strict=True):
                stay = one[:: block[0], :: block[1]]
                assert int(stay.sum()) == number - round(min(share, now) * number)
                if not monotone:  # the best by their size
                    assert not stay.any() or stay.all() or bool(scores[stay].min() >= scores[~stay].max())
            assert not any((inner & ~outer).any() for outer, inner in pairwise(every))
            for member, one in enumerate(every):  # what has gone from any of them stays away
                assert not monotone or not (one & gone.get((path, member), torch.zeros_like(one))).any()
                gone[path, member] = ~one


def test_a_batch_is_split_between_the_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part's losses are those of its member cut out as a model by itself; every member has a part."""
    model = super_model(levels=LEVELS)
    four = replace(
        batch(), features=batch().features[[0, 1, 0, 1, 0]], feature_lens=batch().feature_lens[[0, 1, 0, 1, 0]],
        cut_ids=list("abcde"), texts=[""] * 5, languages=[""] * 5, durations=[1.0] * 5, encoder_frames=[],
        symbols=batch().symbols[[0, 1, 0, 1, 0]], symbol_lens=batch().symbol_lens[[0, 1, 0, 1, 0]],
    )  # fmt: skip
    drawn: list[dict[str, int | None]] = []
    parts: list[tuple[str, Batch]] = []
    draw, divide = loss_module.random_levels, loss_module.split
    monkeypatch.setattr(loss_module, "random_levels", lambda model: drawn.append(draw(model)) or drawn[-1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(loss_module, "split", lambda *words: parts.extend(divide(*words)) or parts)  # type: ignore[func-returns-value]
    torch.manual_seed(4)
    output = supernet_loss(model, four, 5, LOSS, CONTEXTS, pruning=SelfPruningConfig(), random=2, sparsity=0.5)
    assert sorted(member for member, _ in parts) == [DENSE, RANDOM, RANDOM, SPARSE]
    assert [cut_id for _, part in parts for cut_id in part.cut_ids] == four.cut_ids and len(output.losses) == 5
    assert drawn[0] != drawn[1]
    expected = []
    for member, part in parts:
        if member == RANDOM:
            levels = drawn.pop(0)
            shares = {block_of(path): 0.5 if level is None else LEVELS[level] for path, level in levels.items()}
            alone = cut(model, shares)
            assert all(layer.level is None for layer in compressed_layers(model).values())
        else:
            alone = in_variant(model, member)
        context = FULL if member == DENSE else STREAMING
        expected.append(forward_losses(dequantized_model(alone).train(), part, 5, LOSS, None, context, None).losses)
    torch.testing.assert_close(output.losses, torch.cat(expected))
    assert output.count == four.num_encoder_frames
    assert sum(float(output.metrics[name].divisor or 0) for name in (DENSE, SPARSE, RANDOM)) == output.count


def test_the_teacher_takes_no_gradient_from_later_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast keeps the weights that the teacher's pass has cast without a gradient; the dense part after it casts them again."""
    monkeypatch.setattr(
        loss_module, "split", lambda batch, members: [(SPARSE, batch.part(0, 1)), (DENSE, batch.part(1, 2))]
    )
    under_mask = []
    for dtype in (torch.float32, torch.bfloat16):
        model = super_model(levels=LEVELS)
        layer = compressed_layers(model)["encoder.blocks.0.feedforward1.widen"]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = supernet_loss(
                model,
                batch(),
                5,
                LOSS,
                CONTEXTS,
                pruning=SelfPruningConfig(),
                random=2,
                distillation=InPlaceConfig(scale=0.1),
            )
        output.losses.sum().backward()
        assert isinstance(layer, CompressedLinear) and layer.weight.grad is not None and not layer.mask.all()
        under_mask.append(float(layer.weight.grad[~layer.mask].norm()))
    assert under_mask[1] == pytest.approx(under_mask[0], rel=0.1) and under_mask[1] > 0


def test_a_number_of_random_members_without_their_sparsities_is_refused() -> None:
    settings = SupernetConfig(members=MembersConfig(random=3))
    assert any(line.startswith("members.random: has no effect") for line in contradictions(settings, 0))
    settings = SupernetConfig(members=MembersConfig(random=3, sparsities=[0.2]))
    assert not any("members.random" in line for line in contradictions(settings, 0))
    frozen = SupernetConfig(members=MembersConfig(random=3), freeze_masks=True)  # the parent's sparsities
    assert contradictions(frozen, 0) == []
    (line,) = contradictions(replace(frozen, members=MembersConfig(sparsities=[0.2])), 0)
    assert line.endswith("leave out members.sparsities")


def test_fewer_utterances_than_members() -> None:
    torch.manual_seed(0)
    seen = {
        member for _ in range(40) for member, part in split(batch(), [DENSE, SPARSE, RANDOM, RANDOM]) if part.cut_ids
    }
    assert seen == {DENSE, SPARSE, RANDOM}
    for _ in range(5):
        assert [part.cut_ids for _, part in split(batch(), [DENSE, SPARSE, RANDOM, RANDOM])] == [["a"], ["b"]]


def test_random_members_draw_a_sparsity_for_each_block() -> None:
    model = super_model(levels=LEVELS)
    torch.manual_seed(0)
    drawn = [random_levels(model) for _ in range(80)]
    by_block = [{block_of(path): level for path, level in one.items()} for one in drawn]
    assert all(len({levels[path] for path in levels if block_of(path) == 0}) == 1 for levels in drawn)
    pairs = {(one[0], one[1]) for one in by_block}
    assert len(pairs) == 16  # four choices in each of two blocks


def test_bytes_of_members_are_those_of_what_is_cut() -> None:
    model = super_model(levels=LEVELS)
    costs, rest, plain = byte_costs(model)
    shares = sparsities(model)
    assert shares == [*LEVELS, 0.5] and groups(model) == [0, 1]
    for genome in [(0, 0), (3, 3), (1, 2), (2, 0)]:
        rows = sizes(cut(model, {0: shares[genome[0]], 1: shares[genome[1]]})).values()
        counted = rest + sum(row[choice] for row, choice in zip(costs, genome, strict=True))
        assert counted == pytest.approx(sum(row["bytes"] for row in rows), abs=4)
        assert plain == sum(row["float_bytes"] for row in rows)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6), st.floats(0, 1))
def test_the_search_stays_within_the_budget_and_finds_the_best_of_few(
    blocks: int, last: int, seed: int, share: float
) -> None:
    draw = Random(seed)
    costs = [sorted((draw.uniform(1, 100) for _ in range(last + 1)), reverse=True) for _ in range(blocks)]
    values = {genome: draw.random() for genome in product(range(last + 1), repeat=blocks)}
    least, most = (sum(row[choice] for row in costs) for choice in (-1, 0))
    allowed = least + share * (most - least) + 1e-9
    asked: list[tuple[int, ...]] = []

    def loss(genome: tuple[int, ...]) -> float:
        asked.append(genome)
        return values[genome]

    def cost(genome: tuple[int, ...]) -> float:
        return sum(row[choice] for row, choice in zip(costs, genome, strict=True))

    found = search(loss, costs, allowed, SearchConfig(population=64, generations=6, parents=8, mutation=0.5, seed=seed))
    assert all(cost(genome) <= allowed for genome in asked) and len(asked) == len(set(asked))
    assert values[found] == min(values[genome] for genome in asked)
    possible = [genome for genome in values if cost(genome) <= allowed]
    if len(possible) <= 20:
        assert values[found] == min(values[genome] for genome in possible)
    with pytest.raises(UserError, match="raise it"):
        search(loss, costs, least - 0.5, SearchConfig())
