from __future__ import annotations

import json
from dataclasses import asdict

import typer


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("doctor")(doctor)


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
