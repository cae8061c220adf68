"""The encoder with any sub-models: chunk by chunk equals the masked parallel pass, the future changes no past, and
attention is what its definition says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from asrkit.config import from_dict
from asrkit.decoding.acoustic import encode_by_chunks
from asrkit.models import AsrModel, ModelSpec
from asrkit.models.compression import compressed_layers, linear_layers
from asrkit.models.encoder import Caches, join_streams
from asrkit.nn.compression import compress, find_mask
from asrkit.nn.compression_config import Compression
from asrkit.nn.conformer import BackboneBlock, Branch, DepthwiseConv, LayerNorm, subsampled_lens
from asrkit.nn.context import FULL, Context, parse_context, visible
from asrkit.nn.submodels import Adapter, Attention
from helpers.encoders import assert_same_frames, contexts, randomize

NAMES = ("first", "second", "third")
some = settings(deadline=None, max_examples=40)


@dataclass(frozen=True)
class Case:
    """A model's sizes and sub-models, and the seed of its weights and inputs; hypothesis prints it when a test fails."""

    num_layers: int
    kernel_size: int
    norms: str
    submodels: dict[str, dict[str, Any]]
    active: list[str]
    seed: int

    def model(self) -> AsrModel:
        """In double precision, so that only mistakes make a difference (rotations alone are float32)."""
        spec = {
            "vocab_size": 5,
            "encoder": {
                "dim": 8,
                "num_layers": self.num_layers,
                "feedforward_dim": 12,
                "kernel_size": self.kernel_size,
                "subsampling_channels": [2, 3],
                "norms": self.norms,
            },
            "predictor": {"dim": 4},
            "joiner_dim": 4,
            "submodels": self.submodels,
            "variants": {"backbone": {}, "chosen": {"submodels": self.active}},
            "variant": "chosen",
        }
        model = AsrModel(from_dict(ModelSpec, spec, "case")).double().eval()
        randomize(model, self.seed)
        return model

    def features(self, *lens: int) -> tuple[Tensor, Tensor]:
        """Noise (B, T, 80) that goes on beyond every utterance's end, and the lengths."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(len(lens), max(lens), 80, generator=generator).double() * 3 - 6, torch.tensor(lens)


@st.composite
def submodel_specs(draw: st.DrawFn, num_layers: int) -> dict[str, Any]:
    heads = draw(st.integers(1, 3))
    return {
        "kind": draw(st.sampled_from(["attention", "attention", "adapter"])),
        "layers": draw(st.lists(st.integers(0, num_layers - 1), min_size=1, max_size=num_layers, unique=True)),
        "position": draw(st.sampled_from(["serial", "parallel"])),
        "heads": heads,
        "dim": 2 * heads * draw(st.integers(1, 2)),
        "context": str(draw(st.one_of(st.just(FULL), contexts))),
    }


@st.composite
def cases(draw: st.DrawFn, least: int = 0) -> Case:
    """Models of 1 to 3 layers with up to three sub-models, at least ``least`` of them active, in any order."""
    num_layers = draw(st.integers(1, 3))
    submodels = {name: draw(submodel_specs(num_layers)) for name in NAMES[: draw(st.integers(least, 3))]}
    order = draw(st.permutations(list(submodels)))
    return Case(
        num_layers,
        draw(st.sampled_from([1, 3, 5, 9])),
        draw(st.sampled_from(["shared", "per_mode"])),
        submodels,
        order[: draw(st.integers(least, len(order)))],
        draw(st.integers(0, 1000)),
    )


def valid(x: Tensor, lens: Tensor) -> Tensor:
    """The frames (N, D) of a batch that belong to an utterance."""
    return x[torch.arange(x.shape[1]) < lens.unsqueeze(1)]


@some
@given(cases(), contexts, st.lists(st.integers(1, 90), min_size=1, max_size=3))
def test_chunk_by_chunk_is_the_masked_parallel_pass(case: Case, context: Context, lens: list[int]) -> None:
    model = case.model()
    features, feature_lens = case.features(*lens)
    with torch.no_grad():
        together, together_lens = model.encode(features, feature_lens, "chosen", context)
        pieces, piece_lens = encode_by_chunks(model, features, feature_lens, "chosen", context)
    assert together_lens.tolist() == piece_lens.tolist() == [max(0, (length - 3) // 4) for length in lens]
    assert bool(valid(together, together_lens).isfinite().all())
    assert_same_frames(pieces, together, together_lens)


@some
@given(
    cases(), st.one_of(st.just(FULL), contexts), st.lists(st.integers(1, 90), min_size=1, max_size=3), st.integers(2, 9)
)
def test_padding_to_a_multiple_changes_no_frame_and_no_gradient(
    case: Case, context: Context, lens: list[int], multiple: int
) -> None:
    """As a GPU pads while it computes attention."""
    model = case.model()
    x, lens_after = model.encoder.embed(*case.features(*lens), context)
    x = x.detach().requires_grad_()
    results = []
    for chosen in (1, multiple):
        y = model.encoder.layers(x, lens_after, case.active, context, multiple=chosen)
        weights = torch.arange(y.numel()).view(y.shape).cos() * (
            torch.arange(y.shape[1]) < lens_after.unsqueeze(1)
        ).unsqueeze(2)
        gradient = torch.autograd.grad((y * weights).sum(), x)[0] if y.numel() else x
        results.append((valid(y, lens_after), gradient))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)  # rotations alone are float32


COMPRESSIONS: list[dict[str, Any]] = [
    *({"weights": {"bits": bits}} for bits in (8, 4, 2)),
    {"weights": {"bits": 2, "symmetric": False}},
    {"weights": {"bits": 4, "scale_gradient": True}},
    {"mask": {"keep": 2, "group": 4, "pad": True}},
    {"mask": {"keep": 2, "group": 4, "pad": True}, "weights": {"bits": 4}},
    {"mask": {"sparsity": 0.5}, "weights": {"bits": 8}},
]


@pytest.mark.slow
@some
@given(cases(), contexts, st.sampled_from(COMPRESSIONS), st.lists(st.integers(1, 90), min_size=1, max_size=2))
def test_integers_and_masks_stream_as_they_are_trained(
    case: Case, context: Context, how: dict[str, Any], lens: list[int]
) -> None:
    model = case.model()
    compress(model.encoder, dict.fromkeys(linear_layers(model.encoder), from_dict(Compression, how, "case")))
    for layer in compressed_layers(model.encoder.double()).values():
        if layer.how.mask is not None:
            layer.mask.copy_(find_mask(layer.weight.detach().abs(), layer.how.mask))
    features, feature_lens = case.features(*lens)
    with torch.no_grad():
        plain, _ = case.model().encode(features, feature_lens, "chosen", context)
        together, together_lens = model.encode(features, feature_lens, "chosen", context)
        pieces, _ = encode_by_chunks(model, features, feature_lens, "chosen", context)
    assert_same_frames(pieces, together, together_lens)
    assert not len(valid(together, together_lens)) or not torch.equal(together, plain)


@some
@given(cases(), contexts, st.integers(7, 90), st.data())
def test_the_future_does_not_change_the_past(case: Case, context: Context, length: int, data: st.DataObject) -> None:
    assert context.chunk is not None
    model = case.model()
    features, feature_lens = case.features(length)
    num_frames = int(subsampled_lens(feature_lens))
    # The features a chunk's frames may see end 3 after the first feature of the chunk that follows.
    end = context.chunk * data.draw(st.integers(1, -(-num_frames // context.chunk)), label="chunks")
    changed = features.clone()
    changed[:, 4 * end + 3 :] = 50 * torch.randn(changed[:, 4 * end + 3 :].shape).double()
    with torch.no_grad():
        for encode in (
            lambda x: model.encode(x, feature_lens, "chosen", context),
            lambda x: encode_by_chunks(model, x, feature_lens, "chosen", context),
        ):
            before, after = encode(features)[0], encode(changed)[0]
            torch.testing.assert_close(after[:, :end], before[:, :end], rtol=1e-9, atol=1e-9)
            if num_frames > end and case.kernel_size > 1:
                assert not torch.allclose(after[:, end:], before[:, end:])


@some
@given(cases(least=1), contexts)
def test_a_chunk_sees_every_frame_of_its_own(case: Case, context: Context) -> None:
    """The window is not shorter than promised: attention in full context makes a chunk's first frame see its last."""
    assert context.chunk is not None
    assume(context.chunk > 1)
    seeing = {
        name: {**spec, "kind": "attention", "context": "full", "layers": [0]} for name, spec in case.submodels.items()
    }
    model = Case(case.num_layers, case.kernel_size, case.norms, seeing, case.active, case.seed).model()
    features, feature_lens = case.features(4 * context.chunk + 3)
    changed = features.clone()
    changed[:, -1] += 5 * torch.randn(80).double()
    with torch.no_grad():
        before, after = (model.encode(x, feature_lens, "chosen", context)[0] for x in (features, changed))
    assert not torch.equal(after[:, 0], before[:, 0])


