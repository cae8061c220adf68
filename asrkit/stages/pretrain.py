"""pretrain: an encoder from audio alone, by wav2vec 2.0 (arXiv 2006.11477) on log-mel features.

Spans of frames are hidden from the encoder, which learns to tell what was there from what was elsewhere in the utterance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lhotse.cut import Cut
from torch import nn

from asrkit.config import to_dict
from asrkit.data.checks import encoder_frames
from asrkit.data.cut_audio import feature_statistics
from asrkit.data.masked_batches import MaskedBatches
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.methods.pretraining import (
    CollapseWatch,
    PretrainConfig,
    QuantizerConfig,
    dev_contrast,
    in_its_contexts,
    masked_batches,
    pretraining_loss,
)
from asrkit.methods.supernet.config import schedule_findings
from asrkit.methods.supernet.masks import grow_and_decay
from asrkit.methods.supernet.members import SPARSE, encoder_supernet_spec, idle, others_of_a_supernet
from asrkit.models.pretrained import OBJECTIVE, PretrainedEncoder
from asrkit.models.registry import ENCODER, build, load_encoder, require
from asrkit.models.spec import ContrastiveSpec
from asrkit.models.surgery import is_mask, rebuild, with_variant
from asrkit.run_dir import WEIGHTS, open_run
from asrkit.training.checkpoint import saved_slices
from asrkit.training.datasets import check_training_cuts, read_datasets, usable_cuts
from asrkit.training.session import TaskRecipe, input_files, open_training, slices_of, train_recipe
from asrkit.training.start import EncoderConfig, encoder_spec, idle_attention, trained_variant
from asrkit.training.step import TrainTask


def pretrain(
    manifest: Path,
    out: Path,
    settings: PretrainConfig,
    *,
    parent: Path | None = None,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Pretrain an encoder on audio, or resume an interrupted run; returns ``out``.

    Args:
        manifest: cuts with audio; texts are ignored.
        parent: run directory of a pretrained encoder to train further, with its quantizer and projections; None makes a new one.
        dev: cuts to measure the contrastive loss on.

    Raises:
        UserError: unusable manifests, parent, output directory or sizes, found before any training.
        Interrupted: stopped by a signal, state saved.
    """
    least = _check(settings, parent)
    entry: dict[str, Any] = to_dict(settings)
    if parent is not None:
        entry = {"from": str(parent), "from_weights_sha256": sha256_of(parent / WEIGHTS), **entry}
        del entry["model"], entry["quantizer"]
    files = input_files(settings, manifest=manifest, dev=dev)
    with open_training("pretrain", out, entry, files, parent=parent, device=device, command=command) as run:
        if run.finished:
            return out
        datasets = read_datasets(manifest, dev, settings.data, settings.bad_cuts, run, (), least=least)
        check_training_cuts(manifest, settings.data, None, settings.bad_cuts, run, least)
        dev_cuts = datasets.dev
        if dev_cuts is not None:  # now, not when it is first measured
            dev_cuts = usable_cuts(
                dev_cuts, None, settings.bad_cuts, run, read_audio=True, need_text=False, least=least
            )
        if len(datasets.training) == 1:
            run.note(f"{manifest}: holds one utterance, of which little can be learned; give as much audio as there is")

        def complete(task: TrainTask) -> TrainTask:
            if dev_cuts is None:
                return task
            assert isinstance(task.model, PretrainedEncoder)
            resolved = in_its_contexts(settings, task.model, task.variant)
            return replace(task, measure=measured(dev_cuts, resolved, task.variant))

        recipe = TaskRecipe(
            partial(build_task, settings, parent, out),
            run.path,
            (manifest,),
            settings,
            slices_of(run.path, settings.training, run.world),
            partial(masked_batches, settings.mask),
        )
        train_recipe(run, recipe, complete)
    return out


