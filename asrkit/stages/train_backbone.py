"""train-backbone: from manifests to a trained convolutional backbone with a transducer and a CTC head.

Stage A of modular training (US20240185839A1): the backbone alone, or with attention that is dropped at random. With ``--from``, it
fine-tunes any trained model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from asrkit.config import config
from asrkit.data.train_batches import TrainBatches
from asrkit.errors import UserError
from asrkit.methods.distillation.loss import build_loss
from asrkit.methods.supernet.members import others_of_a_supernet
from asrkit.training.asr_loss import check_losses
from asrkit.training.datasets import read_datasets
from asrkit.training.session import input_files, open_training, run_recipe
from asrkit.training.start import (
    StartConfig,
    TokenizerConfig,
    check_languages_present,
    check_start,
    config_entry,
    dropped_attention,
    first_model,
    make_tokenizer,
    new_parts_first,
    open_parent,
    usual_settings,
)
from asrkit.training.step import TrainTask


@config
class TrainBackboneConfig(StartConfig):
    """Settings of train-backbone. config.yaml of the run holds them all."""


def defaults(parent: Path | None) -> TrainBackboneConfig:
    """The defaults of a run that makes a new model, or starts from the run directory ``parent``."""
    usual = usual_settings(parent)
    return TrainBackboneConfig(data=usual.data, loss=usual.loss, training=usual.training)


def train_backbone(
    manifest: Path,
    out: Path,
    settings: TrainBackboneConfig,
    *,
    parent: Path | None = None,
    dev: Path | None = None,
    tokenizer: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Train a backbone, or resume an interrupted run; returns ``out``.

    Args:
        parent: run directory of a model to train further; None makes a new one. The model keeps its tokenizer, feature statistics,
            masks, kinds of integers, and the sub-models that are not in the trained variant. A pretrained encoder gets a tokenizer,
            a predictor, a joiner and heads as a new model does, and keeps the rest.
        tokenizer: sentencepiece model of a new model; None trains one.

    Raises:
        UserError: unusable manifests, tokenizer, parent, output directory or sizes, found before any training.
        Interrupted: stopped by a signal, state saved.
    """
    check_losses(settings.contexts, settings.loss)
    if findings := check_start(settings, parent, tokenizer):
        raise UserError.of(findings)
    origin = None if parent is None else open_parent(parent, settings)
    new_tokenizer = origin is None or origin.is_encoder
    if new_tokenizer and tokenizer is None and settings.tokenizer is None:
        settings = replace(settings, tokenizer=TokenizerConfig())
    entry = config_entry(settings, origin)
    files = input_files(settings, manifest=manifest, dev=dev, tokenizer=tokenizer)
    with open_training("train-backbone", out, entry, files, parent=parent, device=device, command=command) as run:
        if run.finished:
            return out
        languages = settings.model.languages if origin is None else origin.languages(settings)
        datasets = read_datasets(manifest, dev, settings.data, settings.bad_cuts, run, languages)
        check_languages_present(settings, origin, datasets.training)
        given = tokenizer if origin is None else origin.tokenizer(tokenizer)
        make_tokenizer(run, given, datasets.training, settings.tokenizer or TokenizerConfig())
        run_recipe(run, partial(build_task, settings, parent, out), manifest, settings, datasets.dev)
    return out


def build_task(settings: TrainBackboneConfig, parent: Path | None, out: Path, batches: TrainBatches) -> TrainTask:
    """The model of the run ``out`` and its loss; see ``TaskRecipe``."""
    model, variant = first_model(settings, parent, out, batches)
    loss = build_loss(
        model.spec,
        settings.loss,
        settings.contexts,
        variant=variant,
        attention_dropout=dropped_attention(settings, parent),
    )
    notes = others_of_a_supernet(model.spec, variant)
    return TrainTask(model, new_parts_first(settings, parent, loss), batches, variant=variant, notes=notes)
