"""config: what can be set."""

from __future__ import annotations

import json
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from asrkit.cli import plugins
from asrkit.cli.options import output

# By command, the class of its settings, which would import torch here. What can be set is in settings.json, which `make generated`
# writes, so that `asrkit config` answers at once.
SETTINGS = {
    "pretrain": "asrkit.methods.pretraining:PretrainConfig",
    "train-backbone": "asrkit.stages.train_backbone:TrainBackboneConfig",
    "add-submodel": "asrkit.stages.add_submodel:AddSubModelConfig",
    "distill": "asrkit.stages.distill:DistillConfig",
    "distill-lm": "asrkit.stages.distill_lm:DistillLmConfig",
    "supernet": "asrkit.methods.supernet.config:SupernetConfig",
    "supernet-cut": "asrkit.methods.supernet.cut:SearchConfig",
    "sequence-train": "asrkit.methods.sequence.config:SequenceTrainConfig",
    "prune": "asrkit.stages.prune:PruneConfig",
    "quantize": "asrkit.models.compression:QuantizationConfig",
    "qat": "asrkit.stages.qat:QatConfig",
    "align": "asrkit.stages.align:AlignConfig",
    "train-lm": "asrkit.stages.train_lm:TrainLmConfig",
}
DESCRIBED = Path(__file__).with_name("settings.json")
Format = StrEnum("Format", ["table", "yaml", "json", "markdown"])


def register(app: typer.Typer) -> None:
    """Add the command ``config``."""
    app.command("config")(config)


def config(
    stage: Annotated[
        str | None, typer.Argument(help="Command whose settings to list. Without it the commands are listed.")
    ] = None,
    key: Annotated[
        str | None, typer.Argument(help="Only this setting or group, such as training.optimizer.", show_default=False)
    ] = None,
    format: Annotated[
        Format, output(help="table; yaml, a file for --config; json; or markdown, as in the documentation.")
    ] = Format.table,
    everything: Annotated[bool, output("--all", help="Also list advanced settings, which few trainings need.")] = False,
) -> None:
    """List what can be set for a stage: every key with its values, default and meaning.

    Examples:

        asrkit config train-backbone

        asrkit config qat quantization

        asrkit config train-backbone --format yaml > backbone.yaml

    Set one with --set KEY=VALUE, or several in a file for --config. --seed and other options are short for settings.
    """
    if stage is None:
        typer.echo("\n".join(["asrkit config STAGE [KEY], where STAGE is one of", *stages()]))
        return
    typer.echo(listing(stage, key, format.value, everything))


def stages() -> list[str]:
    """The commands that have settings."""
    from asrkit.cli import built_in

    return [*SETTINGS, *plugins.names(built_in())]


def settings_class(stage: str) -> type[Any]:
    """The settings of a command.

    Raises:
        UserError: there is none of that name.
    """
    from asrkit.config import nearest
    from asrkit.errors import UserError

    if stage in SETTINGS:
        module, _, name = SETTINGS[stage].partition(":")
        return getattr(import_module(module), name)
    if stage in stages():
        return plugins.load(stage)[2]
    near = nearest(stage, stages())
    raise UserError(
        f"{stage}: is not a stage with settings; " + (f"did you mean {near}?" if near else "see `asrkit config`")
    )


def listing(stage: str, key: str | None, format: str, everything: bool) -> str:
    """The settings of a stage, or those under ``key``, as text."""
    from asrkit.reporting import settings as report

    if stage in SETTINGS:
        settings = [report.Setting(**one) for one in json.loads(DESCRIBED.read_text(encoding="utf-8"))[stage]]
    else:
        settings = report.describe(settings_class(stage))
    listed = report.select(settings, key, everything)
    if format == "json":
        return report.as_json(listed)
    if format == "markdown":
        return report.as_markdown(listed)
    if format == "yaml":
        return report.as_yaml(listed, f"Settings of asrkit {stage}, with their defaults")
    return report.as_table(listed)


def described() -> str:
    """Content of settings.json: every setting of every command of SETTINGS."""
    from dataclasses import asdict

    from asrkit.reporting.settings import describe

    content = {stage: [asdict(setting) for setting in describe(settings_class(stage))] for stage in SETTINGS}
    return json.dumps(content, indent=0, ensure_ascii=False) + "\n"
