"""doctor, info, summary, compare and report."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from asrkit.cli.options import file_named, io, output

# The names of asrkit.reporting.compare.UNITS, which would import numpy here.
GroupName = StrEnum("GroupName", ["speaker", "utterance", "language"])

tests = partial(typer.Option, rich_help_panel="Tests")


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("doctor")(doctor)
    app.command("info")(info)
    app.command("summary")(summary)
    app.command("compare")(compare)
    app.command("report")(report)


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
    run: Annotated[Path, typer.Argument(help="Run directory of any stage.")],
    watch: Annotated[
        bool, output("--watch", help="Follow a training on one screen, or a line for each step that is logged.")
    ] = False,
    as_json: Annotated[bool, output("--json", help="Print everything as JSON, for scripts.")] = False,
) -> None:
    """Show what a run directory holds: its stages, variants, sub-models, parameters and measured error rates.

    Examples:

        asrkit info exp/near

        asrkit info exp/near --json | jq .variants

        asrkit info exp/near --watch

    A variant is one way to run the model. The table has the parameters of each, the contexts it was trained in with their
    algorithmic latency, and the best WER measured on each manifest.

    With --watch it shows where a training stands: steps, loss, dev WER, learning rate, speed, memory, and the time left. It ends when the
    training is finished, or by Ctrl-C, which does not stop the training.
    """
    if watch:
        from rich.console import Console

        from asrkit.errors import UserError
        from asrkit.reporting.watch import watch as follow

        if as_json:
            raise UserError("--watch and --json do not go together; metrics.jsonl in the run directory is for scripts")
        follow(run, Console())
        return
    from asrkit.errors import printable
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
        typer.echo(printable(f"command: {entry.get('command', 'unknown')}"))


def summary(
    runs: Annotated[list[Path], typer.Argument(help="Evaluated run directories, in the order of the rows.")],
    baseline: Annotated[
        Path | None, io(help="Run directory that each row is compared with; significant differences are marked.")
    ] = None,
    out: Annotated[Path | None, io(callback=file_named(".json"), help="Also write the rows to this JSON file.")] = None,
) -> None:
    """Show evaluated runs in one table: a row for each variant, context and method.

    Examples:

        asrkit summary exp/backbone exp/attention --out exp/summary.json

        asrkit summary exp/backbone exp/attention --baseline exp/backbone
    """
    from asrkit.reporting.tables import summary_table, table_console
    from asrkit.stages.summary import summarize_runs

    table_console().print(summary_table(summarize_runs(runs, out, baseline)))


def compare(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="SYSTEM...",
            help="Run directories, exported models or directories of evaluations; the first is the baseline.",
        ),
    ],
    evaluation: Annotated[
        list[str] | None,
        io(
            help="Which evaluation of each run: a part of its directory's name, such as test, beam4 or a digest. Repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        io("--json", metavar="FILE", callback=file_named(".json"), help="Also write everything to this JSON file."),
    ] = None,
    baseline: Annotated[str | None, tests(help="What the others are compared with. [default: the first]")] = None,
    by: Annotated[
        GroupName | None,
        tests(
            help="What is resampled for the interval. [default: speaker where all are known and there are at least two, else utterance]"
        ),
    ] = None,
    seeds: Annotated[
        bool, tests("--seeds", help="Each system is trained with several seeds: write name=RUN,RUN.")
    ] = False,
    margin: Annotated[
        float | None, tests(metavar="POINTS", help="Test whether systems are the same within this many points of WER.")
    ] = None,
) -> None:
    """Tell whether systems differ by more than chance, on the same utterances, and where the difference comes from.

    Examples:

        asrkit compare exp/backbone exp/attention

        asrkit compare exp/backbone exp/int8 exp/int4 --evaluation test --evaluation beam4 --margin 1 --json compare.json

        asrkit compare --seeds float=exp/float-1,exp/float-2 int4=exp/int4-1,exp/int4-2

    A change is significant if its 95 % interval (paired bootstrap) leaves out 0 and its p-value (MAPSSWE, corrected for the number of
    systems) is below 0.05. Systems that were not evaluated on the same references are refused.
    """
    from asrkit.errors import printable
    from asrkit.reporting.compare_tables import comparison_table, explain, part_tables
    from asrkit.reporting.tables import table_console
    from asrkit.stages.compare import compare_runs

    comparisons = compare_runs(
        systems,
        baseline=baseline,
        by=None if by is None else by.value,  # type: ignore[arg-type]
        seeds=seeds,
        margin=margin,
        evaluation=evaluation or (),
        out=out,
    )
    console = table_console()
    console.print(comparison_table(comparisons))
    for comparison in comparisons:
        typer.echo(printable("\n".join([*explain(comparison), ""])))
        for table in part_tables(comparison):
            console.print(table)


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN...]",
            help="Run directories, exported models and directories of evaluations, in the order to show.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, io(callback=file_named(".html", ".htm"), help="HTML file to write.")] = Path("report.html"),
    data: Annotated[
        list[Path] | None, io(metavar="MANIFEST", help="Manifest to describe, with or without runs. Repeatable.")
    ] = None,
    evaluation: Annotated[
        list[str] | None,
        io(help="Show only evaluations whose directory's name has this part, such as test or beam4. Repeatable."),
    ] = None,
    sounds: Annotated[
        int, io(min=0, help="Embed the sound of this many of the worst utterances, and of as many at random.")
    ] = 20,
    open_it: Annotated[bool, output("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Write a report of models, their training, their errors and their data: one HTML file, to look at and to listen to.

    Examples:

        asrkit report exp/backbone exp/attention exp/onnx --out exp/report.html

        asrkit report --data data/train.jsonl.gz --open

    The file needs no server and fetches nothing. Nothing is decoded: run `asrkit evaluate` first. Recordings that are not embedded are
    played from where the manifest says they are.
    """
    from asrkit.stages.report import report as run

    written = run(
        runs or [], out, data=data or [], evaluation=evaluation or (), sounds=sounds, defaults=_settings_defaults
    )
    typer.echo(f"{written}: {written.stat().st_size / 1e6:.1f} MB")
    if open_it:
        typer.launch(str(written))


def _settings_defaults(stage: str) -> dict[str, object] | None:
    """The defaults of a command's settings; None of one that has none, or is not installed."""
    from asrkit.cli.settings import settings_class
    from asrkit.config import to_dict
    from asrkit.errors import UserError

    try:
        return to_dict(settings_class(stage)())
    except UserError:
        return None
