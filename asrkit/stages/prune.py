"""prune: prune a trained model to N:M or block sparsity while it is trained further.

Every forward pass applies the mask first. Once final, the mask never changes, and the optimizer moves no pruned weight
(arXiv 2312.08553, US20250078815A1; blocks step by step: arXiv 2207.11906).
"""

from __future__ import annotations

from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asrkit.config import config
from asrkit.data.batch import Batch
from asrkit.data.train_batches import TrainBatches
from asrkit.errors import UserError
from asrkit.methods.compression import (
    CompressConfig,
    compression_task,
    fine_tune_compressed,
    left_out,
    open_teacher,
    parent_model,
)
from asrkit.methods.pruning import MaskSchedule, last_update, pruned_decay, sparsity_due, update_masks, watch_inputs
from asrkit.models.compression import LayerChoice, compressed_layers, keep_pruned, pruned_spec
from asrkit.models.surgery import with_variant
from asrkit.nn.compression_config import Mask
from asrkit.run_dir import open_run
from asrkit.training.distributed import all_sum
from asrkit.training.step import LossOutput, TrainTask

DEFAULT_MASK = Mask(keep=2, group=4)


@config
class PruneConfig(CompressConfig):
    """Settings of prune (arXiv 2312.08553, US20250078815A1). config.yaml of the run holds them all."""

    mask: Mask | None = None
    """Which weights stay; null is 2:4, the paper's."""
    schedule: MaskSchedule = field(default_factory=MaskSchedule)
    """When and how often the mask is computed."""
    layers: LayerChoice = field(default_factory=LayerChoice)
    """Which linear layers are pruned."""


def prune(
    parent: Path,
    manifest: Path,
    out: Path,
    settings: PruneConfig,
    *,
    teacher: Path | None = None,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Prune the model of ``parent`` and train what is left, or resume an interrupted run; returns ``out``.

    Args:
        teacher: run directory of a model to distill from, such as the dense parent.

    Raises:
        UserError: an unusable parent, layers that cannot be pruned that way, a schedule longer than the training, a teacher of
            another kind, manifests, out.
        Interrupted: stopped by a signal, state saved.
    """
    source = open_run(parent)
    origin = parent_model(source, settings.variant)
    mask = settings.mask or DEFAULT_MASK
    _check_schedule(settings, mask)
    pruned_spec(
        origin, mask, settings.layers, origin.submodels_of(settings.variant)
    )  # refuses layers that cannot be pruned
    return fine_tune_compressed(
        "prune",
        source,
        manifest,
        out,
        settings,
        partial(build_task, settings, parent, teacher),
        open_teacher(teacher, settings, source),
        dev=dev,
        device=device,
        command=command,
    )


def build_task(settings: PruneConfig, parent: Path, teacher: Path | None, batches: TrainBatches) -> TrainTask:
    """The masked model, its loss, and the hooks that compute its masks; see ``TaskRecipe``."""
    source = open_run(parent)
    origin = parent_model(source, settings.variant)
    schedule, mask = settings.schedule, settings.mask or DEFAULT_MASK
    final = last_update(schedule, mask.sparsity)
    spec = pruned_spec(origin, mask, settings.layers, origin.submodels_of(settings.variant))
    spec = with_variant(spec, settings.variant, settings.contexts.train)
    task = compression_task(
        settings, spec, origin, open_teacher(teacher, settings, source), batches, left_out(source, origin)
    )
    plain = task.loss

    def before_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, batch: Batch) -> None:
        inputs = None
        if schedule.score == "activation" and sparsity_due(schedule, mask, step)[0]:
            with watch_inputs(model) as inputs, torch.no_grad():
                plain(model, batch, step)
            torch.clear_autocast_cache()  # it holds weights cast in this pass, which have no gradient
            for path in sorted(inputs):  # every process must compute the same masks
                all_sum(inputs[path])
        update_masks(model, step, schedule, inputs)

    def loss(model: Any, batch: Batch, step: int) -> LossOutput:
        return replace(plain(model, batch, step), regularizer=pruned_decay(model, schedule))

    def after_step(model: nn.Module, step: int) -> None:
        if step >= final:
            keep_pruned(model)

    layers = compressed_layers(task.model)
    weights = sum(layer.weight.numel() for layer in layers.values())
    return replace(
        task,
        loss=loss,
        before_step=before_step,
        after_step=after_step,
        not_before=final + 1,
        facts={"masks_final_before_step": final},
        notes=[*task.notes, f"{len(layers)} layers of {weights} weights; the masks are final from step {final} on"],
    )


def _check_schedule(settings: PruneConfig, mask: Mask) -> None:
    """Refuse a schedule that contradicts itself or the length of the training."""
    schedule = settings.schedule
    final = last_update(schedule, mask.sparsity)
    findings = []
    if final >= settings.training.steps:
        findings.append(
            f"the masks would become final at step {final}, but training.steps is {settings.training.steps}; "
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
