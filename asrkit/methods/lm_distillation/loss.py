"""The loss of distill-lm: the recognizer's own, and what its heads learn from labels and language models (arXiv 2110.10429)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from asrkit.config import from_dict, to_dict
from asrkit.data.alignment import SILENT, Annotator, PerturbedCut, Segments
from asrkit.data.batch import Batch, evaluation_batches
from asrkit.data.cut_table import CutTable
from asrkit.data.text.units import Inventory
from asrkit.devices import send
from asrkit.losses.lm_distillation import (
    frame_accuracy,
    interpolated_labels,
    label_cross_entropy,
    lm_posteriors,
    multi_task,
    one_hot_silence,
    rearrange,
    soft_cross_entropy,
)
from asrkit.methods.lm_distillation.config import DistillLmConfig, HeadConfig
from asrkit.methods.lm_distillation.teachers import SUPERVISED
from asrkit.models import AsrModel, ModelSpec
from asrkit.models.asr import tapped
from asrkit.models.lm import LanguageModel
from asrkit.nn.context import parse_context
from asrkit.training.dev_eval import even_subset
from asrkit.training.step import LossOutput, Metric


def lm_distillation_loss(
    model: AsrModel,
    lms: Mapping[str, LanguageModel],
    batch: Batch,
    step: int,
    settings: DistillLmConfig,
    plain_loss: Callable[[Any, Batch, int], LossOutput],
) -> LossOutput:
    """The recognizer's own ``plain_loss`` of an annotated batch plus the losses of its heads.

    Losses are sums over an utterance's frames, (B,), like the recognizer's own loss: equation 4 for mtl, equation 3 for lst.
    """
    layers = {name: head_layer(head.layer, model) for name, head in model.spec.heads.items()}
    with tapped(model, {*layers.values()}) as taps:
        own = plain_loss(model, batch, step)
    logits = {name: model.heads[name](taps[layer]) for name, layer in layers.items()}
    main, metrics = own.losses, dict(own.metrics)
    counted = {name: counted_frames(segments, settings.silence) for name, segments in batch.segments.items()}
    temperature = settings.temperature or {"mtl": 1.0, "lst": 5.0}[settings.mode]
    student_temperature = temperature if settings.both_temperatures else 1.0
    posteriors = {
        name: frame_posteriors(lm.to(main.device).eval(), batch.segments[name], temperature) for name, lm in lms.items()
    }
    if SUPERVISED in logits:
        labels = frame_labels(batch.segments[SUPERVISED])
        if settings.mode == "lst":
            (expected,) = posteriors.values()
            targets = interpolated_labels(labels, expected, settings.labels)
            supervised = soft_cross_entropy(logits[SUPERVISED], targets, counted[SUPERVISED], student_temperature)
        else:
            supervised = label_cross_entropy(logits[SUPERVISED], labels, counted[SUPERVISED])
        main = main + settings.supervised_scale * supervised
        metrics[SUPERVISED] = Metric(supervised.detach().sum(), own.count)
    if settings.mode == "lst":
        return replace(own, losses=main, metrics=metrics)
    by_head = {
        name: soft_cross_entropy(logits[name], targets, counted[name], student_temperature)
        for name, targets in posteriors.items()
    }
    metrics |= {f"lm_{name}": Metric(losses.detach().sum(), own.count) for name, losses in by_head.items()}
    weights = [settings.heads.get(name, HeadConfig()).weight for name in by_head]
    shares = send(torch.tensor([1 / len(by_head) if weight is None else weight for weight in weights]), main.device)
    losses = multi_task(main, torch.stack(list(by_head.values())), shares, settings.labels)
    return replace(own, losses=losses, metrics=metrics)


def frame_posteriors(lm: LanguageModel, segments: Segments, temperature: float) -> Tensor:
    """The language model's posteriors of each frame's unit given the units before it, (B, T', V); silence for frames without a unit."""
    with torch.no_grad():
        logits = lm(segments.symbols)[:, :-1]
    posteriors = lm_posteriors(logits, temperature)
    silent = one_hot_silence(segments.frames, posteriors.shape[-1])
    return torch.where(segments.frames.unsqueeze(-1) >= 0, rearrange(posteriors, segments.frames), silent)


def frame_labels(segments: Segments) -> Tensor:
    """The unit of each frame, (B, T') int64; 0, which is silence, for frames without one."""
    return rearrange(segments.symbols, segments.frames).masked_fill(segments.frames < 0, 0)


def counted_frames(segments: Segments, silence: str) -> Tensor:
    """Which frames a head learns from, (B, T') bool: those with a unit, and silence if it is a class of its own."""
    return segments.frames >= (SILENT if silence == "own" else 0)


def with_heads(spec: ModelSpec, inventories: Mapping[str, Inventory], settings: Mapping[str, HeadConfig]) -> ModelSpec:
    """The spec with a head for each inventory."""
    heads = {}
    for name, inventory in inventories.items():
        own = settings.get(name, HeadConfig())
        hidden = own.hidden or spec.encoder.dim
        heads[name] = {"unit": inventory.unit, "classes": inventory.size, "hidden": hidden, "layer": own.layer}
    return from_dict(ModelSpec, {**to_dict(spec), "heads": heads}, "heads")


def head_layer(layer: int | None, model: AsrModel) -> int:
    """The index of the encoder block that a head reads."""
    return len(model.encoder.blocks) - 1 if layer is None else layer


def accuracy_of(annotator: Annotator, settings: DistillLmConfig) -> Callable[[Any, CutTable], dict[str, float]]:
    """A function from a model and aligned cuts to the supervised head's frame accuracy, as reported in the paper."""

    def measure(model: AsrModel, cuts: CutTable) -> dict[str, float]:
        counts = frame_counts(model, cuts, annotator, settings).values()
        return {"frame_accuracy": sum(right for right, _ in counts) / max(1, sum(total for _, total in counts))}

    return measure


@torch.no_grad()
def frame_counts(
    model: AsrModel, cuts: CutTable, annotator: Annotator, settings: DistillLmConfig
) -> dict[str, tuple[int, int]]:
    """Of each aligned cut, by its id: how many frames the supervised head has right, and how many have a label."""
    supervised = replace(annotator, inventories={SUPERVISED: annotator.inventories[SUPERVISED]})
    by_id = {cut.id: cut for cut in even_subset(cuts, settings.dev_max_cuts)}
    variant = model.spec.variant
    context = parse_context(model.spec.variants[variant].contexts[0])
    layer = head_layer(model.spec.heads[SUPERVISED].layer, model)
    device = next(model.parameters()).device
    counts: dict[str, tuple[int, int]] = {}
    for batch in evaluation_batches(list(by_id.values()), settings.data.max_duration):
        lens = batch.feature_lens.tolist()
        cuts_of = [[PerturbedCut(by_id[cut_id], length)] for cut_id, length in zip(batch.cut_ids, lens, strict=True)]
        segments = supervised(cuts_of)[SUPERVISED].to(device)
        batch = batch.to(device)
        with tapped(model, [layer]) as taps:
            languages = model.language_ids(batch.languages)
            model.encode(batch.features, batch.feature_lens, variant, context, languages=languages)
        logits = model.heads[SUPERVISED](taps[layer])
        rows = zip(logits, frame_labels(segments), counted_frames(segments, settings.silence), strict=True)
        counts.update(zip(batch.cut_ids, (frame_accuracy(*row) for row in rows), strict=True))
    return counts
