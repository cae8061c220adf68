"""train-backbone: from manifests to a trained convolutional backbone with a transducer and a CTC head.

Stage A of modular training (US20240185839A1): the backbone alone, or with attention that is dropped at random. A model that has
been trained before is trained on, whatever its parts: fine-tuning.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from asrkit.config import config
from asrkit.data.train_batches import TrainBatches
from asrkit.errors import UserError
from asrkit.methods.distillation.loss import build_loss
from asrkit.methods.pruning import keep_pruned
from asrkit.training.asr_loss import check_contexts
from asrkit.training.datasets import read_datasets
from asrkit.training.distributed import join_world
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import FineTuneConfig, Prepared, StageConfig, inputs_of, train_stage
from asrkit.training.start import (
    StartConfig,
    TokenizerConfig,
    check_languages_present,
    check_start,
    first_model,
    open_parent,
    run_tokenizer,
    told,
)


@config
class TrainBackboneConfig(StartConfig):
    """Settings of train-backbone. config.yaml of the run holds them all."""


def defaults(trained: bool) -> TrainBackboneConfig:
    """The defaults of a run: those of later stages for a model that has been trained before."""
    plain = FineTuneConfig() if trained else StageConfig()
    return TrainBackboneConfig(loss=plain.loss, training=plain.training)


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
    """Train a backbone, or go on with a run that was interrupted; returns ``out``.

    Args:
        parent: run directory of a model to train on; None makes a new one. Its tokenizer and its features' statistics stay, and
            so do sub-models that the trained variant has not, masks and the kind of integers.
        tokenizer: sentencepiece model of a new model; None trains one.

    Raises:
        UserError: unusable manifests, tokenizer, parent, output directory or sizes, found before any training.
        Interrupted: stopped by a signal, state saved.
    """
    check_contexts(settings.contexts, settings.loss)
    if findings := check_start(settings, parent, tokenizer):
        raise UserError.of(findings)
    origin = None if parent is None else open_parent(parent, settings)

    def prepare(run: RunWriter, batches: TrainBatches) -> Prepared:
        model, variant = first_model(settings, origin, run, batches)
        return Prepared(
            model=model,
            loss=build_loss(
                model.spec,
                settings.loss,
                settings.contexts,
                variant=variant,
                attention_dropout=settings.model.attention_dropout if origin is None else None,
            ),
            after_step=keep_pruned,
            variant=variant,
        )

    if origin is None and tokenizer is None and settings.tokenizer is None:
        settings = replace(settings, tokenizer=TokenizerConfig())
    inputs = inputs_of(settings, manifest=manifest, dev=dev, tokenizer=tokenizer)
    with (
        join_world(device) as world,
        RunWriter.open(out, "train-backbone", told(settings, origin), inputs, command, world, parent=parent) as run,
    ):
        if run.finished:
            return out
        languages = settings.model.languages if origin is None else origin.spec.languages
        material = read_datasets(manifest, dev, settings.data, settings.bad_cuts, run, languages, {})
        check_languages_present(settings, origin, material.every)
        given = tokenizer if origin is None else origin.run.tokenizer_path
        pieces = run_tokenizer(world, out, given, material.every, settings.tokenizer or TokenizerConfig())
        train_stage(run, settings, material, pieces, prepare)
    return out
