"""The model: padding never matters, lengths are as promised, the predictor knows "no token"."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.config import from_dict
from asrkit.models import SIZES, AsrModel, ModelSpec
from asrkit.nn.conformer import DepthwiseConv


def small_model(**encoder: int) -> AsrModel:
    torch.manual_seed(0)
    spec = {
        "vocab_size": 11,
        "encoder": {
            "dim": 16,
            "num_layers": 2,
            "feedforward_dim": 24,
            "kernel_size": 5,
            "subsampling_channels": [4, 6],
            **encoder,
        },
        "predictor": {"dim": 12},
        "joiner_dim": 14,
    }
    return AsrModel(from_dict(ModelSpec, spec, "test")).eval()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 120), st.integers(0, 40))
def test_padding_changes_nothing(frames: int, padding: int) -> None:
    model = small_model()
    features = torch.randn(1, frames, 80, generator=torch.Generator().manual_seed(frames))
    alone, lens = model.encode(features, torch.tensor([frames]))
    assert alone.shape == (1, max(0, (frames - 3) // 4), 16) and lens.tolist() == [alone.shape[1]]
    beside = torch.cat([features, torch.full((1, padding, 80), -23.0)], dim=1)
    neighbor = torch.randn(1, frames + padding, 80)
    batch, batch_lens = model.encode(torch.cat([beside, neighbor]), torch.tensor([frames, frames + padding]))
    assert batch_lens[0] == lens[0]
    torch.testing.assert_close(batch[:1, : lens[0]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel_size", [1, 3, 31])
def test_depthwise_is_conv1d(kernel_size: int) -> None:
    layer = DepthwiseConv(6, kernel_size).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.conv1d(
        x.transpose(1, 2), layer.weight.unsqueeze(1), layer.bias, padding=kernel_size // 2, groups=6
    ).transpose(1, 2)
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(layer, x)


def test_predictor_contexts() -> None:
    model = small_model()
    contexts = model.predictor.contexts_of(torch.tensor([[5, 6, 7]]))
    assert contexts.tolist() == [[[-1, 0], [0, 5], [5, 6], [6, 7]]]
    nothing = model.predictor(torch.tensor([[-1, -1]]))
    torch.testing.assert_close(nothing, model.predictor.bias.relu()[None])


def test_every_parameter_learns() -> None:
    from asrkit.data.batch import Batch
    from asrkit.training.asr_loss import LossConfig, asr_loss

    model = small_model().train()
    batch = Batch(
        torch.randn(2, 80, 80),
        torch.tensor([80, 61]),
        ["a", "b"],
        ["", ""],
        ["", ""],
        [0.8, 0.6],
        torch.tensor([[2, 3, 4], [5, 5, 0]]),
        torch.tensor([3, 2]),
    )
    output = asr_loss(model, batch, 5, LossConfig(backend="torch"))
    assert output.losses.shape == (2,) and output.count == 19 + 14
    output.losses.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_an_impossible_alignment_leaves_finite_gradients() -> None:
    from asrkit.data.batch import Batch
    from asrkit.training.asr_loss import LossConfig, asr_loss

    model = small_model().train()
    batch = Batch(
        torch.randn(2, 20, 80),
        torch.tensor([20, 20]),
        ["a", "b"],
        ["", ""],
        ["", ""],
        [0.2, 0.2],
        torch.tensor([[2, 2, 4, 5, 6], [5, 0, 0, 0, 0]]),
        torch.tensor([5, 1]),
    )
    output = asr_loss(model, batch, 5, LossConfig(backend="torch"))
    output.losses.sum().backward()
    assert int(output.metrics["left_out"].total) == 1
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    # Four frames hold five symbols where one frame may hold several.
    for topology, left_out in (("modified", 1), ("regular", 0)):
        alone = asr_loss(model, batch, 5, LossConfig(backend="torch", ctc_scale=0.0, topology=topology))  # type: ignore[arg-type]
        assert int(alone.metrics["left_out"].total) == left_out
        assert (alone.losses > 0).tolist() == [not left_out, True] and bool(alone.losses.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "parameters"), [("tiny", 1_528_128), ("small", 4_948_416), ("medium", 24_774_976), ("large", 103_645_184)]
)
def test_sizes(size: str, parameters: int) -> None:
    """The numbers that models/spec.py and docs/train-backbone.md state."""
    with torch.no_grad():
        model = AsrModel(from_dict(ModelSpec, {"vocab_size": 500, **SIZES[size]}, "test"))
    assert sum(p.numel() for p in model.parameters()) == parameters
