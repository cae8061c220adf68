"""supernet: train one set of weights as two models, a dense one and a sparse streaming one.

Self-pruning (arXiv 2207.11906) with options of omni-sparsity DNN (arXiv 2110.08352). The masks are on in the variant ``sparse`` and off
in the variant ``dense``, which goes on training the weights under them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from asrkit.data.batch import Batch
from asrkit.data.cut_table import CutTable
from asrkit.data.train_batches import TrainBatches
from asrkit.errors import UserError
from asrkit.methods.supernet.config import MembersConfig, SupernetConfig, contradictions
from asrkit.methods.supernet.loss import supernet_loss
from asrkit.methods.supernet.masks import density, grow_and_decay, masks_digest
from asrkit.methods.supernet.members import DENSE, SPARSE, idle, supernet_spec
from asrkit.models import AsrModel, ModelSpec, load_model
from asrkit.models.compression import masked_layers
from asrkit.models.registry import ENCODER, load_encoder
from asrkit.models.surgery import is_mask, rebuild, recognizer_of
from asrkit.nn.context import parse_context
from asrkit.run_dir import open_run
from asrkit.training.asr_loss import check_losses
from asrkit.training.datasets import read_datasets
from asrkit.training.dev_eval import dev_measure
from asrkit.training.session import input_files, open_training, run_recipe
from asrkit.training.start import (
    Parent,
    TokenizerConfig,
    check_start,
    config_entry,
    first_model,
    make_tokenizer,
    new_parts_first,
    open_parent,
    steps_of_new_parts,
    usual_settings,
    with_transducer,
)
from asrkit.training.step import LossOutput, TrainTask

SUBSAMPLING = "encoder.subsampling.*"  # the layers in front of the blocks


def defaults(parent: Path) -> SupernetConfig:
    """The defaults of a run that starts from the run directory ``parent``: a recognizer, or a pretrained encoder."""
    usual = usual_settings(parent)
    return SupernetConfig(data=usual.data, loss=usual.loss, training=usual.training)


def supernet(
    parent: Path,
    manifest: Path,
    out: Path,
    settings: SupernetConfig,
    *,
    dev: Path | None = None,
    tokenizer: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Train the model of ``parent`` as a supernet, or resume an interrupted run; returns ``out``.

    Args:
        parent: run directory of a recognizer, or of a pretrained encoder, which gets a tokenizer, a predictor, a joiner and heads first.
        tokenizer: sentencepiece model for a pretrained encoder; None trains one.

    Raises:
        UserError: an unusable parent, settings that contradict each other, layers that the blocks do not divide, masks that
            would not be final in time, manifests, out.
        Interrupted: stopped by a signal, state saved.
    """
    check_losses(settings.contexts, settings.loss)
    findings = check_start(settings, parent, tokenizer, attention=False)
    settings = completed(settings, parent, tokenizer)
    findings += contradictions(settings, steps_of_new_parts(settings, parent))
    origin = open_parent(parent, settings)
    try:
        spec = supernet_spec(recognizer(origin, settings), settings, str(parent))
        if settings.draws != (1, 1) and with_levels(spec):
            findings.append("draws: every batch is split between the members of this supernet; leave draws out")
        if settings.freeze_masks and settings.members.random != MembersConfig().random and not with_levels(spec):
            findings.append("members.random: this supernet has no members between its two; leave it out")
    except UserError as error:
        findings += error.lines
    if findings:
        raise UserError.of(findings)
    entry, files = (
        config_entry(settings, origin),
        input_files(settings, manifest=manifest, dev=dev, tokenizer=tokenizer),
    )
    with open_training("supernet", out, entry, files, parent=parent, device=device, command=command) as run:
        if run.finished:
            return out
        datasets = read_datasets(manifest, dev, settings.data, settings.bad_cuts, run, origin.languages(settings))
        make_tokenizer(run, origin.tokenizer(tokenizer), datasets.training, settings.tokenizer or TokenizerConfig())
        run_recipe(run, partial(build_task, settings, parent, out), manifest, settings, datasets.dev)
    return out


def completed(settings: SupernetConfig, parent: Path, tokenizer: Path | None) -> SupernetConfig:
    """The settings with what a pretrained encoder needs beside: a tokenizer, unless one is given; and, unless the masks are its own, a
    time for them to begin after the steps that do not train it, and none for a subsampling that is never trained."""
    if open_run(parent).kind != ENCODER:
        return settings
    if tokenizer is None and settings.tokenizer is None:
        settings = replace(settings, tokenizer=TokenizerConfig())
    if settings.freeze_masks:
        return settings
    growth, layers = settings.growth, settings.layers
    if growth.start is None:
        growth = replace(growth, start=steps_of_new_parts(settings, parent) + growth.interval)
    if settings.pretrained.freeze_embed and SUBSAMPLING not in layers.exclude:
        layers = replace(layers, exclude=[*layers.exclude, SUBSAMPLING])
    return replace(settings, growth=growth, layers=layers)


