"""evaluate and transcribe."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

# The names of asrkit.decoding.search.METHODS, which would import torch here.
Method = StrEnum("Method", ["greedy", "beam", "ctc"])
MethodOrAll = StrEnum("MethodOrAll", ["greedy", "beam", "ctc", "all"])

Run = Annotated[Path, typer.Option("--from", help="Run directory of any stage.", show_default=False)]
Beam = Annotated[int, typer.Option(min=1, help="Hypotheses kept by --method beam.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; left out, its own choice.")]


def register(app: typer.Typer) -> None:
    """Add the commands that decode."""
    app.command("evaluate")(evaluate)
    app.command("transcribe")(transcribe)


def evaluate(
    run: Run,
    manifest: Annotated[Path, typer.Option(help="Cuts to decode: .jsonl, .jsonl.gz or a Shar directory.")],
    method: Annotated[
        list[MethodOrAll] | None, typer.Option(help="How to search. Repeatable. [default: greedy]")
    ] = None,
    beam: Beam = 4,
    out: Annotated[
        Path | None, typer.Option(help="Where the results go; left out, evaluation/ in the run directory.")
    ] = None,
    max_duration: Annotated[float, typer.Option(min=1, help="Seconds of audio decoded at once.")] = 200.0,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, one line a method.")] = False,
) -> None:
    """Decode a manifest and count its word and character errors.

    Example:

        asrkit evaluate --from exp/backbone --manifest data/prompts/test.jsonl.gz --method all

    Writes evaluation/MANIFEST-METHOD/ in the run directory: result.json, alignments.txt, confusions.txt and
    utterances.jsonl.
    """

    from asrkit.decoding.search import METHODS
    from asrkit.reporting.tables import evaluation_table, table_console
    from asrkit.stages.evaluate import evaluate as run_evaluation

    names: list[Any] = [name.value for name in method or [MethodOrAll.greedy]]
    evaluations = run_evaluation(
        run,
        manifest,
        methods=METHODS if "all" in names else names,
        beam=beam,
        max_duration=max_duration,
        device=device,
        threads=threads,
        out=out,
    )
    results = [evaluation.result for evaluation in evaluations]
    for warning in results[0]["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        for result in results:
            typer.echo(json.dumps(result, ensure_ascii=False))
        return
    table_console().print(evaluation_table(results))
    for evaluation in evaluations:
        typer.echo(f"alignments, confusions, JSON: {evaluation.directory}")


def transcribe(
    run: Run,
    audio: Annotated[list[Path], typer.Argument(help="Audio files of any format, rate, channels and length.")],
    method: Annotated[Method, typer.Option(help="How to search.")] = Method.greedy,
    beam: Beam = 4,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="One line a word: its start in seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line and file, words timed.")] = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Write down what is said in audio files.

    Example:

        asrkit transcribe --from exp/backbone a.wav b.flac

    Long files are parted at pauses and read piece by piece. A file that cannot be read is reported, the
    others are done, and the exit code is 1.
    """
    from asrkit.stages.transcribe import transcribe as run_transcription

    failed = False
    for done in run_transcription(
        run,
        audio,
        method=method.value,  # type: ignore[arg-type]
        beam=beam,
        device=device,
        threads=threads,
    ):
        if done.error is not None:
            failed = True
            typer.echo(f"error: {done.error}", err=True)
        if as_json:
            typer.echo(json.dumps(_json_row(asdict(done)), ensure_ascii=False))
        elif done.error is None and timestamps:
            typer.echo(f"{done.path}:")
            for word in done.words:
                typer.echo(f"{word.start:10.2f}  {word.text}")
        elif done.error is None:
            typer.echo(f"{done.path}: {done.text}")
    if failed:
        raise typer.Exit(1)


def _json_row(row: dict[str, Any]) -> dict[str, Any]:
    if row["error"] is not None:
        return {"path": str(row["path"]), "error": row["error"]}
    return {"path": str(row["path"]), "seconds": row["seconds"], "text": row["text"], "words": row["words"]}
