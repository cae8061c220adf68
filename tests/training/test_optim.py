"""Optimizers and the schedule."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch

from asrkit.training.optim import OptimizerConfig, ScaledAdam, learning_rate, make_optimizer


def test_schedule_rises_then_falls() -> None:
    settings = OptimizerConfig(learning_rate=1.0, warm_up_steps=10, final_fraction=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_the_tri_stage_rate_rises_stays_and_falls() -> None:
    """10 %, 40 % and 50 % of the steps, as arXiv 2006.11477 has it for fine-tuning."""
    settings = OptimizerConfig(learning_rate=1.0, warm_up_share=0.1, hold_share=0.4, decay="linear", final_fraction=0.0)
    rates = [learning_rate(step, 200, settings) for step in range(201)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20:101] == [1.0] * 81
    assert rates[100:] == pytest.approx([1 - step / 100 for step in range(101)])


def test_scaled_adam_moves_in_proportion_to_the_tensor() -> None:
    moves = []
    for scale in (1.0, 10.0):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(8, 8) * 0.02 * scale)
        before = weight.detach().clone()
        optimizer = ScaledAdam([weight], lr=0.01, scale_rate=0.0)
        weight.grad = torch.randn(8, 8)
        optimizer.step()
        moves.append(weight.detach() - before)
    torch.testing.assert_close(moves[1], moves[0] * 10)


def test_scaled_adam_is_adam_times_the_root_mean_square() -> None:
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(5, 4))
    plain = torch.nn.Parameter(weight.detach().clone())
    scaled = ScaledAdam([weight], lr=0.01, betas=(0.9, 0.98), scale_rate=0.0)
    adam = torch.optim.Adam([plain], lr=0.01, betas=(0.9, 0.98), eps=1e-8)
    for _ in range(4):
        size = float(weight.detach().square().mean().sqrt())
        weight.grad = torch.randn(5, 4)
        plain.data.copy_(weight.data)
        adam.param_groups[0]["lr"] = 0.01 * size
        plain.grad = weight.grad.clone()
        adam.step()
        scaled.step()
        torch.testing.assert_close(weight.detach(), plain.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "scaled_adam"])
def test_it_fits_a_line(name: Literal["adamw", "scaled_adam"]) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = x @ torch.randn(6, 3)
    weight = torch.nn.Parameter(torch.randn(3, 6) * 0.1)
    optimizer = make_optimizer([weight], OptimizerConfig(name=name, weight_decay=0.0))
    losses = []
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 300)
        optimizer.zero_grad()
        loss = (x @ weight.t() - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def _one_by_one(weights: list[torch.Tensor], states: list[dict[str, float | torch.Tensor]], lr: float) -> None:
    """A step of ScaledAdam as the paper has it, tensor by tensor."""
    beta1, beta2, eps = 0.9, 0.98, 1e-8
    for weight, state in zip(weights, states, strict=True):
        if weight.grad is None:
            continue
        state["step"] = state.get("step", 0) + 1
        correct1, correct2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]  # type: ignore[operator]
        grad, rms = weight.grad, weight.square().mean().sqrt().clamp(1e-2, 3.0)
        state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * grad
        state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * grad**2
        change = rms * (state["m"] / correct1) / ((state["v"] / correct2).sqrt() + eps)  # type: ignore[operator, union-attr]
        if weight.ndim > 1:
            slope = (grad * weight).sum()
            state["n"] = beta1 * state.get("n", 0) + (1 - beta1) * slope
            state["u"] = beta2 * state.get("u", 0) + (1 - beta2) * slope**2
            scale = (state["n"] / correct1) * correct2**0.5 / (state["u"].sqrt() + eps)  # type: ignore[operator, union-attr]
            change = change + 0.1 * scale.clamp(-10, 10) * weight
        weight.sub_(lr * (1.0 if weight.ndim > 1 else 0.1) * change)


def test_stacked_tensors_move_as_each_would_by_itself() -> None:
    """Of several shapes and ages, some without gradients in some steps, and resumed half-way."""
    torch.manual_seed(0)
    shapes = [(4, 4), (4, 4), (4,), (4,), (3, 5), (2, 3, 3), (1,), (), (4, 4)]
    stacked = [torch.nn.Parameter(torch.randn(shape) * 0.3) for shape in shapes]
    alone = [weight.detach().clone() for weight in stacked]
    states: list[dict[str, float | torch.Tensor]] = [{} for _ in shapes]
    optimizer = ScaledAdam(stacked, lr=0.05)
    for step in range(12):
        for index, (one, other) in enumerate(zip(stacked, alone, strict=True)):
            absent = (step % 3 == 1 and index == 2) or (step < 4 and index == 8)
            one.grad = None if absent else torch.randn(one.shape)
            other.grad = None if one.grad is None else one.grad.clone()
        optimizer.step()
        _one_by_one(alone, states, 0.05)
        if step == 6:
            resumed = ScaledAdam(stacked, lr=0.05)
            resumed.load_state_dict(optimizer.state_dict())
            optimizer = resumed
    for one, other in zip(stacked, alone, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-4, atol=1e-6)
