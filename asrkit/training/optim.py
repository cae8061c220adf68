"""Optimizers and the learning-rate schedule, as functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from asrkit.config import Advanced, Probability, config

_RATES = {"adamw": 2e-3, "scaled_adam": 5e-2, "sgd": 1e-1, "adagrad": 1e-2}


@config
class OptimizerConfig:
    """The optimizer and its learning rate. ``scaled_adam`` is that of Zipformer (arXiv 2310.11230)."""

    name: Literal["adamw", "scaled_adam", "sgd", "adagrad"] = "scaled_adam"
    """adamw; scaled_adam, which moves each tensor in proportion to its own root mean square; sgd; or adagrad, which divides by the
    root of the sum of all squared gradients so far."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; null takes the optimizer's own default: 2e-3 for adamw, 5e-2 for scaled_adam, 1e-1 for sgd, 1e-2 for
    adagrad."""
    betas: Advanced[tuple[Probability, Probability]] = (0.9, 0.98)
    """Decay rates of Adam's running means of the gradient and of its square."""
    momentum: Advanced[Probability] = 0.0
    """Momentum of sgd."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight decay of adamw for matrices; vectors (norms, biases) are not decayed, and the other optimizers have none."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 2.0
    """Gradients whose norm over all weights exceeds this are scaled down to it. Lower it if the loss jumps."""
    warm_up_steps: Annotated[int, Field(ge=0)] = 200
    """Steps over which the learning rate rises linearly to its peak."""
    warm_up_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """The warm-up as a share of all steps, in place of warm_up_steps; null: warm_up_steps."""
    hold_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of all steps at the peak, between the warm-up and the fall. With warm_up_share=0.1, hold_share=0.4 and
    decay=linear it is the tri-stage rate of arXiv 2006.11477."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to the last step: cosine, linear, or constant (not at all)."""
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.02
    """Learning rate that cosine and linear end at, one step after the last, as a share of the peak."""

    @model_validator(mode="after")
    def _are_read(self) -> OptimizerConfig:
        """Refuse values that the optimizer would not read."""
        fields = type(self).__dataclass_fields__
        unread = {
            "weight_decay": self.name != "adamw" and self.weight_decay > 0 and "works with optimizer.name=adamw only",
            "momentum": self.name != "sgd" and "works with optimizer.name=sgd only",
            "betas": self.name not in ("adamw", "scaled_adam") and "works with adamw and scaled_adam only",
        }
        for name, why in unread.items():
            if why and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name}: {why}")
        if (self.warm_up_share or 0) + self.hold_share > 1:
            raise ValueError(
                f"warm_up_share, hold_share: {self.warm_up_share} and {self.hold_share} are more than all steps together; lower one of them"
            )
        return self

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or _RATES[self.name]


def learning_rate(step: int, total_steps: int, settings: OptimizerConfig) -> float:
    """The rate of ``step`` (from 0)."""
    share = settings.warm_up_share
    warm_up = settings.warm_up_steps if share is None else round(share * total_steps)
    if step < warm_up:
        return settings.peak_learning_rate * (step + 1) / warm_up
    falls = warm_up + round(settings.hold_share * total_steps)  # the first step of the fall
    done = min(1.0, max(0, step - falls) / max(1, total_steps - falls))
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[settings.decay]
    floor = 0.0 if settings.decay == "constant" else settings.final_fraction
    return settings.peak_learning_rate * (floor + (1 - floor) * shape)


