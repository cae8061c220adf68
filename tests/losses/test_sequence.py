"""Sequence criteria: against sums that are written out, and exact expectations of estimates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asrkit.losses.sequence import expected_errors, mmi_derivative, outer_gradient_loss, overlap, sampled_errors

some = settings(max_examples=25, deadline=None, derandomize=True)


@given(st.integers(0, 10**6), st.integers(1, 5))
@some
def test_expected_errors_are_the_sum_over_hypotheses(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = (5 * torch.randn(3, count, dtype=torch.float64, generator=generator)).requires_grad_()
    errors = torch.randint(0, 6, (3, count), generator=generator).double()
    valid = torch.rand(3, count, generator=generator) < 0.7
    valid[0] = True
    found = expected_errors(torch.where(valid, log_probs, -torch.inf), errors, valid)
    gradient = torch.autograd.grad(found.loss.sum(), log_probs)[0]
    for row in range(3):
        kept = [number for number in range(count) if valid[row, number]]
        weights = [math.exp(float(log_probs[row, number])) for number in kept]
        risk = sum(w * float(errors[row, n]) for w, n in zip(weights, kept, strict=True)) / (sum(weights) or 1.0)
        assert float(found.expected[row]) == pytest.approx(risk)
        mean = sum(float(errors[row, n]) for n in kept) / max(1, len(kept))
        assert float(found.loss[row]) == pytest.approx(risk - mean, abs=1e-9)
        for number in range(count):
            share = weights[kept.index(number)] / sum(weights) if number in kept else 0.0
            # The derivative of the risk by a log-probability: P (L - expected L).
            assert float(gradient[row, number]) == pytest.approx(share * (float(errors[row, number]) - risk), abs=1e-9)
    assert gradient.isfinite().all()


def test_one_hypothesis_has_no_gradient_and_none_has_no_loss() -> None:
    log_probs = torch.tensor([[-3.0, -torch.inf], [-torch.inf, -torch.inf]], requires_grad=True)
    found = expected_errors(log_probs, torch.tensor([[4.0, 9.0], [1.0, 2.0]]), log_probs.isfinite())
    assert found.expected.tolist() == [4.0, 0.0] and found.loss.tolist() == [0.0, 0.0]
    assert torch.autograd.grad(found.loss.sum(), log_probs)[0].tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("paths", [2, 3])
def test_the_estimate_by_samples_is_unbiased(paths: int) -> None:
    """Its expectation over all draws, written out, is the gradient of the exact expected errors."""
    logits = torch.tensor([0.4, -1.0, 0.9], dtype=torch.float64, requires_grad=True)
    errors = torch.tensor([2.0, 0.0, 5.0], dtype=torch.float64)
    exact = torch.autograd.grad((logits.softmax(0) * errors).sum(), logits)[0]
    expected = torch.zeros_like(exact)
    mean = 0.0
    for draw in itertools.product(range(3), repeat=paths):
        log_w = logits.log_softmax(0)[list(draw)]
        found = sampled_errors(log_w[None], errors[list(draw)][None])
        probability = float(log_w.sum().exp())
        expected += probability * torch.autograd.grad(found.loss.sum(), logits)[0]
        mean += probability * float(found.expected)
        assert float(found.loss) == pytest.approx(float(found.expected))
    torch.testing.assert_close(expected, exact)
    assert mean == pytest.approx(float((logits.softmax(0) * errors).sum()))


def test_the_surrogate_has_the_gradient_of_the_true_objective() -> None:
    """With a fixed derivative it is exact, whatever lies between the weights and the outputs."""
    torch.manual_seed(0)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 3, 4, dtype=torch.float64)

    def objective(outputs: Tensor) -> Tensor:
        return (outputs.sin() * torch.arange(4)).sum(dim=(1, 2)).exp()

    outputs = (features @ weight).tanh()
    leaf = outputs.detach().requires_grad_()
    (derivative,) = torch.autograd.grad(objective(leaf).sum(), leaf)
    loss = outer_gradient_loss(objective(outputs), derivative, outputs)
    torch.testing.assert_close(loss, -objective(outputs))
    found = torch.autograd.grad(loss.sum(), weight, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(-objective(outputs).sum(), weight)[0])


def test_occupancies() -> None:
    numerator = torch.tensor([[[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]])
    denominator = torch.tensor([[[0.9, 0.0, 0.1], [0.2, 0.8, 0.0]]])
    assert overlap(numerator, denominator).tolist() == [[False, True]]
    derivative = mmi_derivative(numerator, denominator, 0.5)
    torch.testing.assert_close(derivative.sum(2), torch.zeros(1, 2))
    torch.testing.assert_close(derivative[0, 0], torch.tensor([-0.45, 0.5, -0.05]))
