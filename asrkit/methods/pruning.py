"""When the masks of pruned layers are computed, and how the pruned weights are treated until they are final.

Sources: N:M masks in fine-tuning, one-shot and few-shot (arXiv 2312.08553, US20250078815A1); blocks pruned step by step
(arXiv 2207.11906); the cubic schedule (arXiv 1710.01878).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from asrkit.config import Advanced, config, from_dict, to_dict
from asrkit.errors import UserError
from asrkit.models.compression import compressed_layers, keep_pruned, masked_layers
from asrkit.nn.compression import find_mask
from asrkit.nn.compression_config import Mask
from asrkit.nn.conformer import subsampled_lens
from asrkit.training.distributed import all_sum
from asrkit.training.step import LossOutput, TrainTask

Score = Literal["magnitude", "activation"]


@config
class MaskSchedule:
    """When masks are computed; after the last time they do not change.

    Sources: arXiv 2312.08553 (shots), arXiv 2207.11906 (iterative), arXiv 1710.01878 (cubic), arXiv 2102.04010 (sr).
    """

    kind: Literal["shots", "iterative", "cubic"] = "shots"
    """shots: compute the whole mask `shots` times, so that pruned weights can return. iterative: prune `share` of what
    is left each time until the sparsity is reached; nothing returns. cubic: `shots` times, the sparsity growing as 1
    - (1 - i / shots)^3 of its target."""
    shots: Annotated[int, Field(ge=1)] = 1
    """How often the mask is computed, with shots and cubic."""
    interval: Annotated[int, Field(ge=1)] = 1
    """Steps between two computations of the mask."""
    start: Annotated[int, Field(ge=0)] = 0
    """Step of the first one."""
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of what is left that goes each time, with iterative."""
    score: Score = "magnitude"
    """What decides which weights stay: magnitude, or activation, which multiplies it by the layer's summed absolute
    inputs on the step's first batch."""
    straight_through: Advanced[Literal["none", "plain", "sr"]] = "none"
    """Gradients of pruned weights until the mask is final: none (the papers' way), plain, or sr, plain with `decay`
    times the weight added in every step."""
    decay: Advanced[Annotated[float, Field(ge=0.0)]] = 2e-4
    """Factor of the decay of pruned weights with `straight_through=sr`."""


def updates(schedule: MaskSchedule, sparsity: float | None) -> list[float | None]:
    """The sparsity after each computation of the masks; None for N:M masks, whose sparsity is fixed."""
    if sparsity is None:
        return [None] * schedule.shots
    if schedule.kind == "shots":
        return [sparsity] * schedule.shots
    if schedule.kind == "cubic":
        return [sparsity * (1 - (1 - time / schedule.shots) ** 3) for time in range(1, schedule.shots + 1)]
    reached: list[float | None] = []
    share_left = 1.0
    while 1 - share_left < sparsity - 1e-9:
        share_left *= 1 - schedule.share
        reached.append(min(sparsity, 1 - share_left))
    return reached


def last_update(schedule: MaskSchedule, sparsity: float | None) -> int:
    """The step before which masks are computed for the last time; from this step on they are frozen."""
    return schedule.start + (len(updates(schedule, sparsity)) - 1) * schedule.interval


def sparsity_due(schedule: MaskSchedule, mask: Mask, step: int) -> tuple[bool, float | None]:
    """Whether a mask is computed before ``step``, and with which sparsity."""
    times = updates(schedule, mask.sparsity)
    number, rest = divmod(step - schedule.start, schedule.interval)
    due = step >= schedule.start and rest == 0 and number < len(times)
    return due, times[number] if due else None


def update_masks(
    model: nn.Module, step: int, schedule: MaskSchedule, inputs: Mapping[str, Tensor] | None = None
) -> None:
    """Compute the masks that are due before ``step``, in place, and set whether pruned weights still get gradients.

    Args:
        inputs: by layer, the sums of absolute inputs, (I,), for the score ``activation``.
    """
    for path, layer, mask in masked_layers(model):
        final = step >= last_update(schedule, mask.sparsity)
        layer.straight_through = schedule.straight_through != "none" and not final
        due, sparsity = sparsity_due(schedule, mask, step)
        if not due:
            continue
        scores = layer.weight.detach().abs()
        if inputs is not None and path in inputs:  # a layer that is not active has no inputs
            scores = scores * inputs[path]
        left = layer.mask if schedule.kind == "iterative" else None
        layer.mask.copy_(find_mask(scores, _at(mask, sparsity), left))


