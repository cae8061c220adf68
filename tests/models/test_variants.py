"""Masks and integers that a variant switches on and off, and models rebuilt from others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asrkit.config import from_dict, to_dict
from asrkit.export.evaluated import open_evaluated
from asrkit.models import AsrModel, ModelSpec, load_model
from asrkit.models.compression import QuantizationConfig, compressed_layers, keep_pruned, quantized_spec
from asrkit.models.encoder import Encoder
from asrkit.models.registry import write_model
from asrkit.models.sizes import sizes
from asrkit.models.spec import EncoderSpec, FeatureSpec, VariantSpec
from asrkit.models.surgery import (
    dequantized_model,
    in_variant,
    is_mask,
    rebuild,
    recompressed,
    reinitialized,
    with_variant,
)
from asrkit.nn.compression import find_mask, size_in_bits
from asrkit.nn.context import FULL, Context
from asrkit.run_dir import LINEAGE, WEIGHTS, digests_of, open_run, read_yaml, write_yaml
from asrkit.stages.info import describe_run
from asrkit.training.checkpoint import save_weights
from helpers.small_runs import write_run

COMPRESSION: dict[str, Any] = {
    "encoder.blocks.0.conv.out": {"mask": {"keep": 2, "group": 4}, "weights": {"bits": 4}},
    "encoder.blocks.0.feedforward1.narrow": {"weights": {"bits": 8}, "activations": {"bits": 8}},
    "encoder.blocks.0.feedforward2.widen": {"mask": {"sparsity": 0.5, "block": [4, 1]}},
    "joiner.out": {"mask": {"sparsity": 0.5}},
    "ctc_head": {"weights": {"bits": 2}},
}
VARIANTS: dict[str, Any] = {
    "dense": {"masks": False, "integers": False},
    "sparse": {"contexts": ["chunk=4,left=8", "full"]},
    "masked": {"integers": False},
    "integer": {"masks": False},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose masks are not those of zeroed weights: the latent ones are all there, as a supernet has them."""
    spec = {"compression": COMPRESSION, "variants": VARIANTS, "variant": "sparse"}
    path = write_run(tmp_path_factory.mktemp("exp") / "super", spec)
    model = load_model(open_run(path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in compressed_layers(model).values():
            if layer.how.mask is not None:
                layer.mask.copy_(find_mask(layer.weight.abs(), layer.how.mask))
    save_weights(path / WEIGHTS, model)
    write_yaml(path / LINEAGE, [read_yaml(path / LINEAGE)[-1] | digests_of(path)])
    return path


@pytest.fixture
def model(run: Path) -> AsrModel:
    return load_model(open_run(run))


def only(model: AsrModel, masks: bool, integers: bool) -> AsrModel:
    """The same weights in a model whose spec has the masks or integers alone, in every variant."""
    left = {path: how.restricted(masks, integers) for path, how in model.spec.compression.items()}
    other = recompressed(model, {path: how for path, how in left.items() if how.mask or how.weights})
    on = {name: replace(variant, masks=True, integers=True) for name, variant in model.spec.variants.items()}
    return rebuild(replace(other.spec, variants=on), other)


FEATURES = torch.randn(2, 67, 80, generator=torch.Generator().manual_seed(3)) * 4 - 8


@torch.no_grad()
def outputs(model: AsrModel, variant: str | None) -> list[Tensor]:
    """Encoder, joiner and CTC head in one pass, and chunk by chunk."""
    made = []
    for context in (FULL, Context(4, 8)):
        encoder_out, _ = model.encode(FEATURES, torch.tensor([67, 50]), variant, context)
        made += [encoder_out, model.ctc_log_probs(encoder_out)]
        made.append(model.joiner(model.joiner.project_encoder(encoder_out), torch.zeros(1)))
    caches = model.encoder.initial_caches(2, 8)
    for begin in (0, 16):
        chunk, caches = model.streaming_step(FEATURES[:, begin : begin + 19], caches, variant)
        made += [chunk, model.ctc_log_probs(chunk), *caches.conv]
    return made


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_variant_is_the_model_without_what_it_switches_off(model: AsrModel, variant: str) -> None:
    """Bit for bit: dense is the uncompressed model, sparse the compressed one, and each is so after any other."""
    wanted = model.spec.variants[variant]
    alone = only(model, wanted.masks, wanted.integers)
    assert bool(compressed_layers(alone)) == (wanted.masks or wanted.integers)
    expected = outputs(alone, variant)
    for other in VARIANTS:
        before = outputs(model, other)
        assert same(outputs(model, variant), expected)
        assert (other == variant) == same(before, expected)


def test_the_default_variant_is_selected_at_first(model: AsrModel) -> None:
    vector = torch.randn(3, 16)
    everything_on = only(model, True, True)
    with torch.no_grad():
        assert torch.equal(model.ctc_head(vector), everything_on.ctc_head(vector))
        model.encode(FEATURES, torch.tensor([67, 50]), "dense")
        assert torch.equal(model.ctc_head(vector), only(model, False, False).ctc_head(vector))
    assert model.selected == "dense" and model.select() == () and model.selected == "sparse"


def test_a_pass_without_masks_or_integers(model: AsrModel) -> None:
    plain = {
        switches: outputs(only(model, *switches), "sparse")
        for switches in [(True, True), (False, True), (True, False), (False, False)]
    }
    assert same(outputs(model, "sparse"), plain[True, True])
    with model.compression_off():
        assert same(outputs(model, "sparse"), plain[False, False]) and same(
            outputs(model, "dense"), plain[False, False]
        )
    with model.compression_off(integers=False):
        assert same(outputs(model, "sparse"), plain[False, True])
        with model.compression_off(masks=False):
            assert same(outputs(model, "sparse"), plain[False, False])
        assert same(outputs(model, "sparse"), plain[False, True])
    with pytest.raises(RuntimeError, match="stop"), model.compression_off(masks=False):
        assert same(outputs(model, "sparse"), plain[True, False])
        raise RuntimeError("stop")
    assert same(outputs(model, "sparse"), plain[True, True])


def test_gradients_are_of_what_was_on(model: AsrModel) -> None:
    """Also where another variant runs before the backward pass, as members of a supernet do."""
    layer = compressed_layers(model)["encoder.blocks.0.feedforward2.widen"]
    pruned = ~layer.mask
    encoder_out, _ = model.encode(FEATURES, torch.tensor([67, 50]), "masked")
    model.select("dense")
    encoder_out.square().sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad[pruned].any()
    layer.weight.grad = None
    encoder_out, _ = model.encode(FEATURES, torch.tensor([67, 50]), "dense")
    model.select("masked")
    encoder_out.square().sum().backward()
    grad: Any = layer.weight.grad
    assert grad[pruned].any()


def test_weights_that_a_dense_variant_uses_are_not_zeroed(model: AsrModel) -> None:
    layer = compressed_layers(model)["encoder.blocks.0.feedforward2.widen"]
    keep_pruned(model)
    assert layer.weight[~layer.mask].all()
    alone = in_variant(model, "sparse")
    keep_pruned(alone)
    layer = compressed_layers(alone)["encoder.blocks.0.feedforward2.widen"]
    assert not layer.weight[~layer.mask].any() and layer.weight[layer.mask].all()


def test_a_model_in_one_variant(model: AsrModel) -> None:
    for variant in VARIANTS:
        alone = in_variant(model, variant)
        assert same(outputs(alone, variant), outputs(model, variant))
        assert same(outputs(dequantized_model(alone), variant)[:1], outputs(alone, variant)[:1]) or compressed_layers(
            alone
        )
        assert list(alone.spec.variants) == [variant] and alone.spec.variants[variant].masks
    alike = only(model, True, True)
    assert in_variant(alike, "dense") is alike
    dense = in_variant(model, "dense")
    assert not compressed_layers(dense) and not any(is_mask(name) for name in dense.state_dict())
    # What is quantized afterwards is on in the one variant there is.
    settings = QuantizationConfig()
    assert not same(outputs(rebuild(quantized_spec(dense, settings), dense), "dense"), outputs(dense, "dense"))


def test_sizes_are_those_of_a_variant(model: AsrModel, run: Path) -> None:
    stored = {}
    for variant in VARIANTS:
        model.select(variant)
        rows = sizes(model)
        assert rows == sizes(in_variant(model, variant)), variant
        stored[variant] = sum(row["bytes"] for row in rows.values())
        if variant == "dense":
            assert all(
                row["bytes"] == row["float_bytes"] and not row["weights"] and not row["bits"] for row in rows.values()
            )
    assert stored["sparse"] < stored["masked"] < stored["dense"] and stored["integer"] < stored["dense"]
    layer = compressed_layers(model)["encoder.blocks.0.feedforward2.widen"]
    model.select("dense")
    assert size_in_bits(layer) == 32 * (layer.weight.numel() + layer.out_features)
    described = describe_run(run)
    assert {row["variant"]: row["bytes"] for row in described["variants"]} == stored
    assert [(row["masks"], row["integers"]) for row in described["variants"]] == [
        *[(False, False), (True, True), (True, False), (False, True)]
    ]
    assert sum(row["bytes"] for row in described["compression"]["parts"]) == stored["sparse"]
    of_run = open_evaluated(run)
    for variant in ("dense", "sparse", "dense"):  # asked in any order
        bare = {name: row["bytes"] for name, row in sizes(in_variant(model, variant)).items() if name != "ctc_head"}
        assert of_run.size(variant, "greedy") == sum(bare.values())


def test_the_switches_are_in_model_yaml(run: Path, tmp_path: Path) -> None:
    assert open_run(run).model_spec["variants"]["dense"] == {
        "submodels": [], "contexts": ["full"], "masks": False, "integers": False,
    }  # fmt: skip
    assert VariantSpec() == VariantSpec(masks=True, integers=True)
    write_model(tmp_path, load_model(open_run(run)).spec)
    assert (tmp_path / "model.yaml").read_bytes() == (run / "model.yaml").read_bytes()


# --- the encoder's two halves


def test_the_encoder_is_its_two_halves(model: AsrModel) -> None:
    lens = torch.tensor([67, 50])
    for context in (FULL, Context(4, 8)):
        x, frames = model.encoder.embed(FEATURES, lens, context)
        assert x.shape == (2, 16, 16) and frames.tolist() == [16, 11]
        halves = model.encoder.layers(x, frames, (), context)
        assert torch.equal(halves, model.encoder(FEATURES, lens, (), context)[0])
    # A frame's embedding is of its own 7 feature frames.
    changed = FEATURES.clone()
    changed[:, 4 * 5 + 7 :] += 1
    assert torch.equal(model.encoder.embed(changed, lens)[0][:, :6], model.encoder.embed(FEATURES, lens)[0][:, :6])


def test_masked_frames_enter_between_the_halves() -> None:
    """What pretraining does: other vectors in place of some frames; those too short for any give none."""
    torch.manual_seed(0)
    spec = EncoderSpec(dim=8, num_layers=2, feedforward_dim=8, kernel_size=3, subsampling_channels=(2, 2))
    encoder = Encoder(spec, FeatureSpec()).eval()
    lens = torch.tensor([67, 50])
    x, frames = encoder.embed(FEATURES, lens)
    masked = x.clone()
    masked[:, 4] = 1.0
    assert not torch.equal(encoder.layers(masked, frames), encoder.layers(x, frames))
    none, no_frames = encoder.embed(FEATURES[:, :6], torch.tensor([6, 3]))
    assert (
        none.shape == (2, 0, 8) and no_frames.tolist() == [0, 0] and encoder.layers(none, no_frames).shape == none.shape
    )


# --- surgery


def test_rebuild_takes_over_every_weight_or_says_which_is_amiss(model: AsrModel) -> None:
    submodel = {"kind": "attention", "layers": [0], "dim": 8, "heads": 2}
    larger = from_dict(ModelSpec, {**to_dict(model.spec), "submodels": {"near": submodel}}, "test")
    with pytest.raises(RuntimeError, match=r"missing \['encoder.submodels.near.layers.0.norm.weight'"):
        rebuild(larger, model)
    torch.manual_seed(4)
    grown = rebuild(larger, model, new=("encoder.submodels.near.",))
    torch.manual_seed(4)
    fresh = AsrModel(larger).state_dict()
    old = model.state_dict()
    assert not grown.training and grown.spec == larger
    for name, tensor in grown.state_dict().items():
        assert torch.equal(tensor, old[name] if name in old else fresh[name]), name
    with pytest.raises(RuntimeError, match=r"left over \['encoder.submodels.near"):
        rebuild(model.spec, grown)
    back = rebuild(model.spec, grown, drop=("encoder.submodels.near.",))
    assert all(torch.equal(tensor, old[name]) for name, tensor in back.state_dict().items())
    # A tensor that goes is not kept because the spec has one of its name: it begins anew, if it may.
    with pytest.raises(RuntimeError, match=r"missing \['ctc_head.weight', 'ctc_head.bias'\]"):
        rebuild(model.spec, model, drop=("ctc_head.w", "ctc_head.b"))
    wider = replace(model.spec, encoder=replace(model.spec.encoder, dim=24))
    with pytest.raises(RuntimeError, match="size mismatch"):
        rebuild(wider, model)


def test_new_weights_keep_buffers_and_idle_submodels(model: AsrModel) -> None:
    submodels = {name: {"kind": "adapter", "layers": [0], "dim": 4} for name in ("one", "two")}
    spec = from_dict(ModelSpec, {**to_dict(model.spec), "submodels": submodels}, "test")
    before = rebuild(spec, model, new=("encoder.submodels.",))
    after = reinitialized(before, ["one"]).state_dict()
    buffers = {name for name, _ in before.named_buffers()}
    for name, tensor in before.state_dict().items():
        if name in buffers or name.startswith("encoder.submodels.two."):
            assert torch.equal(tensor, after[name]), name
        elif tensor.ndim > 1:
            assert not torch.equal(tensor, after[name]), name


def test_another_default_variant_keeps_the_switches(model: AsrModel) -> None:
    spec = with_variant(model.spec, "dense", ["chunk=4,left=0"])
    assert spec.variant == "dense"
    assert spec.variants["dense"] == VariantSpec(masks=False, integers=False, contexts=["chunk=4,left=0"])
    assert spec.variants["sparse"] == model.spec.variants["sparse"] and model.spec.variant == "sparse"