@some
@given(
    st.one_of(st.just(FULL), contexts), st.one_of(st.just(FULL), contexts), st.integers(1, 10), st.integers(0, 12),
    st.sampled_from(["serial", "parallel"]), st.integers(0, 999),
)  # fmt: skip
def test_attention_sees_what_both_contexts_allow(
    own: Context, context: Context, length: int, padding: int, position: str, seed: int
) -> None:
    """The sub-model's context and the model's: exactly those frames of the utterance, found by differentiating."""
    spec = {"kind": "attention", "layers": [0], "heads": 1, "dim": 2, "context": str(own), "position": position}
    model = Case(1, 1, "shared", {"first": spec}, ["first"], seed).model()  # one tap: attention alone joins frames
    features, feature_lens = Case(1, 1, "shared", {}, [], seed).features(4 * length + 3, 4 * (length + padding) + 3)
    inputs: list[Tensor] = []
    model.encoder.subsampling.norm.register_forward_hook(lambda module, given, out: inputs.append(out))
    out, lens = model.encode(features, feature_lens, "chosen", context)
    for row, frames in enumerate(lens.tolist()):
        for frame in range(frames):
            (gradient,) = torch.autograd.grad((out[row, frame] * torch.arange(8)).sum(), inputs[0], retain_graph=True)
            expected = {
                other
                for other in range(frames)
                if other == frame
                or all(
                    limit.chunk is None
                    or 0 <= other - (frame // limit.chunk * limit.chunk - limit.left) < limit.left + limit.chunk
                    for limit in (own, context)
                )
            }
            assert set(gradient[row].abs().sum(1).nonzero().flatten().tolist()) == expected
            assert not gradient[1 - row].any()


@some
@given(st.integers(1, 6), st.booleans(), st.booleans(), st.lists(st.floats(-2, 2), max_size=2), st.integers(0, 999))
def test_where_submodels_attach(frames: int, streaming: bool, per_mode: bool, factors: list[float], seed: int) -> None:
    """The block's equations, with branches that are not linear so that order and input count."""
    block = BackboneBlock(6, 9, 5, 0.0, per_mode).double().eval()
    randomize(block, seed)
    generator = torch.Generator().manual_seed(seed)
    x, history = (torch.randn(2, n, 6, generator=generator).double() for n in (frames, 2))
    branches: list[Branch] = [lambda x, factor=factor: factor * x.square() for factor in factors]  # type: ignore[misc]
    padding = torch.zeros(2, frames, 1, dtype=torch.bool)
    with torch.no_grad():
        out, _ = block(x, padding, history if streaming else None, branches, [torch.cos, *branches])
        x = x + 0.5 * block.feedforward1(x, streaming)
        for factor in factors:
            x = x + factor * x**2
        convolved, _ = block.conv(x, padding, history if streaming else None)
        x = x + convolved + torch.cos(x) + sum(factor * x**2 for factor in factors)
        x = block.norm(x + 0.5 * block.feedforward2(x, streaming), streaming)
        torch.testing.assert_close(out, x, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(cases(), contexts, st.lists(st.integers(0, 4), min_size=2, max_size=4), st.integers(1, 3), st.data())
def test_streams_of_different_age_share_a_batch(
    case: Case, context: Context, ages: list[int], steps: int, data: st.DataObject
) -> None:
    assert context.chunk is not None
    model, size = case.model(), 4 * context.chunk + 3
    features, _ = case.features(*[4 * context.chunk * (max(ages) + steps) + 3] * len(ages))

    def window(row: int, chunk: int) -> Tensor:
        begin = 4 * context.chunk * chunk if context.chunk else 0
        return features[row : row + 1, begin : begin + size]

    with torch.no_grad():
        alone: list[list[Tensor]] = []
        streams: list[Caches] = []
        for row, age in enumerate(ages):
            caches = model.encoder.initial_caches(1, context.left, case.active)
            for chunk in range(age):
                _, caches = model.streaming_step(window(row, chunk), caches, "chosen")
            assert caches.frames.tolist() == [age * context.chunk]
            streams.append(caches)
            outs = []
            for chunk in range(age, age + steps):
                out, caches = model.streaming_step(window(row, chunk), caches, "chosen")
                outs.append(out)
            alone.append(outs)
        order = data.draw(st.permutations(range(len(ages))), label="order")
        rows = order[: data.draw(st.integers(1, len(order)), label="kept")]  # some streams leave, the rest change seats
        batch = join_streams(streams).map(lambda x: x[rows])
        assert [x.shape for x in batch.tensors()[1:]] == [
            (len(rows), *x.shape[1:]) for x in model.encoder.initial_caches(1, context.left, case.active).tensors()[1:]
        ]
        for step in range(steps):
            windows = torch.cat([window(row, ages[row] + step) for row in rows])
            out, batch = model.streaming_step(windows, batch, "chosen")
            for seat, row in enumerate(rows):
                torch.testing.assert_close(out[seat : seat + 1], alone[row][step], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@some
@given(cases(least=1), contexts, st.lists(st.integers(7, 70), min_size=1, max_size=3))
def test_a_silent_submodel_leaves_the_backbone_as_it_is(case: Case, context: Context, lens: list[int]) -> None:
    model = case.model()
    features, feature_lens = case.features(*lens)
    with torch.no_grad():
        speaking, _ = model.encode(features, feature_lens, "chosen", context)
        for module in model.modules():
            if isinstance(module, Attention | Adapter):
                module.silence()
        for where in (FULL, context):
            silent, out_lens = model.encode(features, feature_lens, "chosen", where)
            backbone, _ = model.encode(features, feature_lens, "backbone", where)
            assert torch.equal(valid(silent, out_lens), valid(backbone, out_lens))
        assert not torch.allclose(valid(speaking, out_lens), valid(backbone, out_lens))
        silent, _ = encode_by_chunks(model, features, feature_lens, "chosen", context)
        backbone, _ = encode_by_chunks(model, features, feature_lens, "backbone", context)
        assert torch.equal(silent, backbone)


@some
@given(cases(least=1), st.integers(1, 90), st.integers(0, 40))
def test_padding_and_neighbors_do_not_matter_in_full_context(case: Case, length: int, padding: int) -> None:
    model = case.model()
    features, feature_lens = case.features(length, length + padding)
    with torch.no_grad():
        batch, lens = model.encode(features, feature_lens, "chosen")
        alone, alone_lens = model.encode(features[:1, :length], feature_lens[:1], "chosen")
    assert lens[0] == alone_lens[0]
    torch.testing.assert_close(batch[:1, : lens[0]], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@some
@given(cases(least=1), st.sampled_from([FULL, Context(4, 6)]), st.data())
def test_gates(case: Case, context: Context, data: st.DataObject) -> None:
    """0 is the backbone, 1 the sub-models, each utterance by its own gate, and layers by theirs."""
    model = case.model()
    features, feature_lens = case.features(45, 45, 31)
    used = sorted({layer for name in case.active for layer in case.submodels[name]["layers"]})
    rows = st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3)
    by_row = data.draw(rows, label="gates of utterances")

    def encode(gates: Tensor | None, variant: str = "chosen") -> Tensor:
        out, lens = model.encode(features, feature_lens, variant, context, gates)
        return out.masked_fill((torch.arange(out.shape[1]) >= lens.unsqueeze(1)).unsqueeze(-1), 0.0)

    with torch.no_grad():
        backbone, both = encode(None, "backbone"), encode(None)
        assert torch.equal(encode(torch.zeros(case.num_layers, 1)), backbone)
        torch.testing.assert_close(encode(torch.ones(case.num_layers, 1)), both, rtol=1e-9, atol=1e-9)
        mixed = encode(torch.tensor(by_row).expand(case.num_layers, 3))
        for row, gate in enumerate(by_row):
            torch.testing.assert_close(mixed[row], (both if gate else backbone)[row], rtol=1e-9, atol=1e-9)
        # One layer open is a model whose sub-models are in that layer alone; a factor in between is in between.
        layer = data.draw(st.sampled_from(used), label="open layer")
        one_open = torch.zeros(case.num_layers, 1)
        one_open[layer] = 1.0
        opened = encode(one_open)
        assert not torch.allclose(opened, backbone)
        for name, module in model.named_modules():
            if isinstance(module, Attention | Adapter) and not name.endswith(f".{layer}"):
                module.silence()
        torch.testing.assert_close(opened, encode(None), rtol=1e-9, atol=1e-9)
        half = encode(0.5 * one_open)
        assert not torch.allclose(half, opened) and not torch.allclose(half, backbone)


@settings(deadline=None, max_examples=20)
@given(cases(), contexts, st.booleans())
def test_autocast(case: Case, context: Context, inference: bool) -> None:
    """In bfloat16 both ways run, stay finite, and are near what float32 gives."""
    model = case.model().float()
    features, feature_lens = case.features(70, 41)
    features = features.float()
    guard = torch.inference_mode() if inference else torch.no_grad()
    with guard:
        exact, lens = model.encode(features, feature_lens, "chosen", context)
        full, _ = model.encode(features, feature_lens, "chosen")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = [
                (model.encode(features, feature_lens, "chosen", context)[0], exact),
                (encode_by_chunks(model, features, feature_lens, "chosen", context)[0], exact),
                (model.encode(features, feature_lens, "chosen")[0], full),
            ]
    for rough, reference in outputs:
        assert rough.shape == reference.shape and bool(valid(rough, lens).isfinite().all())
        error = (valid(rough, lens).float() - valid(reference, lens)).square().mean().sqrt()
        assert error < 0.15 * valid(reference, lens).square().mean().sqrt()


def test_gradients_reach_every_part() -> None:
    """Of each sub-model and of the backbone, in streaming with norms of its own and in full context."""
    submodels: dict[str, Any] = {
        "first": {"kind": "attention", "layers": [0, 1], "heads": 2, "dim": 8, "context": "chunk=2,left=3"},
        "second": {"kind": "adapter", "layers": [1], "dim": 4, "position": "parallel"},
    }
    model = Case(2, 5, "per_mode", submodels, ["second", "first"], 3).model()
    features, feature_lens = Case(2, 5, "per_mode", {}, [], 4).features(60)
    for context in (FULL, Context(3, 4)):
        model.zero_grad(set_to_none=True)
        out, _ = model.encode(features, feature_lens, "chosen", context)
        (out * torch.randn_like(out)).sum().backward()
        for name, parameter in model.encoder.named_parameters():
            other_mode = (".streaming." in name) != context.streaming
            is_norm = "norm" in name.split(".")[-2] or ".streaming." in name
            if is_norm and other_mode:
                assert parameter.grad is None, name
            else:
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 8), st.integers(1, 20), st.integers(0, 100))
def test_causal_filter_uses_its_left_taps(half: int, frames: int, seed: int) -> None:
    """(K + 1) / 2 of them, each at its place: a loop's numbers, and no gradient for the others."""
    layer = DepthwiseConv(3, 2 * half + 1).double()
    randomize(layer, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, half + frames, 3, generator=generator, dtype=torch.float64)
    out = layer(x[:, half:], x[:, :half])
    expected = torch.stack(
        [
            sum((layer.weight[:, tap] * x[:, frame + tap] for tap in range(half + 1)), start=layer.bias)
            for frame in range(frames)
        ],
        dim=1,
    )
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert layer.weight.grad is not None
    assert bool((layer.weight.grad[:, : half + 1] != 0).all()) and not bool(layer.weight.grad[:, half + 1 :].any())


@settings(deadline=None, max_examples=15)
@given(cases(), contexts, st.sampled_from([3, 5, 9]))
def test_a_streaming_model_ignores_the_taps_ahead(case: Case, context: Context, kernel_size: int) -> None:
    case = Case(case.num_layers, kernel_size, case.norms, case.submodels, case.active, case.seed)
    model = case.model()
    features, feature_lens = case.features(80)
    with torch.no_grad():
        before, _ = encode_by_chunks(model, features, feature_lens, "chosen", context)
        parallel, _ = model.encode(features, feature_lens, "chosen", context)
        full, _ = model.encode(features, feature_lens, "chosen")
        filters = [module.weight for module in model.modules() if isinstance(module, DepthwiseConv)]
        assert len(filters) == case.num_layers
        for weight in filters:
            weight[:, kernel_size // 2 + 1 :].normal_()
        assert torch.equal(encode_by_chunks(model, features, feature_lens, "chosen", context)[0], before)
        assert torch.equal(model.encode(features, feature_lens, "chosen", context)[0], parallel)
        assert not torch.allclose(model.encode(features, feature_lens, "chosen")[0], full)
        for weight in filters:  # the last of those that count
            weight[:, kernel_size // 2].neg_()
        assert not torch.allclose(model.encode(features, feature_lens, "chosen", context)[0], parallel)


@pytest.mark.parametrize("per_mode", [False, True])
def test_norms_by_mode(per_mode: bool) -> None:
    norm = LayerNorm(4, per_mode)
    randomize(norm, 1)
    x = torch.randn(2, 3, 4)
    reference = torch.nn.functional.layer_norm(x, (4,))
    torch.testing.assert_close(norm(x), reference * norm.weight + norm.bias)
    chosen = norm.streaming if per_mode else norm
    assert chosen is not None
    torch.testing.assert_close(norm(x, streaming=True), reference * chosen.weight + chosen.bias)


def slow_attention(module: Attention, x: Tensor, seen: Tensor, first: int) -> Tensor:
    """By definition, one query, head and key at a time; ``first`` is the position of x's first frame."""
    x = module.norm(x)
    size = module.attention_dim // module.heads
    query, key, value = module.query(x), module.key(x), module.value(x)
    out = torch.zeros_like(query)
    for row in range(len(x)):
        for head in range(module.heads):
            part = slice(head * size, (head + 1) * size)
            for t in range(x.shape[1]):
                scores = []
                visible_frames = [s for s in range(x.shape[1]) if bool(seen[row, t, s])]
                for s in visible_frames:
                    turned = turn(query[row, t, part], first + t) @ turn(key[row, s, part], first + s)
                    scores.append(float(turned) / math.sqrt(size))
                total = sum(math.exp(score) for score in scores)
                for score, s in zip(scores, visible_frames, strict=True):
                    out[row, t, part] += math.exp(score) / total * value[row, s, part]
    return module.out(out)


def turn(vector: Tensor, position: int) -> Tensor:
    """Rotate channels i and i + E / 2 by position / 10000^(2 i / E), as numbers of the complex plane."""
    half = len(vector) // 2
    turned = vector.clone()
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / len(vector))
        z = complex(float(vector[i]), float(vector[half + i])) * complex(math.cos(angle), math.sin(angle))
        turned[i], turned[half + i] = z.real, z.imag
    return turned


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 2), st.integers(0, 50), st.integers(0, 999))
def test_attention_by_definition(frames: int, heads: int, pairs: int, first: int, seed: int) -> None:
    """Equal to the loops wherever the positions begin: only differences count."""
    module = Attention(6, 2 * pairs * heads, heads, 0.0).double().eval()
    randomize(module, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, frames, 6, generator=generator, dtype=torch.float64)
    seen = (torch.rand(2, frames, frames, generator=generator) < 0.5) | torch.eye(frames, dtype=torch.bool)
    with torch.no_grad():
        out, (keys, values) = module(x, seen)
        torch.testing.assert_close(out, slow_attention(module, x, seen, first), rtol=1e-4, atol=1e-5)
        assert keys.shape == values.shape == (2, frames, 2 * pairs * heads)
        # A history that nothing sees shifts all positions.
        history = torch.randn(2, first, 2 * pairs * heads, generator=generator, dtype=torch.float64)
        blind = torch.cat([seen.new_zeros(2, frames, first), seen], dim=2)
        shifted, _ = module(x, blind, history=(history, -history))
        torch.testing.assert_close(shifted, out, rtol=1e-4, atol=1e-5)


