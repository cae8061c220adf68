"""Optimizers and the learning-rate schedule, as functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from asrkit.config import Advanced, config


@config
class OptimizerConfig:
    """The optimizer and its learning rate. ``scaled_adam`` is that of Zipformer (arXiv 2310.11230)."""

    name: Literal["adamw", "scaled_adam"] = "scaled_adam"
    """adamw, or scaled_adam, which moves each tensor in proportion to its own root mean square."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; null takes the optimizer's own default: 2e-3 for adamw, 5e-2 for scaled_adam."""
    betas: Advanced[tuple[float, float]] = (0.9, 0.98)
    """Decay rates of Adam's running means of the gradient and of its square."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight decay of adamw for matrices; vectors (norms, biases) are not decayed, and scaled_adam has none."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 2.0
    """Gradients whose norm over all weights exceeds this are scaled down to it. Lower it if the loss jumps."""
    warm_up_steps: Annotated[int, Field(ge=0)] = 200
    """Steps over which the learning rate rises linearly to its peak."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to the last step: cosine, linear, or constant (not at all)."""
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.02
    """Learning rate of the last step as a share of the peak, for cosine and linear."""

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or {"adamw": 2e-3, "scaled_adam": 5e-2}[self.name]


def learning_rate(step: int, total_steps: int, settings: OptimizerConfig) -> float:
    """The rate of ``step`` (from 0)."""
    if step < settings.warm_up_steps:
        return settings.peak_learning_rate * (step + 1) / settings.warm_up_steps
    done = min(1.0, (step - settings.warm_up_steps) / max(1, total_steps - settings.warm_up_steps))
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[settings.decay]
    floor = 0.0 if settings.decay == "constant" else settings.final_fraction
    return settings.peak_learning_rate * (floor + (1 - floor) * shape)


def make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over ``parameters``; vectors (norms, biases) are not decayed."""
    trained = list(parameters)
    if settings.name == "scaled_adam":
        return ScaledAdam(trained, lr=settings.peak_learning_rate, betas=settings.betas)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": settings.peak_learning_rate, "betas": settings.betas, "foreach": True}
    return torch.optim.AdamW([group for group in groups if group["params"]], **options)


class ScaledAdam(torch.optim.Optimizer):
    """Adam whose step for a tensor is proportional to the tensor's root mean square, with a learned scale.

    delta = -lr * rms(w) * m_hat / (sqrt(v_hat) + eps), plus a step of the scale itself along w, from the
    gradient h = sum(g * w) treated by Adam with rate ``scale_rate * lr``. rms is kept within [``smallest``, 3]; ours is
    1e-2, because with the reference code's 1e-5 a bias or projection that begins as zeros stays there;
    vectors and scalars take a tenth of the rate, as they have no scale of their own to learn.
    Source: Zipformer (arXiv 2310.11230), section 3.5; eta = 0.1.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        scale_rate: float = 0.1,
        smallest: float = 1e-2,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "betas": betas, "eps": eps, "scale_rate": scale_rate, "smallest": smallest}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(group, weights)

    def _update(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in weights if p.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                    "scale_avg": torch.zeros((), device=weight.device),
                    "scale_avg_sq": torch.zeros((), device=weight.device),
                }
        states = [self.state[p] for p in weights]
        first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        rms = [p.square().mean().sqrt().clamp(group["smallest"], 3.0) for p in weights]
        # The scale's own gradient: how the loss changes when the whole tensor grows.
        slopes = [(g * p).sum() for g, p in zip(grads, weights, strict=True)]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, grads, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        for state in states:
            state["step"] += 1
        # Each tensor counts for itself: one that was left out of some steps is younger than the others.
        counts = [float(state["step"]) for state in states]
        biases = [math.sqrt(1 - beta2**count) / (1 - beta1**count) for count in counts]
        denominator = torch._foreach_sqrt(second)
        torch._foreach_add_(denominator, [group["eps"] * math.sqrt(1 - beta2**count) for count in counts])
        steps = torch._foreach_div(first, denominator)
        for weight, state, change, size, slope, bias in zip(weights, states, steps, rms, slopes, biases, strict=True):
            rate = group["lr"] * (1.0 if weight.ndim > 1 else 0.1)
            growth: Tensor | float = 0.0
            if weight.ndim > 1:
                state["scale_avg"].mul_(beta1).add_(slope, alpha=1 - beta1)
                state["scale_avg_sq"].mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
                scale_step = state["scale_avg"] * bias / (state["scale_avg_sq"].sqrt() + group["eps"])
                growth = scale_step.clamp(-10, 10) * (rate * group["scale_rate"])
            weight.mul_(1.0 - growth).sub_(change * (size * rate * bias))
