"""distill: teachers and a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asrkit.cli.options import (
    Config,
    Dev,
    Device,
    Manifest,
    MaxDuration,
    Out,
    Overrides,
    Seed,
    changes_of,
    train_or_stop,
)


def register(app: typer.Typer) -> None:
    """Add the command ``distill``."""
    app.command("distill")(distill)


def distill(
    manifest: Manifest,
    out: Out,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="LANGUAGE=RUN, '*=RUN' for all others, or RUN for all. Repeatable.", show_default=False),
    ] = None,
    parent: Annotated[
        Path | None, typer.Option("--from", help="Run directory of the student; left out, a new one is made.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Of a new student: tiny, small, medium or large. [default: small]")
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(
            help="Of what is taught: constant, linear, exponential, piecewise, teacher-loss or student-teacher. "
            "[default: student-teacher]"
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="sentencepiece model of a new student. [default: the teachers']")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="teacher: cuts without text get what their teacher hears. [default: given]")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Directory to keep the teachers' posteriors in, so that they run once.")
    ] = None,
    configuration: Annotated[
        str | None, typer.Option(help="The one to train, with --from; left out, the student's default.")
    ] = None,
    dev: Dev = None,
    config: Config = None,
    overrides: Overrides = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
) -> None:
    """Train a student under one teacher or several: other languages, a smaller size, or both.

    Examples:

        asrkit distill --teacher exp/backbone --size tiny --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --out exp/student

        asrkit distill --teacher en=exp/en --teacher fr=exp/fr --teacher '*=exp/all' \\
            --manifest data/all.jsonl.gz --out exp/student

        asrkit distill --from exp/student --teacher exp/large --manifest data/prompts/train.jsonl.gz \\
            --out exp/better

    A language given twice is taught the mean of both. The teachers' run directories stay as they are.
    """
    from asrkit.config import resolve
    from asrkit.stages.distill import DistillConfig, defaults
    from asrkit.stages.distill import distill as run

    given = {
        "model.size": size,
        "teacher.weight.kind": weight,
        "labels": labels,
        "configuration": configuration,
        "seed": seed,
        "data.max_duration": max_duration,
    }
    settings = resolve(
        DistillConfig, config, changes_of(overrides, given), defaults(parent is not None, store is not None)
    )
    train_or_stop(
        out,
        lambda: run(
            _teachers(teacher or []),
            manifest,
            out,
            settings,
            parent=parent,
            tokenizer=tokenizer,
            store=store,
            dev=dev,
            device=device,
        ),
    )


def _teachers(given: list[str]) -> dict[str, list[Path]]:
    """``en=exp/en`` by language; a bare directory is for all languages."""
    from asrkit.errors import UserError

    if not given:
        raise UserError("--teacher: give at least one, as RUN or LANGUAGE=RUN")
    teachers: dict[str, list[Path]] = {}
    for text in given:
        language, equals, path = text.partition("=")
        if not equals or "/" in language:  # a directory's name may hold an =
            language, path = "*", text
        if not language or not path:
            raise UserError(f"--teacher {text}: write LANGUAGE=RUN, '*=RUN' or RUN")
        teachers.setdefault(language, []).append(Path(path))
    return teachers
