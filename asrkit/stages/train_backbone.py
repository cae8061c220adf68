"""train-backbone: from manifests to a trained convolutional backbone with a transducer and a CTC head.

Stage A of modular training (US20240185839A1): the backbone alone, or with attention that is dropped at random.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from asrkit.config import config, to_dict
from asrkit.data.batches import TrainBatches
from asrkit.training.backbone import (
    BackboneConfig,
    TokenizerConfig,
    new_model,
    run_tokenizer,
    trained_configuration,
)
from asrkit.training.distributed import join_world
from asrkit.training.objective import check_contexts, recogniser_loss
from asrkit.training.run import RunWriter, read_material
from asrkit.training.stage import Prepared, StageConfig, inputs_of, train_stage


@config
class TrainBackboneConfig(StageConfig):
    """Everything train-backbone can be told; config.yaml of the run holds it with every default written out."""

    model: BackboneConfig = field(default_factory=BackboneConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


def train_backbone(
    manifest: Path,
    out: Path,
    settings: TrainBackboneConfig,
    *,
    dev: Path | None = None,
    tokenizer: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Train a backbone, or go on with a run that was interrupted; returns ``out``.

    Raises:
        UserError: unusable manifests, tokenizer, output directory or sizes, found before any training.
        Interrupted: stopped by a signal, state saved.
    """
    check_contexts(settings.contexts, settings.loss)

    def prepare(run: RunWriter, batches: TrainBatches) -> Prepared:
        return Prepared(
            model=new_model(settings.model, settings.contexts, run, batches),
            loss=lambda model, batch, step: recogniser_loss(
                model,
                batch,
                step,
                settings.loss,
                settings.contexts,
                trained_configuration(settings.model),
                settings.model.attention_dropout,
            ),
        )

    inputs = inputs_of(settings, manifest=manifest, dev=dev, tokenizer=tokenizer)
    with (
        join_world(device) as world,
        RunWriter.open(out, "train-backbone", to_dict(settings), inputs, command, world) as run,
    ):
        if run.finished:
            return out
        languages = settings.model.languages
        material = read_material(manifest, dev, settings.data, settings.bad_cuts, run, languages, {})
        pieces = run_tokenizer(world, out, tokenizer, material.every, settings.tokenizer)
        train_stage(run, settings, material, pieces, prepare)
    return out
