"""evaluate and transcribe."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from asrkit.cli.options import Device

# The names of asrkit.decoding.search.METHODS, which would import torch here.
Method = StrEnum("Method", ["greedy", "beam", "ctc"])
MethodOrAll = StrEnum("MethodOrAll", ["greedy", "beam", "ctc", "all"])

Mode = StrEnum("Mode", ["full"])

Run = Annotated[Path, typer.Option("--from", help="Run directory of any stage.", show_default=False)]
Beam = Annotated[int, typer.Option(min=1, help="Hypotheses kept by --method beam.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; left out, its own choice.")]
Variant = Annotated[
    str | None,
    typer.Option(help="Which sub-models are active; left out, those of the last stage. `asrkit info` lists them."),
]
ModeOption = Annotated[Mode | None, typer.Option(help="full: the whole recording at once.")]
Chunk = Annotated[
    int | None,
    typer.Option(min=1, help="Stream: encoder frames of 40 ms at once; left out, the first context trained."),
]
Left = Annotated[
    int | None,
    typer.Option(min=0, help="Frames before the chunk that attention sees; left out, as trained with that chunk."),
]


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
    variant: Variant = None,
    mode: ModeOption = None,
    chunk: Chunk = None,
    left: Left = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the results go; left out, evaluation/ in the run directory.")
    ] = None,
    max_duration: Annotated[float, typer.Option(min=1, help="Seconds of audio decoded at once.")] = 200.0,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, one line a method.")] = False,
) -> None:
    """Decode a manifest and count its word and character errors.

    Examples:

        asrkit evaluate --from exp/backbone --manifest data/prompts/test.jsonl.gz --method all

        asrkit evaluate --from exp/near --variant near --chunk 16 --left 64 --manifest test.jsonl.gz

        asrkit evaluate --from exp/near --variant attention --mode full --manifest test.jsonl.gz

    A streaming context is decoded chunk by chunk, as on a device, and the table says how late a word is known: by the
    chunk (algorithmic latency), and from the word's end on where the manifest has word alignments.

    Writes evaluation/MANIFEST-VARIANT-CONTEXT-METHOD/ in the run directory (test-near-chunk16-left64-greedy):
    result.json, alignments.txt, confusions.txt and utterances.jsonl.
    """
    from asrkit.decoding.choice import ContextChoice
    from asrkit.decoding.search import METHODS
    from asrkit.reporting.tables import evaluation_table, table_console
    from asrkit.stages.evaluate import evaluate as run_evaluation

    names: list[Any] = [name.value for name in method or [MethodOrAll.greedy]]
    evaluations = run_evaluation(
        run,
        manifest,
        methods=METHODS if "all" in names else names,
        beam=beam,
        variant=variant,
        context=ContextChoice(full=mode is Mode.full, chunk=chunk, left=left),
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
    audio: Annotated[
        list[Path],
        typer.Argument(help="Audio files of any format, rate, channels and length; with --stream also - (raw PCM)."),
    ],
    method: Annotated[Method, typer.Option(help="How to search.")] = Method.greedy,
    beam: Beam = 4,
    variant: Variant = None,
    mode: ModeOption = None,
    chunk: Chunk = None,
    left: Left = None,
    language: Annotated[
        str | None, typer.Option(help="What is spoken, for a model with languages; `asrkit info` lists them.")
    ] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="One line a word: its start in seconds.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Show what is heard while the sound comes in.")] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Stream files as fast as possible, not as fast as they were spoken.")
    ] = False,
    pause: Annotated[
        float | None, typer.Option(min=0.1, help="Stream: an utterance ends after seconds without a word. [default: 1]")
    ] = None,
    longest: Annotated[
        float | None, typer.Option(min=1, help="Stream: an utterance ends after so many seconds. [default: 20]")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: each file, or each change of a stream; words timed.")
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Write down what is said in audio files, or while it is said.

    Examples:

        asrkit transcribe --from exp/backbone a.wav b.flac

        asrkit transcribe --from exp/near --stream --chunk 16 talk.wav

        arecord -q -t raw -f S16_LE -r 16000 -c 1 | asrkit transcribe --from exp/near --stream -

    Long files are parted at pauses and read piece by piece. A file that cannot be read is reported, the
    others are done, and the exit code is 1.

    With --stream the text so far is shown whenever it changes: on a terminal in one line, else in a line each, marked
    partial or final. Standard input is 16-bit little-endian mono at 16 kHz without a header. Ctrl-C ends the sound;
    what was heard of it is still written, and the exit code is 130.
    """
    from asrkit.decoding.choice import ContextChoice
    from asrkit.stages.transcribe import transcribe as run_transcription

    context = ContextChoice(full=mode is Mode.full, chunk=chunk, left=left)
    shared: dict[str, Any] = {
        "method": method.value,
        "beam": beam,
        "variant": variant,
        "context": context,
        "language": language,
        "device": device,
        "threads": threads,
        "warn": lambda line: typer.echo(f"warning: {line}", err=True),
    }
    _check_stream_options(stream, audio, timestamps, fast, pause, longest)
    if stream:
        _stream(run, audio, not fast, pause, longest, as_json, shared)
        return
    failed = False
    for done in run_transcription(run, audio, **shared):
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


