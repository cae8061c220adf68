"""Options that several commands share, the panels of the help, and how a training command ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

# The panels of --help, everyday options first: a panel stands where its first option does.
io = partial(typer.Option, rich_help_panel="Input and output")
training = partial(typer.Option, rich_help_panel="Training")
settings = partial(typer.Option, rich_help_panel="Settings")
output = partial(typer.Option, rich_help_panel="What is printed")

Parent = Annotated[Path, io("--from", help="Run directory of the model to start from.")]
Manifest = Annotated[Path, io(help="Cuts to train on: .jsonl, .jsonl.gz or a Shar directory.")]
Dev = Annotated[Path | None, io(help="Cuts to measure WER on while training; the best weights are chosen by it.")]
Out = Annotated[Path, io(help="Run directory. Running the same command again resumes it.")]
Seed = Annotated[int | None, training(help="Seed of everything random: sets `seed`.")]
MaxDuration = Annotated[float | None, training(help="Seconds of audio per step and process: sets `data.max_duration`.")]
Device = Annotated[str, training(help="auto, cpu, cuda or cuda:N.")]
Config = Annotated[Path | None, settings(help="YAML file of settings; `asrkit config` prints one to start from.")]
Overrides = Annotated[
    list[str] | None,
    settings(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting, as in training.steps=2000. Repeatable. `asrkit config` lists every key.",
        show_default=False,
    ),
]


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, by the setting they set."""
    return {key: value for key, value in options.items() if value is not None}


def train_or_stop(out: Path, stage: Callable[[], object]) -> None:
    """Run a training stage; one that was asked to stop has saved its state and ends with the signal's exit code."""
    from asrkit.training.stopping import Interrupted

    try:
        stage()
    except Interrupted as stop:
        typer.echo(f"stopped; the state is saved: run the same command again to resume {out}", err=True)
        raise typer.Exit(stop.code) from None
