"""qat: quantization-aware training with native integer operations.

In every forward pass the weights of the selected layers, and optionally their inputs, become integers, and the products are
integer products; the gradient is straight-through (arXiv 2203.15952, US20230298569A1). Weights can be pruned in the same fine-tuning,
and a pruned parent keeps its masks, which are applied before quantization (arXiv 2312.08553, US20250078815A1).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from asrkit.config import config
from asrkit.data.train_batches import TrainBatches
from asrkit.errors import UserError
from asrkit.methods.bit_allocation import BITS, choose_bits, measure
from asrkit.methods.compression import (
    CompressConfig,
    compression_task,
    fine_tune_compressed,
    left_out,
    open_teacher,
    parent_model,
)
from asrkit.methods.distillation.loss import build_loss
from asrkit.methods.pruning import MaskSchedule, check_schedule, prune_while_training
from asrkit.models import AsrModel, ModelSpec
from asrkit.models.compression import QuantizationConfig, choose_layers, pruned_spec, quantized_spec
from asrkit.models.sizes import layer_sizes
from asrkit.models.surgery import is_mask, rebuild, with_variant
from asrkit.nn.compression_config import Mask
from asrkit.run_dir import RunDir, open_run
from asrkit.training.contexts import ContextsConfig
from asrkit.training.distributed import broadcast_object
from asrkit.training.run_writer import RunWriter, read_sealed, write_sealed
from asrkit.training.step import TrainTask

CHOSEN_BITS = "bits.yaml"  # in the run directory: the bits of each layer under --budget
SAMPLE = 4  # number of training batches that the sensitivity of layers is measured on


@config
class QatConfig(CompressConfig):
    """Settings of qat (arXiv 2203.15952). config.yaml of the run holds them all."""

    budget: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the variant's float size it may take, such as 0.2. Bits are then chosen layer by layer: each is
    quantized by itself, and the growth of the loss on 4 training batches is measured."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """What to quantize, and how."""
    mask: Mask | None = None
    """Prune the same layers in the same fine-tuning (US20250078815A1): which weights stay; null prunes nothing."""
    schedule: MaskSchedule = field(default_factory=MaskSchedule)
    """With `mask`: when and how often the mask is computed."""


def qat(
    parent: Path,
    manifest: Path,
    out: Path,
    settings: QatConfig,
    *,
    teacher: Path | None = None,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Train the quantized model of ``parent``, or resume an interrupted run; returns ``out``.

    Args:
        teacher: run directory of a model to distill from, such as the float parent.

    Raises:
        UserError: an unusable parent, layers that cannot be quantized that way, a teacher of another kind, manifests, out.
        Interrupted: stopped by a signal, state saved.
    """
    weights = settings.quantization.weights
    if settings.budget is not None and (settings.quantization.bits or not weights.symmetric or weights.bits != 8):
        raise UserError(
            "--budget chooses the bits of every layer, with symmetric weights; leave out quantization.bits, weights.bits and symmetric=false"
        )
    if settings.mask is not None:
        if settings.budget is not None:
            raise UserError(
                "--budget and --sparsity: the budget counts whole layers; prune first, then run qat --budget on that"
            )
        check_schedule(settings.schedule, settings.mask, settings.training.steps)
    elif settings.schedule != MaskSchedule():
        raise UserError(
            "schedule: says when a mask is computed; give the mask with --sparsity, or leave out --shots and --set schedule.*"
        )
    source = open_run(parent)
    _spec(
        settings, _masked(settings, source), settings.quantization
    )  # refuses layers that cannot be quantized or pruned
    return fine_tune_compressed(
        "qat",
        source,
        manifest,
        out,
        settings,
        partial(build_task, settings, parent, teacher, out),
        open_teacher(teacher, settings, source),
        prepare=None if settings.budget is None else partial(choose_budget, settings, parent),
        dev=dev,
        device=device,
        command=command,
    )


def build_task(settings: QatConfig, parent: Path, teacher: Path | None, out: Path, batches: TrainBatches) -> TrainTask:
    """The quantized model of the run ``out`` and its loss; see ``TaskRecipe``."""
    source = open_run(parent)
    origin = _masked(settings, source)
    quantization = settings.quantization
    if settings.budget is not None:
        quantization = replace(quantization, bits=read_sealed(out / CHOSEN_BITS))
    spec = with_variant(_spec(settings, origin, quantization), settings.variant, settings.contexts.train)
    counts = Counter(how.weights.bits for how in spec.compression.values() if how.weights is not None)
    note = ", ".join(f"{number} layers of {bits} bits" for bits, number in sorted(counts.items(), reverse=True))
    distillation = open_teacher(teacher, settings, source)
    task = compression_task(settings, spec, origin, distillation, batches, [*left_out(source, origin), note])
    return task if settings.mask is None else prune_while_training(task, settings.mask, settings.schedule)


def _masked(settings: QatConfig, parent: RunDir) -> AsrModel:
    """The parent's model, with masks on the layers to quantize where they are pruned as well."""
    model = parent_model(parent, settings.variant)
    if settings.mask is None:
        return model
    active = model.submodels_of(settings.variant)
    return rebuild(pruned_spec(model, settings.mask, settings.quantization.layers, active), model, new=is_mask)


def _spec(settings: QatConfig, origin: AsrModel, quantization: QuantizationConfig) -> ModelSpec:
    return quantized_spec(origin, quantization, origin.submodels_of(settings.variant))


def choose_budget(settings: QatConfig, parent: Path, run: RunWriter, batches: TrainBatches) -> None:
    """Choose the bits of each layer, so that the model takes at most ``budget`` of its float size, and write them to the run."""
    path = run.path / CHOSEN_BITS
    if run.world.is_main and not path.is_file():  # one process measures, so that all use the same bits
        write_sealed(path, _bits_within_budget(settings, parent, run, batches))
    broadcast_object(run.world, None)  # the others read it only once it is there


def _bits_within_budget(settings: QatConfig, parent: Path, run: RunWriter, batches: TrainBatches) -> dict[str, int]:
    assert settings.budget is not None
    origin, quantization = parent_model(open_run(parent), settings.variant), settings.quantization
    active = origin.submodels_of(settings.variant)
    sizes, rest, float_bytes = layer_sizes(origin, quantization, active)
    layers = {path: layer for path, layer in choose_layers(origin, quantization.layers, active).items() if sizes[path]}
    own = with_variant(origin.spec, settings.variant)
    loss = build_loss(own, settings.loss, ContextsConfig(train=own.variants[own.variant].contexts[:1]))
    device = run.world.device
    sample = [batches[number].to(device) for number in range(SAMPLE)]
    costs = measure(origin.to(device), layers, quantization.weights, loss, sample)
    bits = choose_bits(costs, {path: sizes[path] for path in layers}, settings.budget * float_bytes - rest)
    for path, layer_bits in bits.items():
        increases = ", ".join(f"{number} bits {costs[path][number]:+.4f}" for number in BITS)
        run.note(f"{path}: {layer_bits} bits (increase in loss if only this layer is quantized: {increases})")
    total = rest + sum(sizes[path][layer_bits] for path, layer_bits in bits.items())
    run.note(f"{run.path}: {total:,.0f} of {float_bytes:,.0f} float bytes, {100 * total / float_bytes:.1f} %")
    return bits
