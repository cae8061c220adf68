"""prune: prune a trained model to N:M or block sparsity while it is trained further.

Every forward pass applies the mask first. Once final, the mask never changes, and the optimizer moves no pruned weight
(arXiv 2312.08553, US20250078815A1; blocks step by step: arXiv 2207.11906).
"""

from __future__ import annotations

from dataclasses import field
from functools import partial
from pathlib import Path

from asrkit.config import config
from asrkit.data.train_batches import TrainBatches
from asrkit.methods.compression import (
    CompressConfig,
    compression_task,
    fine_tune_compressed,
    left_out,
    open_teacher,
    parent_model,
)
from asrkit.methods.pruning import MaskSchedule, check_schedule, prune_while_training
from asrkit.models.compression import LayerChoice, pruned_spec
from asrkit.models.surgery import with_variant
from asrkit.nn.compression_config import Mask
from asrkit.run_dir import open_run
from asrkit.training.step import TrainTask

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
    check_schedule(settings.schedule, mask, settings.training.steps)
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
    mask = settings.mask or DEFAULT_MASK
    spec = pruned_spec(origin, mask, settings.layers, origin.submodels_of(settings.variant))
    spec = with_variant(spec, settings.variant, settings.contexts.train)
    task = compression_task(
        settings, spec, origin, open_teacher(teacher, settings, source), batches, left_out(source, origin)
    )
    return prune_while_training(task, mask, settings.schedule)