def _check_stream_options(
    stream: bool, audio: list[Path], timestamps: bool, fast: bool, pause: float | None, longest: float | None
) -> None:
    """Refuse options that would be without effect."""
    from asrkit.errors import UserError

    findings = []
    if stream and timestamps:
        findings.append("--stream and --timestamps exclude each other; --stream --json has the times of the words")
    if stream and sum(path == Path("-") for path in audio) > 1:
        findings.append("-: standard input can be heard once only")
    if not stream:
        given = {"--fast": fast, "--pause": pause is not None, "--longest": longest is not None}
        findings += [f"{name} needs --stream" for name, wanted in given.items() if wanted]
        if Path("-") in audio:
            findings.append("-: standard input needs --stream")
    if findings:
        raise UserError.of(findings)


def _stream(
    run: Path,
    audio: list[Path],
    paced: bool,
    pause: float | None,
    longest: float | None,
    as_json: bool,
    shared: dict[str, Any],
) -> None:
    """Print what is heard as it comes; exit code 1 where a file cannot be read, 130 after Ctrl-C."""
    from asrkit.decoding.live import until_interrupted
    from asrkit.decoding.streaming import Endpoint
    from asrkit.errors import UserError
    from asrkit.reporting.live import show_final, show_partial
    from asrkit.stages.transcribe import transcribe_stream

    endpoint = Endpoint(**{key: value for key, value in (("pause", pause), ("longest", longest)) if value is not None})
    failed, current = False, None
    with until_interrupted() as stopped:
        for path, heard in transcribe_stream(run, audio, endpoint=endpoint, paced=paced, stopped=stopped, **shared):
            if isinstance(heard, UserError):
                failed = True
                typer.echo(f"error: {heard}", err=True)
                if as_json:
                    typer.echo(json.dumps({"path": str(path), "error": str(heard)}, ensure_ascii=False))
            elif as_json:
                typer.echo(json.dumps({"path": str(path), **asdict(heard)}, ensure_ascii=False))
            else:
                if path != current and len(audio) > 1:
                    typer.echo(f"{path}:")
                current = path
                (show_final if heard.final else show_partial)(sys.stdout, heard.time, heard.text)
        if stopped():
            raise typer.Exit(130)
    if failed:
        raise typer.Exit(1)


def _json_row(row: dict[str, Any]) -> dict[str, Any]:
    if row["error"] is not None:
        return {"path": str(row["path"]), "error": row["error"]}
    return {"path": str(row["path"]), "seconds": row["seconds"], "text": row["text"], "words": row["words"]}