def pruned_decay(model: nn.Module, schedule: MaskSchedule) -> Tensor | None:
    """SR-STE's term (arXiv 2102.04010) as a loss: decay / 2 times the sum of the squared pruned weights, so its gradient is decay
    times the weights. None without SR-STE, and once the masks are final."""
    if schedule.straight_through != "sr":
        return None
    terms = [
        (layer.weight * ~layer.mask).square().sum() for _, layer, _ in masked_layers(model) if layer.straight_through
    ]
    return schedule.decay / 2 * torch.stack(terms).sum() if terms else None


def _at(mask: Mask, sparsity: float | None) -> Mask:
    return mask if sparsity is None else from_dict(Mask, {**to_dict(mask), "sparsity": sparsity}, "mask")


@contextmanager
def watch_inputs(model: nn.Module, lens: Tensor, symbol_lens: Tensor) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that collects, by layer, the sums of absolute inputs, (I,), over all forward passes in the block.

    Args:
        lens, symbol_lens: (B,), encoder frames and symbols; what a layer reads frame by frame, (B, T', ..., I), or symbol by
            symbol, (B, U + 1, I), counts up to there, so that padding decides nothing.
    """
    sums: dict[str, Tensor] = {}
    handles = []

    def watch(path: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().float().abs()
            if x.dim() > 2 and len(x) == len(lens):
                ends = symbol_lens + 1 if path.startswith("joiner.predictor") else lens
                beyond = torch.arange(x.shape[1], device=x.device) >= ends.unsqueeze(1)
                x = x.masked_fill(beyond.view(*beyond.shape, *[1] * (x.dim() - 2)), 0.0)
            x = x.flatten(0, -2).sum(0)
            sums[path] = sums.get(path, torch.zeros_like(x)) + x

        return hook

    for path, layer in compressed_layers(model).items():
        handles.append(layer.register_forward_pre_hook(watch(path)))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def check_schedule(schedule: MaskSchedule, mask: Mask, steps: int) -> None:
    """Refuse a schedule that contradicts itself or the length of the training.

    Raises:
        UserError: it does, with every finding.
    """
    final = last_update(schedule, mask.sparsity)
    findings = []
    if final >= steps:
        findings.append(
            f"the masks would become final at step {final}, but training.steps is {steps}; "
            "train longer, or lower schedule.start, interval or shots"
        )
    if mask.group and schedule.kind != "shots":
        findings.append(
            f"schedule.kind={schedule.kind} raises the pruned share step by step, but an N:M mask has a fixed share; "
            "use schedule.kind=shots"
        )
    if schedule.kind == "iterative" and schedule.shots > 1:
        findings.append(
            "schedule.kind=iterative continues until the sparsity is reached and ignores schedule.shots; leave it out"
        )
    if schedule.straight_through != "none" and final == schedule.start:
        findings.append(
            f"schedule.straight_through={schedule.straight_through} acts until the masks are final, but one-shot masks are "
            "final at once; raise schedule.shots"
        )
    if findings:
        raise UserError.of(findings)


def prune_while_training(task: TrainTask, mask: Mask, schedule: MaskSchedule) -> TrainTask:
    """The task of a model with masked layers, with the hooks that compute its masks and keep what they prune at zero.

    Nothing is published before the masks are final.
    """
    plain, final = task.loss, last_update(schedule, mask.sparsity)

    def before_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, batch: Any) -> None:
        inputs = None
        if schedule.score == "activation" and sparsity_due(schedule, mask, step)[0]:
            with watch_inputs(model, subsampled_lens(batch.feature_lens), batch.symbol_lens) as inputs, torch.no_grad():
                plain(model, batch, step)
            torch.clear_autocast_cache()  # it holds weights cast in this pass, which have no gradient
            for path in sorted(inputs):  # every process must compute the same masks
                all_sum(inputs[path])
        update_masks(model, step, schedule, inputs)

    def loss(model: Any, batch: Any, step: int) -> LossOutput:
        return replace(plain(model, batch, step), regularizer=pruned_decay(model, schedule))

    def after_step(model: nn.Module, step: int) -> None:
        if step >= final:
            keep_pruned(model)

    layers = [layer for _, layer, _ in masked_layers(task.model)]
    weights = sum(layer.weight.numel() for layer in layers)
    note = f"{len(layers)} layers of {weights} weights; the masks are final from step {final} on"
    return replace(
        task,
        loss=loss,
        before_step=before_step,
        after_step=after_step,
        not_before=final + 1,
        facts={**task.facts, "masks_final_before_step": final},
        notes=[*task.notes, note],
    )
