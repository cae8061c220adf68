"""train-backbone: from manifests to a trained convolutional backbone with a transducer and a CTC head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from lhotse.cut import Cut
from pydantic import Field

from asrkit.config import config, from_dict, to_dict
from asrkit.data.batches import CutTable, DataConfig, feature_statistics, text_of
from asrkit.data.manifests import open_cuts
from asrkit.data.tokenizer import Tokenizer, TokenizerKind, train_tokenizer
from asrkit.models import SIZES, AsrModel, ModelSpec
from asrkit.models.spec import Positive, Probability, Size
from asrkit.run_dir import TOKENIZER
from asrkit.training.distributed import World, broadcast_object, join_world
from asrkit.training.loop import Task, TrainingConfig, train
from asrkit.training.objective import LossConfig, recogniser_loss
from asrkit.training.run import RunWriter, dev_measure, usable_cuts


@config
class TokenizerConfig:
    """The tokenizer trained from the manifest when none is given."""

    kind: TokenizerKind = "bpe"
    vocab_size: Annotated[int, Field(ge=4)] = 500


@config
class BackboneConfig:
    """``size`` names a preset; any other field set replaces the preset's value."""

    size: Size = "small"
    dim: Positive | None = None
    num_layers: Positive | None = None
    feedforward_dim: Positive | None = None
    kernel_size: Positive | None = None
    subsampling_channels: tuple[Positive, Positive] = (8, 32)
    dropout: Probability = 0.1
    predictor_dim: Positive | None = None
    predictor_dropout: Probability = 0.1
    context_size: Positive = 2
    joiner_dim: Positive | None = None


@config
class TrainBackboneConfig:
    """Everything train-backbone can be told; config.yaml of the run holds it with every default written out."""

    seed: Annotated[int, Field(ge=0)] = 1
    bad_cuts: str = Field(default="refuse", pattern="^(refuse|skip)$")
    dev_max_cuts: Positive = 500
    model: BackboneConfig = field(default_factory=BackboneConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def model_spec(settings: BackboneConfig, vocab_size: int) -> ModelSpec:
    """The full spec of a preset with the replacements of ``settings``."""
    preset: dict[str, Any] = SIZES[settings.size]
    encoder = {
        key: getattr(settings, key) or preset["encoder"][key]
        for key in ("dim", "num_layers", "feedforward_dim", "kernel_size")
    }
    return from_dict(
        ModelSpec,
        {
            "vocab_size": vocab_size,
            "encoder": {
                **encoder,
                "subsampling_channels": settings.subsampling_channels,
                "dropout": settings.dropout,
            },
            "predictor": {
                "dim": settings.predictor_dim or preset["predictor"]["dim"],
                "context_size": settings.context_size,
                "dropout": settings.predictor_dropout,
            },
            "joiner_dim": settings.joiner_dim or preset["joiner_dim"],
        },
        "model",
    )


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
    with join_world(device) as world:
        inputs = {"manifest": manifest, "dev": dev, "tokenizer": tokenizer}
        inputs |= {f"set data.also.{number}": path for number, path in enumerate(settings.data.also)}
        with RunWriter.open(out, "train-backbone", to_dict(settings), inputs, command, world) as run:
            if run.finished:
                return out
            main = usable_cuts(open_cuts(manifest), None, settings.bad_cuts, run)
            others = [usable_cuts(open_cuts(path), None, settings.bad_cuts, run) for path in settings.data.also]
            every = [cut for cuts in (main, *others) for cut in cuts]
            pieces = _tokenizer(world, out, tokenizer, every, settings.tokenizer)
            main, *others = (
                usable_cuts(cuts, pieces, settings.bad_cuts, run, read_audio=True) for cuts in (main, *others)
            )
            dev_cuts = None if dev is None else usable_cuts(open_cuts(dev), None, settings.bad_cuts, run)
            table = CutTable(chain(*[main] * settings.data.repeat, *others))
            noise = None if settings.data.noise is None else CutTable(open_cuts(settings.data.noise))

            import torch

            torch.manual_seed(settings.seed)
            model = AsrModel(model_spec(settings.model, pieces.vocab_size))
            if run.fresh:
                mean, std = feature_statistics(table)
                model.encoder.normalise.mean.copy_(mean)
                model.encoder.normalise.std.copy_(std)
            run.describe(to_dict(model.spec), table, world)
            measure = (
                None
                if dev_cuts is None
                else dev_measure(
                    dev_cuts,
                    pieces,
                    world.device,
                    settings.data.max_duration,
                    settings.dev_max_cuts,
                    "greedy" if settings.loss.transducer_scale > 0 else "ctc",
                )
            )
            task = Task(
                model=model,
                loss=lambda model, batch, step: recogniser_loss(model, batch, step, settings.loss),
                batches=run.batches(
                    table, settings.data, pieces, noise, settings.training.accumulate, settings.seed, world
                ),
                measure=measure,
                publish=lambda average, step, metrics: run.publish(average, step, metrics),
            )
            train(
                task,
                out,
                settings.training,
                settings.data.num_workers,
                settings.seed,
                world,
            )
            run.finish()
    return out


def _tokenizer(
    world: World, out: Path, given: Path | None, cuts: Iterable[Cut], settings: TokenizerConfig
) -> Tokenizer:
    """The run's tokenizer: what is there already, else a copy of the given one, else one trained on the texts."""
    path = out / TOKENIZER
    if world.is_main and not path.is_file():
        if given is not None:
            Tokenizer(given).copy_to(path)
        else:
            train_tokenizer((text_of(cut) for cut in cuts), settings.kind, settings.vocab_size, path)
    broadcast_object(world, None)  # the others read it only once it is there
    return Tokenizer(path)
