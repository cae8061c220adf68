"""prune: N:M or block sparsity, found in the weights of a trained model while it is trained on.

In every forward pass the mask comes first; once final, it never changes, and the optimizer moves no pruned weight
(arXiv 2312.08553, US20250078815A1; blocks little by little: arXiv 2207.11906).
"""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asrkit.config import config
from asrkit.data.batch import Batch
from asrkit.data.train_batches import TrainBatches
from asrkit.errors import UserError
from asrkit.methods.distillation.config import check_distillation
from asrkit.methods.distillation.loss import add_encoder_maps, build_loss
from asrkit.methods.distillation.teachers import ANY, load_teacher
from asrkit.methods.pruning import (
    MaskSchedule,
    keep_pruned,
    last_update,
    pruned_decay,
    sparsity_due,
    update_masks,
    watch_inputs,
)
from asrkit.models import load_model
from asrkit.models.compression import LayerChoice, compressed_layers, pruned_spec
from asrkit.models.surgery import rebuilt, reinitialize, with_variant
from asrkit.nn.compression import Mask
from asrkit.run_dir import open_run
from asrkit.training.asr_loss import LossOutput
from asrkit.training.distributed import World, all_sum
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import CompressConfig, Prepared, fine_tune


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
    """Prune the model of ``parent`` and train what is left, or go on with a run that was interrupted; returns ``out``.

    Args:
        teacher: run directory of a model, such as the dense parent, that teaches besides.

    Raises:
        UserError: an unusable parent, layers that cannot be pruned so, a schedule longer than the training, a teacher of
            another kind, manifests, out.
        Interrupted: stopped by a signal, state saved.
    """
    source = open_run(parent)
    origin = load_model(source)
    mask = settings.mask or Mask(keep=2, group=4)
    final = last_update(settings.schedule, mask.sparsity)
    if final >= settings.training.steps:
        raise UserError(
            f"the masks would be final before step {final}, but training.steps is {settings.training.steps}; "
            "train longer, or shorten schedule.start, interval and shots"
        )
    if mask.group and settings.schedule.kind != "shots":
        raise UserError(f"schedule.kind={settings.schedule.kind} grows a share; N:M masks are found whole (kind=shots)")
    active = origin.submodels_of(settings.variant)
    if settings.schedule.kind == "iterative" and settings.schedule.shots > 1:
        raise UserError(
            "schedule.kind=iterative goes on until the sparsity is reached; schedule.shots says nothing to it"
        )
    if settings.schedule.straight_through != "none" and final == settings.schedule.start:
        raise UserError(
            f"schedule.straight_through={settings.schedule.straight_through} works until the masks are final, which one-shot masks "
            "are at once; raise schedule.shots"
        )
    spec = with_variant(pruned_spec(origin, mask, settings.layers, active), settings.variant, settings.contexts.train)
    guide = None if teacher is None else load_teacher(teacher, source.tokenizer_path)
    guides = None if guide is None else {ANY: [guide]}
    if guides is not None:
        check_distillation(guides, settings.teacher, settings.loss, settings.training.steps)
    plain = build_loss(spec, settings.loss, settings.contexts, guides, settings.teacher, steps=settings.training.steps)

    found_at = -1

    def loss(model: Any, batch: Batch, step: int, world: World) -> LossOutput:
        nonlocal found_at
        if step > found_at:  # once a step, before its first part
            found_at = step
            inputs = None
            if settings.schedule.score == "activation" and sparsity_due(settings.schedule, mask, step)[0]:
                with watch_inputs(model) as inputs, torch.no_grad():
                    plain(model, batch, step)
                torch.clear_autocast_cache()  # it holds weights cast in this pass, which lead to no gradient
                for path in sorted(inputs):  # every process must find the same masks
                    all_sum(world, inputs[path])
            update_masks(model, step, settings.schedule, inputs)
        output = plain(model, batch, step)
        decay = pruned_decay(model, settings.schedule)
        if decay is None:
            return output
        # The step's sum is divided by its frames, so that each part brings its share of one such term.
        return replace(output, loss=output.loss + decay * (output.count / len(output.loss)))

    def after_step(model: nn.Module, step: int) -> None:
        if step >= final:
            keep_pruned(model, step)

    def prepare(run: RunWriter, batches: TrainBatches) -> Prepared:
        model = rebuilt(spec, origin)
        if settings.from_scratch:
            reinitialize(model, origin, active)
        if guides is not None:
            add_encoder_maps(model, guides, settings.teacher)
        layers = compressed_layers(model)
        weights = sum(layer.weight.numel() for layer in layers.values())
        run.note(f"{run.path}: {len(layers)} layers of {weights} weights; masks are final before step {final}")
        return Prepared(
            model=model,
            loss=lambda model, batch, step: loss(model, batch, step, run.world),
            after_step=after_step,
            not_before=final + 1,
            extra={"masks_final_before_step": final},
            clean=guides is not None and settings.teacher.input == "clean",
        )

    return fine_tune(
        "prune",
        source,
        manifest,
        out,
        settings,
        prepare,
        teacher=guide,
        dev=dev,
        device=device,
        command=command,
    )