def make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over ``parameters``; vectors (norms, biases) are not decayed."""
    trained = list(parameters)
    if settings.name == "scaled_adam":
        return ScaledAdam(trained, lr=settings.peak_learning_rate, betas=settings.betas)
    if settings.name == "sgd":
        return torch.optim.SGD(trained, lr=settings.peak_learning_rate, momentum=settings.momentum)
    if settings.name == "adagrad":
        return torch.optim.Adagrad(trained, lr=settings.peak_learning_rate)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": settings.peak_learning_rate, "betas": settings.betas, "foreach": True}
    return torch.optim.AdamW([group for group in groups if group["params"]], **options)


class ScaledAdam(torch.optim.Optimizer):
    """Adam whose step for a tensor is proportional to the tensor's root mean square, with a learned scale.

    delta = -lr * rms(w) * m_hat / (sqrt(v_hat) + eps), plus a step of the scale itself along w, from the
    gradient h = sum(g * w) treated by Adam with rate ``scale_rate * lr``. rms is kept within [``smallest``, 3].
    Our choice is 1e-2, because with the reference code's 1e-5 a bias or projection that starts as zeros stays there.
    Vectors and scalars use a tenth of the rate, because they have no scale to learn.
    Source: Zipformer (arXiv 2310.11230), section 3.5; eta = 0.1.

    Tensors of the same shape and age are stacked, so that one operation updates them all and a step has few kernel launches.
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
        self._stacks: dict[tuple[int, ...], _Stack] = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._stacks = {}  # the state's tensors are others now

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, float], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    self._begin(weight, state)
                # Each tensor has its own count, because it may have had no gradient in some steps.
                state["step"] += 1
                alike.setdefault((weight.shape, float(state["step"])), []).append(weight)
            if alike:
                self._update(group, alike)

    def _begin(self, weight: Tensor, state: dict[str, Tensor]) -> None:
        """Set the initial state of a tensor: its age, and the averages of its gradient, of its scale's, and of their squares."""
        for name, like in (("exp_avg", weight), ("exp_avg_sq", weight)):
            state[name] = torch.zeros_like(like)
        for name in ("scale_avg", "scale_avg_sq"):
            state[name] = torch.zeros((), device=weight.device)
        state["step"] = torch.zeros(())

    def _update(self, group: dict[str, Any], alike: dict[tuple[torch.Size, float], list[Tensor]]) -> None:
        beta1, beta2 = group["betas"]
        stacks = [self._stack(weights) for weights in alike.values()]
        ages = [age for _, age in alike]
        weights = [torch.stack(members) for members in alike.values()]
        grads = [torch.stack([w.grad for w in members if w.grad is not None]) for members in alike.values()]
        first, second = [stack.exp_avg for stack in stacks], [stack.exp_avg_sq for stack in stacks]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, grads, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, [group["eps"] * math.sqrt(1 - beta2**age) for age in ages])
        steps = torch._foreach_div(first, denominators)
        biases = [math.sqrt(1 - beta2**age) / (1 - beta1**age) for age in ages]
        rates = [group["lr"] * (1.0 if weight.ndim > 2 else 0.1) for weight in weights]
        squares = torch.cat([weight.reshape(len(weight), -1).square().mean(1) for weight in weights])
        sizes = list(squares.sqrt_().clamp_(group["smallest"], 3.0).split([len(weight) for weight in weights]))
        factors = torch._foreach_mul(sizes, [rate * bias for rate, bias in zip(rates, biases, strict=True)])
        moves = [step.mul_(_beside(factor, step)) for step, factor in zip(steps, factors, strict=True)]
        matrices = [index for index, weight in enumerate(weights) if weight.ndim > 2]  # of these the scale learns too
        if matrices:
            slopes = [(grads[i] * weights[i]).reshape(len(weights[i]), -1).sum(1) for i in matrices]
            growths = self._growths([stacks[i] for i in matrices], slopes, [biases[i] for i in matrices], group)
            shares = torch._foreach_mul(growths, [rates[i] for i in matrices])
            for i, growth in zip(matrices, shares, strict=True):
                moves[i].addcmul_(_beside(growth, weights[i]), weights[i])
        torch._foreach_sub_(list(chain(*alike.values())), list(chain(*(move.unbind() for move in moves))))

    def _growths(
        self, stacks: list[_Stack], slopes: list[Tensor], biases: list[float], group: dict[str, Any]
    ) -> list[Tensor]:
        """How much the scale of each tensor of each stack should shrink, (n,), from the change of the loss when the whole tensor
        grows, (n,)."""
        beta1, beta2 = group["betas"]
        first, second = [stack.scale_avg for stack in stacks], [stack.scale_avg_sq for stack in stacks]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, slopes, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, slopes, slopes, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, group["eps"])
        steps = torch._foreach_div(torch._foreach_mul(first, biases), denominators)
        scaled = torch.cat(list(steps)).clamp_(-10, 10).mul_(group["scale_rate"])
        return list(scaled.split([len(stack.scale_avg) for stack in stacks]))

    def _stack(self, weights: list[Tensor]) -> _Stack:
        """The stacked state of tensors of one shape; the state of each tensor is a view of it."""
        key = tuple(map(id, weights))
        if key not in self._stacks:
            states = [self.state[weight] for weight in weights]
            stack = _Stack(*(torch.stack([state[name] for state in states]) for name in _Stack._fields))
            for index, state in enumerate(states):
                state.update({name: getattr(stack, name)[index] for name in _Stack._fields})
            changed = set(key)
            self._stacks = {other: old for other, old in self._stacks.items() if not changed & set(other)}
            self._stacks[key] = stack
        return self._stacks[key]


class _Stack(NamedTuple):
    """The state of n tensors: exp_avg and exp_avg_sq (n, ...), scale_avg and scale_avg_sq (n,)."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    scale_avg: Tensor
    scale_avg_sq: Tensor


def _beside(factors: Tensor, stacked: Tensor) -> Tensor:
    """(n,) as (n, 1, ...), to multiply (n, ...)."""
    return factors.view(-1, *[1] * (stacked.ndim - 1))
