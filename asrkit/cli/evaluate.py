"""evaluate and transcribe."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from asrkit.cli.options import io, output

# The names of asrkit.decoding.search.METHODS, which would import torch here.
Method = StrEnum("Method", ["greedy", "beam", "ctc"])
MethodOrAll = StrEnum("MethodOrAll", ["greedy", "beam", "ctc", "all"])

Mode = StrEnum("Mode", ["full"])

decoding = partial(typer.Option, rich_help_panel="Decoding")
streams = partial(typer.Option, rich_help_panel="Streaming")

Run = Annotated[Path, io("--from", help="Run directory of any stage, or an exported directory.", show_default=False)]
Beam = Annotated[int, decoding(min=1, help="Hypotheses that --method beam keeps.")]
Threads = Annotated[int | None, decoding(min=1, help="CPU threads. [default: torch's own choice]")]
Variant = Annotated[
    str | None,
    decoding(help="Variant to run; `asrkit info` lists them. [default: the one trained last]"),
]
ModeOption = Annotated[Mode | None, decoding(help="full: look at the whole recording at once.")]
Chunk = Annotated[
    int | None,
    decoding(min=1, help="Stream in chunks of this many frames of 40 ms. [default: the first context trained]"),
]
Left = Annotated[
    int | None,
    decoding(min=0, help="Frames before the chunk that attention sees. [default: as trained with that chunk]"),
]
Device = Annotated[str, decoding(help="auto, cpu, cuda or cuda:N.")]


def register(app: typer.Typer) -> None:
    """Add the commands that decode."""
    app.command("evaluate")(evaluate)
    app.command("transcribe")(transcribe)


def evaluate(
    run: Annotated[
        Path,
        io(
            "--from",
            help="Run directory of any stage, an exported directory, or a recognizer from outside: whisper:NAME_OR_PATH or sherpa-onnx:DIR.",
            show_default=False,
        ),
    ],
    manifest: Annotated[Path, io(help="Cuts to decode: .jsonl, .jsonl.gz or a Shar directory.")],
    out: Annotated[
        Path | None,
        io(
            help="Directory for the results. [default: evaluation/ in the run directory, or here for a recognizer from outside]"
        ),
    ] = None,
    method: Annotated[list[MethodOrAll] | None, decoding(help="Search method. Repeatable. [default: greedy]")] = None,
    beam: Beam = 4,
    variant: Variant = None,
    mode: ModeOption = None,
    chunk: Chunk = None,
    left: Left = None,
    max_duration: Annotated[float, decoding(min=1, help="Seconds of audio to decode at once.")] = 200.0,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, output("--json", help="Print the results as JSON, one line per method.")] = False,
) -> None:
    """Decode a manifest and count its word and character errors.

    Examples:

        asrkit evaluate --from exp/backbone --manifest data/prompts/test.jsonl.gz --method all

        asrkit evaluate --from exp/near --variant near --chunk 16 --left 64 --manifest test.jsonl.gz

        asrkit evaluate --from exp/near --variant attention --mode full --manifest test.jsonl.gz

        asrkit evaluate --from whisper:tiny.en --manifest data/prompts/test.jsonl.gz

    A streaming context is decoded chunk by chunk, as on a device. The table shows the latency: that of the chunk (algorithmic
    latency), and the time from the end of a word to its output where the manifest has word alignments.

    Writes evaluation/MANIFEST-DIGEST-VARIANT-CONTEXT-METHOD/ in the run directory, such as
    test-3f2a9c01-near-chunk16-left64-greedy:
    result.json, alignments.txt, confusions.txt and utterances.jsonl.
    """
    from asrkit.decoding.choice import ContextChoice
    from asrkit.decoding.external.interface import is_external
    from asrkit.decoding.search import METHODS
    from asrkit.reporting.tables import evaluation_table, table_console
    from asrkit.stages.evaluate import evaluate as run_evaluation
    from asrkit.stages.evaluate_external import evaluate_external

    names: list[Any] = [name.value for name in method or [MethodOrAll.greedy]]
    shared: dict[str, Any] = {
        "methods": METHODS if "all" in names else names,
        "beam": beam,
        "max_duration": max_duration,
        "device": device,
        "threads": threads,
        "out": out,
    }
    if is_external(str(run)):
        _refuse(run, {"--variant": variant, "--mode": mode, "--chunk": chunk, "--left": left})
        evaluations = evaluate_external(str(run), manifest, **shared)
    else:
        context = ContextChoice(full=mode is Mode.full, chunk=chunk, left=left)
        evaluations = run_evaluation(run, manifest, variant=variant, context=context, **shared)
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


def _refuse(run: Path, given: dict[str, Any]) -> None:
    """Refuse options that mean nothing to a recognizer from outside."""
    from asrkit.errors import UserError

    if unused := [option for option, value in given.items() if value is not None]:
        raise UserError(f"{run}: is not asrkit's, so it has no variants and contexts; drop {', '.join(unused)}")


def transcribe(
    run: Run,
    audio: Annotated[
        list[Path],
        typer.Argument(help="Audio files of any format, rate, channels and length; with --stream also - (raw PCM)."),
    ],
    method: Annotated[Method, decoding(help="Search method.")] = Method.greedy,
    beam: Beam = 4,
    variant: Variant = None,
    mode: ModeOption = None,
    chunk: Chunk = None,
    left: Left = None,
    language: Annotated[
        str | None, decoding(help="Language spoken, for a model with a language input; `asrkit info` lists them.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    stream: Annotated[bool, streams("--stream", help="Show the text while the audio comes in.")] = False,
    fast: Annotated[
        bool, streams("--fast", help="With --stream: read files as fast as possible instead of in real time.")
    ] = False,
    pause: Annotated[
        float | None,
        streams(min=0.1, help="With --stream: seconds without a word that end an utterance. [default: 1]"),
    ] = None,
    longest: Annotated[
        float | None, streams(min=1, help="With --stream: longest utterance in seconds. [default: 20]")
    ] = None,
    timestamps: Annotated[
        bool, output("--timestamps", help="Print one line per word with its start in seconds.")
    ] = False,
    as_json: Annotated[
        bool,
        output("--json", help="Print one JSON object per file, or per change of a stream, with the times of words."),
    ] = False,
) -> None:
    """Transcribe audio files, or a live stream.

    Examples:

        asrkit transcribe --from exp/backbone a.wav b.flac

        asrkit transcribe --from exp/near --stream --chunk 16 talk.wav

        arecord -q -t raw -f S16_LE -r 16000 -c 1 | asrkit transcribe --from exp/near --stream -

    Long files are split at pauses. A file that cannot be read is reported, the others are transcribed, and the exit code is 1.

    With --stream the text so far is printed whenever it changes: on one line of a terminal, otherwise on a line each, marked
    partial or final. Standard input must be 16-bit little-endian mono PCM at 16 kHz without a header. Ctrl-C ends the
    stream; the text so far is printed, and the exit code is 130.
    """
    from asrkit.decoding.choice import ContextChoice

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
    _transcribe(run, audio, timestamps, as_json, shared)


def _transcribe(run: Path, audio: list[Path], timestamps: bool, as_json: bool, shared: dict[str, Any]) -> None:
    """Print the text of each file; exit code 1 where one cannot be read."""
    from asrkit.stages.transcribe import transcribe as run_transcription

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
        findings.append("--stream and --timestamps do not go together; --stream --json prints the times of words")
    if stream and sum(path == Path("-") for path in audio) > 1:
        findings.append("-: standard input can be read only once")
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
    """Print the text as it comes; exit code 1 where a file cannot be read, 130 after Ctrl-C."""
    from asrkit.decoding.live import until_interrupted
    from asrkit.decoding.streaming import Endpoint
    from asrkit.errors import UserError
    from asrkit.reporting.live import show_final, show_partial
    from asrkit.stages.transcribe import transcribe_stream

    endpoint = Endpoint(**{key: value for key, value in (("pause", pause), ("longest", longest)) if value is not None})
    failed, current = False, None
    with until_interrupted() as stopped:
        for path, update in transcribe_stream(run, audio, endpoint=endpoint, paced=paced, stopped=stopped, **shared):
            if isinstance(update, UserError):
                failed = True
                typer.echo(f"error: {update}", err=True)
                if as_json:
                    typer.echo(json.dumps({"path": str(path), "error": str(update)}, ensure_ascii=False))
            elif as_json:
                typer.echo(json.dumps({"path": str(path), **asdict(update)}, ensure_ascii=False))
            else:
                if path != current and len(audio) > 1:
                    typer.echo(f"{path}:")
                current = path
                (show_final if update.final else show_partial)(sys.stdout, update.time, update.text)
        if stopped():
            raise typer.Exit(130)
    if failed:
        raise typer.Exit(1)


def _json_row(row: dict[str, Any]) -> dict[str, Any]:
    if row["error"] is not None:
        return {"path": str(row["path"]), "error": row["error"]}
    return {"path": str(row["path"]), "seconds": row["seconds"], "text": row["text"], "words": row["words"]}
