"""Dropout by random bytes: what it drops, and that it is nn.Dropout in everything else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from asrkit.nn.conformer import FeedForward
from asrkit.nn.dropout import Dropout


@pytest.mark.parametrize(("p", "levels"), [(0.1, 26), (0.5, 128), (0.0001, 1), (0.2, 51)])
def test_a_byte_below_the_rounded_probability_drops_its_value(p: float, levels: int) -> None:
    x = torch.randn(33, 1001)
    torch.manual_seed(3)
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)  # type: ignore[call-overload]
    drawn = torch.tensor(list(words.numpy().tobytes())[: x.numel()]).view(x.shape)
    torch.manual_seed(3)
    y = Dropout(p)(x)
    assert torch.equal(y == 0, drawn < levels)
    torch.testing.assert_close(y, torch.where(drawn < levels, 0.0 * x, x * (256 / (256 - levels))))
    assert abs((y == 0).float().mean().item() - levels / 256) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gradient_is_the_mask_in_every_type(dtype: torch.dtype) -> None:
    x = torch.ones(7, 13, dtype=dtype, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert y.dtype == dtype and set(y.unique().tolist()) == {0.0, 2.0}
    assert x.grad is not None and torch.equal(x.grad, y.detach())


def test_draws_follow_the_generator() -> None:
    x, dropout = torch.ones(5, 9), Dropout(0.3)
    state = torch.get_rng_state()
    first, second = dropout(x), dropout(x)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x), first) and torch.equal(dropout(x), second) and not torch.equal(first, second)


def test_off_in_evaluation_and_without_a_probability() -> None:
    x, state = torch.randn(4, 4), torch.get_rng_state()
    assert Dropout(0.1).eval()(x) is x and Dropout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert not Dropout(0.999)(x).any()  # rounds to 1


def test_weights_are_named_as_with_nn_dropout() -> None:
    module = FeedForward(8, 16, 0.1)
    names = set(module.state_dict())
    module.dropout = nn.Dropout(0.1)  # type: ignore[assignment]
    assert set(module.state_dict()) == names