def with_levels(spec: ModelSpec) -> bool:
    """Whether there are members between the dense and the sparse one."""
    return any(how.levels for how in spec.compression.values())


def recognizer(parent: Parent, settings: SupernetConfig) -> AsrModel:
    """A recognizer of the parent's layers; one made of a pretrained encoder has a vocabulary of its own only in training."""
    if isinstance(parent.spec, ModelSpec):
        return load_model(parent.run)
    return recognizer_of(load_encoder(parent.run), with_transducer(parent.spec, settings.model, 2))


def build_task(settings: SupernetConfig, parent: Path, out: Path, batches: TrainBatches) -> TrainTask:
    """The model with its two variants, its loss, and the hook that lets its masks grow; see ``TaskRecipe``."""
    origin, _ = first_model(settings, parent, out, batches)
    spec = supernet_spec(origin, settings)
    model = rebuild(spec, origin, new=is_mask, drop=idle(origin, origin.submodels_of(settings.variant)))
    model.encoder.masks = origin.encoder.masks  # what is hidden of the frames, not of the weights
    for name, weight in model.named_parameters():
        weight.requires_grad_(origin.get_parameter(name).requires_grad)
    frozen, growth = settings.freeze_masks, settings.growth
    final = 0 if frozen else growth.final(settings.sparsity)
    contexts = {DENSE: parse_context(settings.dense), SPARSE: parse_context(settings.sparse)}
    random = settings.members.random if with_levels(spec) else 0
    kept = density(model) if frozen else 1.0

    def loss(model: AsrModel, batch: Batch, step: int) -> LossOutput:
        return supernet_loss(
            model,
            batch,
            step,
            settings.loss,
            contexts,
            pruning=settings,
            random=random,
            sparsity=1 - kept if frozen else growth.sparsity_at(step, settings.sparsity),
            adaptive_dropout=settings.adaptive_dropout,
            distillation=settings.distillation,
        )

    alone = steps_of_new_parts(settings, parent)
    digest = masks_digest(model.state_dict())

    def check(weights: Mapping[str, Tensor]) -> None:
        if frozen and (now := masks_digest(weights)) != digest:
            raise RuntimeError(f"the frozen masks have changed: {digest} became {now}")

    return TrainTask(
        model,
        new_parts_first(settings, parent, loss),
        batches,
        before_step=None if frozen else grow_and_decay(settings, alone),
        dev_metrics=partial(other_member, settings, batches),
        not_before=0 if frozen else final + 1,
        facts={"masks_sha256": digest} if frozen else {"masks_final_before_step": final},
        notes=_notes(model, origin, settings, final),
        check=check,
    )


def other_member(settings: SupernetConfig, batches: TrainBatches, model: nn.Module, dev: CutTable) -> dict[str, float]:
    """The dev error rates of the variant that is not the default one, under its name."""
    name, context = (DENSE, settings.dense) if settings.default == SPARSE else (SPARSE, settings.sparse)
    method: Any = "greedy" if settings.loss.transducer_scale > 0 else "ctc"
    measure = dev_measure(
        dev, batches.tokenizer, settings.data.max_duration, settings.dev_max_cuts, method, name, parse_context(context)
    )
    return {f"{name}_{key}": value for key, value in measure(model).items()}


def _notes(model: AsrModel, origin: AsrModel, settings: SupernetConfig, final: int) -> list[str]:
    """What will be masked, and a warning for a context that the parent was never trained in."""
    layers = [layer for _, layer, _ in masked_layers(model)]
    when = "are the parent's and stay" if settings.freeze_masks else f"are final from step {final} on"
    notes = [f"{len(layers)} layers of {sum(layer.weight.numel() for layer in layers)} weights; the masks {when}"]
    trained = {text for variant in origin.spec.variants.values() for text in variant.contexts}
    if parse_context(settings.sparse).streaming and settings.sparse not in trained:
        notes.append(
            f"warning: the parent was never trained in {settings.sparse} but in {' and '.join(sorted(trained))}; expect the sparse "
            "variant to need a long training, or first train the parent in it (--set contexts.train=...)"
        )
    return notes
