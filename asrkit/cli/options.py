"""Options that several commands have, and how a training command ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

Manifest = Annotated[Path, typer.Option(help="Cuts to train on: .jsonl, .jsonl.gz or a Shar directory.")]
Out = Annotated[Path, typer.Option(help="Run directory; repeated with the same settings, the run goes on.")]
Dev = Annotated[Path | None, typer.Option(help="Cuts whose WER chooses the best weights.")]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a setting: key.subkey=value. Repeatable.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(help="Short for --set seed=N.")]
MaxDuration = Annotated[
    float | None, typer.Option(help="Seconds of audio a step and process; short for --set data.max_duration=N.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def changes_of(overrides: list[str] | None, given: Mapping[str, object]) -> list[str]:
    """Every --set, and the options that are short for one."""
    return [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value is not None)]


def train_or_stop(out: Path, training: Callable[[], object]) -> None:
    """Run a training stage; one that was asked to stop has saved its state and ends with the signal's exit code."""
    from asrkit.training.loop import Interrupted

    try:
        training()
    except Interrupted as stop:
        typer.echo(f"stopped; the state is saved, the same command goes on from it ({out})", err=True)
        raise typer.Exit(stop.code) from None
