"""doctor, info and summary."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from asrkit.cli.options import io, output


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("doctor")(doctor)
    app.command("info")(info)
    app.command("summary")(summary)


def doctor(
    as_json: Annotated[bool, output("--json", help="Print the findings as JSON, for scripts and bug reports.")] = False,
) -> None:
    """Check what is installed on this machine, what each stage can use, and how to install what is missing.

    Examples:

        asrkit doctor

        asrkit doctor --json > doctor.json

    Exits with 0 if asrkit can train here, and with 1 if something it requires is missing or broken.
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
    run: Annotated[Path, typer.Argument(help="Run directory of any stage, or an exported directory.")],
    as_json: Annotated[bool, output("--json", help="Print everything as JSON, for scripts.")] = False,
) -> None:
    """Show what a run directory holds: its stages, variants, sub-models, parameters and measured error rates.

    Examples:

        asrkit info exp/near

        asrkit info exp/near --json | jq .variants

    A variant is one way to run the model. The table has the parameters of each, the contexts it was trained in with their
    algorithmic latency, and the best WER measured on each manifest.
    """
    from asrkit.reporting.tables import run_tables, table_console
    from asrkit.stages.info import describe_run

    description = describe_run(run)
    if as_json:
        typer.echo(json.dumps(description, indent=2, ensure_ascii=False))
        return
    for table in run_tables(description):
        table_console().print(table)
    features = ", ".join(f"{key} {value}" for key, value in (description["features"] or {}).items())
    vocabulary = f"vocabulary: {description['vocabulary']} tokens" if description["vocabulary"] else ""
    typer.echo("; ".join(filter(None, (vocabulary, f"features: {features}" if features else ""))))
    if description["languages"]:
        typer.echo(f"languages the model takes as an input: {', '.join(description['languages'])}")
    for entry in description["stages"]:
        typer.echo(f"command: {entry.get('command', 'unknown')}")


def summary(
    runs: Annotated[list[Path], typer.Argument(help="Evaluated run directories, in the order of the rows.")],
    out: Annotated[Path | None, io(help="Also write the rows to this JSON file.")] = None,
) -> None:
    """Compare evaluated runs in one table: a row for each variant, context and method.

    Example:

        asrkit summary exp/backbone exp/attention --out exp/summary.json
    """
    from asrkit.reporting.tables import summary_table, table_console
    from asrkit.stages.summary import summarize_runs

    table_console().print(summary_table(summarize_runs(runs, out)))
