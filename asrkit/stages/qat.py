"""qat: quantization-aware training with native integer operations.

In every forward pass the chosen layers' weights, and on demand their inputs, become integers and the products are those of
integers; the gradient passes the rounding straight through (arXiv 2203.15952, US20230298569A1). Masks of a pruned parent
stay, and prune comes before quantize (arXiv 2312.08553, US20250078815A1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from asrkit.config import config, from_dict, to_dict
from asrkit.data.batch import Batch
from asrkit.data.train_batches import TrainBatches
from asrkit.errors import UserError
from asrkit.methods.bit_allocation import BITS, choose_bits, measure
from asrkit.methods.distillation.config import check_distillation
from asrkit.methods.distillation.loss import add_encoder_maps, build_loss
from asrkit.methods.distillation.teachers import ANY, load_teacher
from asrkit.methods.pruning import keep_pruned
from asrkit.models import AsrModel, ModelSpec, load_model
from asrkit.models.compression import QuantizationConfig, choose_layers, quantized_spec
from asrkit.models.sizes import layer_sizes
from asrkit.models.surgery import rebuilt, reinitialize, with_variant
from asrkit.run_dir import MODEL, open_run, read_yaml
from asrkit.training.contexts import ContextsConfig
from asrkit.training.distributed import broadcast_object
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import CompressConfig, Prepared, fine_tune

SAMPLE = 4  # training batches that sensitivity is measured on


@config
class QatConfig(CompressConfig):
    """Settings of qat (arXiv 2203.15952). config.yaml of the run holds them all."""

    budget: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the variant's float size it may take, such as 0.2. Bits are then chosen layer by layer: each is
    quantized by itself, and the growth of the loss on 4 training batches is measured."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """What to quantize, and how."""


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
    """Train the quantized model of ``parent``, or go on with a run that was interrupted; returns ``out``.

    Args:
        teacher: run directory of a model, such as the float parent, that teaches besides.

    Raises:
        UserError: an unusable parent, layers that cannot be quantized so, a teacher of another kind, manifests, out.
        Interrupted: stopped by a signal, state saved.
    """
    weights = settings.quantization.weights
    if settings.budget is not None and (settings.quantization.bits or not weights.symmetric or weights.bits != 8):
        raise UserError(
            "--budget chooses symmetric bits for every layer itself; leave out quantization.bits, weights.bits and symmetric=false"
        )
    source = open_run(parent)
    origin = load_model(source)
    active = origin.submodels_of(settings.variant)
    spec = quantized_spec(origin, settings.quantization, active)
    guide = None if teacher is None else load_teacher(teacher, source.tokenizer_path)
    guides = None if guide is None else {ANY: [guide]}
    if guides is not None:
        check_distillation(guides, settings.teacher, settings.loss, settings.training.steps)

    def prepare(run: RunWriter, batches: TrainBatches) -> Prepared:
        chosen = spec
        if settings.budget is not None and run.fresh:
            chosen = _within_budget(origin, active, settings, run, [batches[place] for place in range(SAMPLE)])
        elif settings.budget is not None:  # what was chosen when the run began
            chosen = from_dict(ModelSpec, read_yaml(out / MODEL), str(out / MODEL))
        chosen = with_variant(chosen, settings.variant, settings.contexts.train)
        model = rebuilt(chosen, origin)
        if settings.from_scratch:
            reinitialize(model, origin, active)
        if guides is not None:
            add_encoder_maps(model, guides, settings.teacher)
        counts = Counter(how.weights.bits for how in chosen.compression.values() if how.weights is not None)
        said = ", ".join(f"{number} layers of {bits} bits" for bits, number in sorted(counts.items(), reverse=True))
        run.note(f"{run.path}: {said}")
        return Prepared(
            model=model,
            loss=build_loss(
                chosen, settings.loss, settings.contexts, guides, settings.teacher, steps=settings.training.steps
            ),
            after_step=keep_pruned,
            clean=guides is not None and settings.teacher.input == "clean",
        )

    return fine_tune(
        "qat",
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


def _within_budget(
    origin: AsrModel, active: Sequence[str], settings: QatConfig, run: RunWriter, sample: list[Batch]
) -> ModelSpec:
    """The spec with bits chosen layer by layer, so that the whole is at most ``budget`` of its float size."""
    assert settings.budget is not None
    sizes, rest, plain = layer_sizes(origin, settings.quantization, active)
    layers = {
        path: layer
        for path, layer in choose_layers(origin, settings.quantization.layers, active).items()
        if sizes[path]
    }
    allowed = settings.budget * plain - rest
    own = with_variant(origin.spec, settings.variant)
    costs: dict[str, dict[int, float]] = {}
    if run.world.is_main:  # one process measures, so that all have the same bits
        costs = measure(
            origin.to(run.world.device),
            layers,
            settings.quantization.weights,
            build_loss(own, settings.loss, ContextsConfig(train=own.variants[own.variant].contexts[:1])),
            [batch.to(run.world.device) for batch in sample],
        )
        origin.cpu()
    costs = broadcast_object(run.world, costs)  # type: ignore[assignment]
    bits = choose_bits(costs, {path: sizes[path] for path in layers}, allowed)
    for path, chosen in bits.items():
        loss = ", ".join(f"{b} bits {costs[path][b]:+.4f}" for b in BITS)
        run.note(f"{path}: {chosen} bits (loss by itself: {loss})")
    total = rest + sum(sizes[path][chosen] for path, chosen in bits.items())
    run.note(f"{run.path}: {total:,.0f} of {plain:,.0f} float bytes, {100 * total / plain:.1f} %")
    mixed = from_dict(QuantizationConfig, {**to_dict(settings.quantization), "bits": bits}, "quantization")
    return quantized_spec(origin, mixed, active)
