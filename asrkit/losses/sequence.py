"""Sequence criteria: expected errors over hypotheses or sampled paths, and the outer derivatives of lattice criteria.

Shapes: B utterances, N hypotheses of each, I sampled paths of each, T frames, V tokens.

Sources: minimum word error rate over n-best lists (Prabhavalkar et al. 2018, arXiv 1712.01818); expected minimum Bayes risk by
sampling (Shannon 2017, arXiv 1706.02776); asynchronous sequence training (Heigold et al., ICASSP 2014; US10019985), which
trains on outer derivatives of MMI and sMBR.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ExpectedErrors(NamedTuple):
    """loss (B,): differentiable. expected (B,): the expected number of errors, without a gradient."""

    loss: Tensor
    expected: Tensor


def expected_errors(log_probs: Tensor, errors: Tensor, valid: Tensor) -> ExpectedErrors:
    """The expected errors over an n-best list, less their mean over it, which lowers the variance of the gradient and changes
    nothing else (arXiv 1712.01818, equation 6).

    Args:
        log_probs: (B, N) differentiable, renormalized here over the hypotheses of each utterance.
        errors: (B, N) of each hypothesis.
        valid: (B, N) bool, the hypotheses that there are. An utterance without any has the loss 0, one with a single
            hypothesis a gradient of 0.
    """
    posterior = torch.where(valid, log_probs, -torch.inf).masked_fill(~valid.any(1, keepdim=True), 0.0).softmax(dim=1)
    posterior = torch.where(valid, posterior, 0.0)
    mean = torch.where(valid, errors, 0.0).sum(1) / valid.sum(1).clamp(min=1)
    relative = torch.where(valid, errors - mean.unsqueeze(1), 0.0)
    loss = (posterior * relative).sum(1)
    return ExpectedErrors(loss, loss.detach() + torch.where(valid.any(1), mean, 0.0))


def sampled_errors(log_probs: Tensor, errors: Tensor) -> ExpectedErrors:
    """The mean errors of paths that were sampled from the model, with an unbiased estimate of the expectation's gradient:

        I / (I - 1) * mean over i of (L_i - mean L) * d log w(path_i)      (arXiv 1706.02776)

    Args:
        log_probs: (B, I) differentiable, I at least 2: log w of each path. errors: (B, I), L.
    """
    paths = log_probs.shape[1]
    mean = errors.mean(dim=1)
    estimate = ((errors - mean.unsqueeze(1)) * log_probs).sum(1) / (paths - 1)
    return ExpectedErrors(mean + estimate - estimate.detach(), mean)


def outer_gradient_loss(objective: Tensor, derivative: Tensor, outputs: Tensor) -> Tensor:
    """-objective (B,), whose gradient is that of the linear surrogate -sum over t, k of derivative * outputs.

    While the lattice is fixed, it is the gradient of the objective itself. The derivative may also come from older weights, or be
    0 in frames that are rejected.

    Args:
        objective: (B,), to be maximized. derivative: (B, T, V), of it by ``outputs``. outputs: (B, T, V), differentiable.
    """
    surrogate = (derivative.detach() * outputs).sum(dim=(1, 2))
    return -(objective.detach() + surrogate - surrogate.detach())


def mmi_derivative(numerator: Tensor, denominator: Tensor, scale: float) -> Tensor:
    """kappa (gamma_num - gamma_den) of occupancies (B, T, V), the derivative of MMI by the scores of frames. In frames where both
    occupancies add up to 1 its sum over V is 0."""
    return scale * (numerator - denominator)


def overlap(reference: Tensor, lattice: Tensor) -> Tensor:
    """Where the reference and the lattice share a token, (B, T) bool, from their occupancies (B, T, V)."""
    return ((reference > 0) & (lattice > 0)).any(dim=2)