def test_attention_knows_order() -> None:
    """Without positions, what a frame gets would not depend on the order of the others."""
    module = Attention(6, 8, 2, 0.0).double().eval()
    randomize(module, 2)
    x = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    everything = torch.ones(1, 5, 5, dtype=torch.bool)
    with torch.no_grad():
        here = module(x, everything)[0]
        there = module(x[:, [0, 4, 3, 2, 1]], everything)[0]
    assert not torch.allclose(here[:, 0], there[:, 0], atol=1e-3)


def test_attention_dims_are_checked() -> None:
    with pytest.raises(ValueError, match="even whole number"):
        Attention(8, 6, 2, 0.0)


@some
@given(
    st.lists(st.integers(-3, 40), min_size=1, max_size=8),
    st.lists(st.integers(-9, 40), min_size=1, max_size=12),
    st.one_of(st.just(FULL), contexts),
)
def test_visible_by_definition(queries: Sequence[int], keys: Sequence[int], context: Context) -> None:
    seen = visible(torch.tensor([queries]), torch.tensor([keys]), context)
    assert seen.dtype == torch.bool and seen.shape == (1, len(queries), len(keys))
    for t, query in enumerate(queries):
        for s, key in enumerate(keys):
            expected = True
            if context.chunk is not None:
                begin = math.floor(query / context.chunk) * context.chunk
                expected = key in range(begin - context.left, begin + context.chunk)
            assert bool(seen[0, t, s]) is expected