def build_task(settings: PretrainConfig, parent: Path | None, out: Path, batches: MaskedBatches) -> TrainTask:
    """The encoder of the run ``out`` and its loss; see ``TaskRecipe``."""
    if parent is None:
        model = new_encoder(settings, batches, with_statistics=saved_slices(out) is None)
        variant, dropout, notes = trained_variant(settings.model), settings.model.attention_dropout, []
    else:
        model = further_encoder(settings, parent)
        variant, dropout = model.spec.variant, None
        notes = others_of_a_supernet(model.spec, variant)
    hook, final = None, -1
    if (pruning := settings.supernet) is not None:
        spec = encoder_supernet_spec(model, pruning, variant)
        model = rebuild(spec, model, new=is_mask, drop=idle(model, model.submodels_of(variant)))
        variant, hook, final = spec.variant, grow_and_decay(pruning), pruning.growth.final(pruning.sparsity)
    assert model.spec.objective is not None
    settings = in_its_contexts(settings, model, variant)
    loss = partial(pretraining_loss, settings=settings, variant=variant, attention_dropout=dropout)
    watch = CollapseWatch(settings.training.steps, model.spec.objective)
    return TrainTask(
        model, loss, batches, before_step=hook, not_before=final + 1, variant=variant, watch=watch,
        facts={} if hook is None else {"masks_final_before_step": final}, notes=notes,
    )  # fmt: skip


def measured(
    dev: Sequence[Cut], settings: PretrainConfig, variant: str | None
) -> Callable[[nn.Module], dict[str, float]]:
    """``dev_contrast`` of the default variant, and of a supernet's sparse member too, under its name."""
    dense = dev_contrast(dev, settings, variant)
    if settings.supernet is None:
        return dense
    sparse = dev_contrast(dev, settings, SPARSE)
    return lambda model: {**dense(model), **{f"{SPARSE}_{key}": value for key, value in sparse(model).items()}}


def new_encoder(settings: PretrainConfig, batches: MaskedBatches, *, with_statistics: bool) -> PretrainedEncoder:
    """An untrained encoder, whose attention adds nothing yet; ``with_statistics`` measures the features of the training cuts."""
    spec = encoder_spec(settings.model, settings.contexts.train)
    model = build(replace(spec, objective=_objective(settings.quantizer)))
    for attention in model.encoder.submodels.values():
        attention.silence()  # type: ignore[operator]
    if with_statistics:
        mean, std = feature_statistics(batches.table, batches.skip_bad)
        model.encoder.normalize.mean.copy_(mean)
        model.encoder.normalize.std.copy_(std)
    return model


def further_encoder(settings: PretrainConfig, parent: Path) -> PretrainedEncoder:
    """The encoder of the run directory ``parent``, with the quantizer and projections it was pretrained with, or new ones if it has
    none."""
    origin = load_encoder(open_run(parent))
    spec = with_variant(origin.spec, settings.variant, settings.contexts.train)
    return rebuild(replace(spec, objective=spec.objective or _objective(settings.quantizer)), origin, new=(OBJECTIVE,))


def _objective(quantizer: QuantizerConfig) -> ContrastiveSpec:
    return ContrastiveSpec(**to_dict(quantizer))


def _check(settings: PretrainConfig, parent: Path | None) -> int:
    """Refuse settings that contradict each other or the parent; returns the encoder frames that a cut must have."""
    findings = []
    if parent is not None:
        source = open_run(parent)
        require(source, ENCODER)
        spec = load_encoder(source).spec
        with_variant(spec, settings.variant)
        if settings.model != EncoderConfig():
            findings.append("model: a pretrained encoder already has its shape; leave out --set model.*, or --from")
        if settings.quantizer != QuantizerConfig():
            findings.append("quantizer: is taken from the parent; leave out --set quantizer.*, or --from")
    else:
        findings += idle_attention(settings.model)
    if parent is None and settings.variant is not None:
        findings.append("variant: works with --from only, because a new encoder has no variants to choose from")
    if settings.quantizer.code_dim % settings.quantizer.groups:
        findings.append(
            "quantizer.code_dim: every codebook has an equal share of it; make it a multiple of quantizer.groups"
        )
    if settings.supernet is not None:
        findings += schedule_findings(settings.supernet, settings.training, group="supernet.")
        if parent is not None:
            encoder_supernet_spec(load_encoder(open_run(parent)), settings.supernet, settings.variant, str(parent))
    if settings.temperature.end > settings.temperature.start:
        findings.append("temperature.end: is above temperature.start, but the temperature falls; swap them")
    augment, length = settings.data.augment, settings.mask.length
    # A span and two frames more, however much faster the perturbed cut is.
    least = math.ceil((length + 2) * (1 + augment.speed) * (1 + augment.tempo))
    if encoder_frames(settings.data.crop) < least:
        findings.append(
            f"data.crop: {settings.data.crop:g} s are {encoder_frames(settings.data.crop)} encoder frames, but a span of mask.length="
            f"{length} needs {least}; raise data.crop, or lower mask.length"
        )
    if findings:
        raise UserError.of(findings)
    return least
