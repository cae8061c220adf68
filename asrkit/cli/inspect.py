from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("doctor")(doctor)
    app.command("info")(info)


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print the findings as JSON, for scripts."),
) -> None:
    """Say what this machine has, what each stage can use, and which command gets what is missing.

    Exits with 0 if asrkit can train here and with 1 if something it requires is missing or broken.

    Example: `asrkit doctor`, or `asrkit doctor --json > doctor.json` to attach to a bug report.
    """
    from asrkit.stages.doctor import can_train, describe, examine

    checks = examine()
    if as_json:
        report = {"can_train": can_train(checks), "checks": [asdict(check) for check in checks]}
        typer.echo(json.dumps(report, indent=2))
    else:
        typer.echo("\n".join(describe(checks)))
    raise typer.Exit(0 if can_train(checks) else 1)


def info(
    run: Annotated[Path, typer.Argument(help="Run directory of any stage.")],
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON, for scripts."),
) -> None:
    """Say what a run directory holds: its stages, parameters, vocabulary, features and measured error rates.

    Example: `asrkit info exp/backbone`
    """
    from rich.console import Console

    from asrkit.reporting.tables import run_tables
    from asrkit.stages.info import describe_run

    description = describe_run(run)
    if as_json:
        typer.echo(json.dumps(description, indent=2, ensure_ascii=False))
        return
    console = Console()
    for table in run_tables(description):
        console.print(table, width=None if console.is_terminal else 160)
    features = ", ".join(f"{key} {value}" for key, value in (description["features"] or {}).items())
    typer.echo(f"vocabulary: {description['vocabulary']} tokens; features: {features}")
    typer.echo(f"configurations: {', '.join(description['configurations']) or 'none'}")