@given(st.one_of(st.just(FULL), st.builds(Context, st.integers(1, 10**6), st.integers(0, 10**6))))
def test_contexts_are_read_as_written(context: Context) -> None:
    assert parse_context(str(context)) == context
    assert context.streaming is (str(context) != "full")
    if context.chunk is not None:
        assert parse_context(f"left={context.left}, chunk={context.chunk}") == context


@pytest.mark.parametrize(
    "text",
    ["", "Full", "full,left=3", "chunk=16", "left=64", "chunk=0,left=64", "chunk=16,left=-1", "chunk=16,left=64,chunk=2",
     "chunk=1.5,left=2", "chunk=a,left=2", "16,64", "chunk=16;left=64", "chunk=16,left=64,right=2", "chunk=²,left=1"],
)  # fmt: skip
def test_what_is_no_context(text: str) -> None:
    with pytest.raises(ValueError, match="is no context: write full, or chunk=16,left=64"):
        parse_context(text)


def test_latency_of_a_chunk() -> None:
    """A chunk's first sound waits for its last sample: 16 frames of 40 ms, and what the last frame's window adds."""
    assert Context(16, 64).latency_ms == 16 * 40 + 37.5
    assert FULL.latency_ms is None


def test_too_short_for_a_frame() -> None:
    model = Case(1, 3, "shared", {}, [], 0).model()
    for frames in (1, 6):
        features, lens = torch.zeros(2, frames, 80).double(), torch.tensor([frames, 1])
        for context in (FULL, Context(2, 3)):
            out, out_lens = model.encode(features, lens, "chosen", context)
            assert out.shape == (2, 0, 8) and out_lens.tolist() == [0, 0]
        out, out_lens = encode_by_chunks(model, features, lens, "chosen", Context(2, 3))
        assert out.shape == (2, 0, 8) and out_lens.tolist() == [0, 0]
