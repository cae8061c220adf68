"""What stages that start from a trained model share: its directory, its tokenizer, new data, the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from asrkit.config import config, to_dict
from asrkit.data.batches import Batch, DataConfig, TrainBatches
from asrkit.data.tokenizer import Tokenizer
from asrkit.errors import UserError
from asrkit.models import AsrModel, load_model
from asrkit.models.spec import Positive
from asrkit.nn.context import parse_context
from asrkit.run_dir import TOKENIZER, WEIGHTS, RunDir, open_run, sha256_of
from asrkit.training.distributed import broadcast_object, join_world
from asrkit.training.loop import Task, TrainingConfig, train
from asrkit.training.objective import ContextsConfig, LossConfig, LossOutput, check_contexts
from asrkit.training.optim import OptimiserConfig
from asrkit.training.run import RunWriter, dev_measure, read_material, training_table


@config
class FineTuneConfig:
    """What every stage that goes on training can be told; a stage's own settings come on top.

    Different from train-backbone, and ours: the transducer's simple part does not lead again, and AdamW at a quarter of its
    usual rate.
    """

    seed: Annotated[int, Field(ge=0)] = 1
    bad_cuts: str = Field(default="refuse", pattern="^(refuse|skip)$")
    dev_max_cuts: Positive = 500
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=lambda: LossConfig(warm_up_steps=0))
    contexts: ContextsConfig = field(default_factory=ContextsConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(optimiser=OptimiserConfig(name="adamw", learning_rate=5e-4))
    )


@dataclass(frozen=True)
class Prepared:
    """A stage's model, ready to train.

    loss: (model, batch on the device, step) -> LossOutput.
    frozen: parts that stay in evaluation mode.
    after_step: (model, step) after the weights moved, to put right what must hold of them.
    not_before: the first step after which the model is what the stage promises.
    extra: what the stage adds to its entry in the lineage.
    check: looks at the finished run's weights; raises when what the stage promises does not hold.
    """

    model: AsrModel
    loss: Callable[[Any, Batch, int], LossOutput]
    frozen: Sequence[nn.Module] = ()
    after_step: Callable[[Any, int], None] | None = None
    not_before: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, torch.Tensor]], None] | None = None


def load_teacher(path: Path, student: RunDir) -> AsrModel:
    """The frozen model of a run directory, to teach that of ``student``, whose tokenizer it must share.

    Raises:
        UserError: unusable, or of another tokenizer.
    """
    run = open_run(path)
    if sha256_of(run.tokenizer_path) != sha256_of(student.tokenizer_path):
        raise UserError(
            f"--teacher {path}: has another tokenizer than {student.path}, so its tokens mean something else; "
            "a teacher must have been trained with the student's (train-backbone --tokenizer)"
        )
    return load_model(run).requires_grad_(False)


def fine_tune(
    stage: str,
    parent: RunDir,
    manifest: Path,
    out: Path,
    settings: FineTuneConfig,
    prepare: Callable[[RunWriter, TrainBatches], Prepared],
    *,
    content: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Path | None] | None = None,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Run a stage on the model of ``parent``, or go on with a run that was interrupted; returns ``out``.

    Args:
        prepare: makes the model, and may look at the training batches; torch's generator is seeded before. The model's default
            configuration is trained and measured.
        content: what the stage was told besides ``settings``, for config.yaml.
        inputs: files besides the manifests, by the name of their option.

    Raises:
        UserError: unusable manifests or output directory, found before any training.
        Interrupted: stopped by a signal, state saved.
    """
    check_contexts(settings.contexts, settings.loss)
    files: dict[str, Path | None] = {"manifest": manifest, "dev": dev, **(inputs or {})}
    files |= {f"set data.also.{number}": path for number, path in enumerate(settings.data.also)}
    told = {
        "from": str(parent.path),
        "from_weights_sha256": sha256_of(parent.path / WEIGHTS),
        **(content or {}),
        **to_dict(settings),
    }
    with (
        join_world(device) as world,
        RunWriter.open(out, stage, told, files, command, world, parent=parent.path) as run,
    ):
        if run.finished:
            return out
        if world.is_main and not (out / TOKENIZER).is_file():
            Tokenizer(parent.tokenizer_path).copy_to(out / TOKENIZER)
        broadcast_object(world, None)  # the others read it only once it is there
        pieces = Tokenizer(out / TOKENIZER)
        material = read_material(manifest, dev, settings.data, settings.bad_cuts, run)
        table, noise = training_table(material, settings.data, pieces, settings.bad_cuts, run)
        batches = run.batches(table, settings.data, pieces, noise, settings.training.accumulate, settings.seed, world)
        torch.manual_seed(settings.seed)
        prepared = prepare(run, batches)
        run.extra = dict(prepared.extra)
        spec = prepared.model.spec
        run.describe(to_dict(spec), table, world)
        task = Task(
            model=prepared.model,
            loss=prepared.loss,
            batches=batches,
            measure=None
            if material.dev is None
            else dev_measure(
                material.dev,
                pieces,
                settings.data.max_duration,
                settings.dev_max_cuts,
                "greedy" if settings.loss.transducer_scale > 0 else "ctc",
                spec.configuration,
                parse_context(spec.configurations[spec.configuration].contexts[0]),
            ),
            publish=lambda average, step, metrics: run.publish(average, step, metrics),
            frozen=prepared.frozen,
            after_step=prepared.after_step,
            not_before=prepared.not_before,
        )
        train(task, out, settings.training, settings.data.num_workers, settings.seed, world)
        if world.is_main and prepared.check is not None:
            prepared.check(RunDir(out, {}, {}, []).weights())
        run.finish()
    return out
