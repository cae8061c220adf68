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

from asrkit.cli.domain import (
    Bonus,
    Graph,
    GraphScale,
    Lm,
    LmScale,
    MaxActive,
    OutputBeam,
    Paths,
    SearchBeam,
    domain_of,
)
from asrkit.cli.options import io, output

# The methods of asrkit.decoding.search, which would import torch here.
METHODS = ["greedy", "beam", "ctc", "ctc-beam"]
Method = StrEnum("Method", [(name, name) for name in METHODS])
MethodOrAll = StrEnum("MethodOrAll", [(name, name) for name in [*METHODS, "all"]])
# Those of asrkit.decoding.transcripts.FORMATS; a file of subtitles is about one recording.
TextFormat = StrEnum("TextFormat", ["txt", "json", "ctm", "stm"])
AnyFormat = StrEnum("AnyFormat", ["txt", "json", "srt", "vtt", "ctm", "stm"])

Mode = StrEnum("Mode", ["full"])

decoding = partial(typer.Option, rich_help_panel="Decoding")
streams = partial(typer.Option, rich_help_panel="Streaming")
confidence = partial(typer.Option, rich_help_panel="Alternatives and confidence")

Run = Annotated[Path, io("--from", help="Run directory of any stage, or an exported directory.", show_default=False)]
Beam = Annotated[int, decoding(min=1, help="Hypotheses that --method beam and ctc-beam keep.")]
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
Temperature = Annotated[
    float,
    confidence(
        "--confidence-temperature",
        help="Divides the scores of the n-best texts before the confidences of words are computed.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands that decode."""
    app.command("evaluate")(evaluate)
    app.command("transcribe")(transcribe)


def evaluate(
    run: Run,
    manifest: Annotated[Path, io(help="Cuts to decode: .jsonl, .jsonl.gz or a Shar directory.")],
    out: Annotated[
        Path | None, io(help="Directory for the results. [default: evaluation/ in the run directory]")
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
    graph: Graph = None,
    graph_scale: GraphScale = None,
    search_beam: SearchBeam = None,
    output_beam: OutputBeam = None,
    max_active: MaxActive = None,
    paths: Paths = None,
    lm: Lm = None,
    lm_scale: LmScale = 0.3,
    bonus: Bonus = 0.0,
    calibrate: Annotated[
        Path | None, confidence(help="Cuts, such as dev, that the temperature of confidences is fitted to first.")
    ] = None,
    temperature: Temperature = 1.0,
    formats: Annotated[
        list[TextFormat] | None,
        output("--format", help="Also write the hypotheses so: txt, json, ctm or stm. Repeatable."),
    ] = None,
    as_json: Annotated[bool, output("--json", help="Print the results as JSON, one line per method.")] = False,
) -> None:
    """Decode a manifest and count its word and character errors.

    Examples:

        asrkit evaluate --from exp/backbone --manifest data/prompts/test.jsonl.gz --method all

        asrkit evaluate --from exp/near --variant near --chunk 16 --left 64 --manifest test.jsonl.gz

        asrkit evaluate --from exp/near --variant attention --mode full --manifest test.jsonl.gz

        asrkit evaluate --from exp/backbone --graph exp/hlg --graph-scale 0.5 --manifest test.jsonl.gz

        asrkit evaluate --from exp/backbone --method ctc-beam --lm exp/lm4 --calibrate dev.jsonl.gz --manifest test.jsonl.gz

    A streaming context is decoded chunk by chunk, as on a device. The table shows the latency: that of the chunk (algorithmic
    latency), and the time from the end of a word to its output where the manifest has word alignments.

    Writes evaluation/MANIFEST-DIGEST-VARIANT-CONTEXT-METHOD/ in the run directory, such as
    test-3f2a9c01-near-chunk16-left64-greedy:
    result.json, alignments.txt, confusions.txt and utterances.jsonl.
    """
    from asrkit.decoding.choice import ContextChoice
    from asrkit.decoding.search import METHODS
    from asrkit.reporting.tables import evaluation_table, table_console
    from asrkit.stages.evaluate import evaluate as run_evaluation

    names: list[Any] = [name.value for name in method or [MethodOrAll.greedy]]
    _check_graph(graph, bool(method))
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
        domain=domain_of(graph, graph_scale, search_beam, output_beam, max_active, paths, lm, lm_scale, bonus),
        calibrate_on=calibrate,
        temperature=temperature,
        formats=[form.value for form in formats or ()],  # type: ignore[misc]
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
    method: Annotated[Method | None, decoding(help="Search method. [default: greedy]")] = None,
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
    graph: Graph = None,
    graph_scale: GraphScale = None,
    search_beam: SearchBeam = None,
    output_beam: OutputBeam = None,
    max_active: MaxActive = None,
    paths: Paths = None,
    lm: Lm = None,
    lm_scale: LmScale = 0.3,
    bonus: Bonus = 0.0,
    nbest: Annotated[int, confidence(min=0, help="Also give so many texts of each stretch, with --format json.")] = 0,
    temperature: Temperature = 1.0,
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
    form: Annotated[AnyFormat, output("--format", help="What is printed or written of a file.")] = AnyFormat.txt,
    out: Annotated[
        Path | None, output(help="Folder for a file of each recording, such as talk.srt. [default: print them]")
    ] = None,
    timestamps: Annotated[
        bool, output("--timestamps", help="Print one line per word with its start in seconds.")
    ] = False,
    as_json: Annotated[
        bool,
        output("--json", help="Short for --format json. Of a stream: one JSON object per change."),
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
        "method": (method or Method.greedy).value,
        "beam": beam,
        "variant": variant,
        "context": context,
        "language": language,
        "device": device,
        "threads": threads,
        "warn": lambda line: typer.echo(f"warning: {line}", err=True),
    }
    form = AnyFormat.json if as_json else form
    domain = domain_of(graph, graph_scale, search_beam, output_beam, max_active, paths, lm, lm_scale, bonus)
    _check_stream_options(stream, audio, timestamps, fast, pause, longest)
    _check_graph(graph, method is not None)
    _check_output(stream, audio, form, out, timestamps, nbest, domain.graph or domain.lm)
    if stream:
        _stream(run, audio, not fast, pause, longest, as_json, shared)
        return
    _transcribe(
        run, audio, form.value, out, timestamps, shared | {"domain": domain, "nbest": nbest, "temperature": temperature}
    )


def _check_graph(graph: Path | None, method: bool) -> None:
    """Refuse a graph beside a method."""
    from asrkit.errors import UserError

    if graph is not None and method:
        raise UserError("--graph and --method: a graph is decoded by its own search; drop --method")


def _check_output(
    stream: bool, audio: list[Path], form: str, out: Path | None, timestamps: bool, nbest: int, beside: Path | None
) -> None:
    """Refuse outputs that contradict each other."""
    from asrkit.errors import UserError

    findings = []
    if stream and (form not in ("txt", "json") or out is not None or nbest or beside is not None):
        findings.append("--stream: prints text or --json; drop --format, --out, --nbest, --graph and --lm")
    if timestamps and (form != "txt" or out is not None):
        findings.append("--timestamps: is an output of its own; drop --format and --out")
    if nbest and form != "json":
        findings.append("--nbest: only json shows more than one text; give --format json")
    if form in ("srt", "vtt") and out is None and len(audio) > 1:
        findings.append(f"--format {form}: is about one recording; give a folder for the files with --out")
    if out is not None:
        names = [path.stem for path in audio]
        findings += [f"--out: two recordings are called {name}" for name in sorted(set(names)) if names.count(name) > 1]
    if findings:
        raise UserError.of(findings)


def _transcribe(
    run: Path, audio: list[Path], form: Any, out: Path | None, timestamps: bool, shared: dict[str, Any]
) -> None:
    """Print or write the text of each file; exit code 1 where one cannot be read."""
    from asrkit.decoding.transcripts import render, write_transcript
    from asrkit.stages.transcribe import transcribe as run_transcription

    failed = False
    for done in run_transcription(run, audio, **shared):
        if done.error is not None:
            failed = True
            typer.echo(f"error: {done.error}", err=True)
        if timestamps and done.error is None:
            typer.echo(f"{done.path}:")
            for word in done.words:
                typer.echo(f"{word.start:10.2f}  {word.text}")
        elif out is not None and done.error is None:
            typer.echo(f"{done.path}: {write_transcript(out, done, form)}")
        elif not timestamps and out is None and (done.error is None or form == "json"):
            typer.echo(render([done], form), nl=False)
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
