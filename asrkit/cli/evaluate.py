"""evaluate, tune and transcribe."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from asrkit.cli.domain import GraphChoice, domain_options
from asrkit.cli.fusion import FusionOptions, Tuned
from asrkit.cli.options import Cluster, Jobs, expanded, file_named, io, output
from asrkit.errors import UserError, visible

# The methods of asrkit.decoding.search, which would import torch here.
Method = StrEnum("Method", {"greedy": "greedy", "beam": "beam", "ctc": "ctc", "ctc_beam": "ctc-beam"})
MethodOrAll = StrEnum(
    "MethodOrAll", {"greedy": "greedy", "beam": "beam", "ctc": "ctc", "ctc_beam": "ctc-beam", "all": "all"}
)
# Those of asrkit.decoding.transcripts.FORMATS; a file of subtitles is about one recording.
TextFormat = StrEnum("TextFormat", ["txt", "json", "ctm", "stm"])
AnyFormat = StrEnum("AnyFormat", ["txt", "json", "srt", "vtt", "ctm", "stm"])

if TYPE_CHECKING:
    from asrkit.decoding.choice import ContextChoice

FusedMethod = StrEnum("FusedMethod", {"beam": "beam", "ctc_beam": "ctc-beam"})
Mode = StrEnum("Mode", ["full"])

decoding = partial(typer.Option, rich_help_panel="Decoding")
streams = partial(typer.Option, rich_help_panel="Streaming")
confidence = partial(typer.Option, rich_help_panel="Confidence of words")

Run = Annotated[Path, io("--from", help="Run directory of any stage, or an exported directory.", show_default=False)]
Beam = Annotated[int | None, decoding(min=1, help="Hypotheses that --method beam and ctc-beam keep. [default: 4]")]
Threads = Annotated[int | None, decoding(min=1, help="CPU threads. [default: torch's own choice]")]
Variant = Annotated[
    str | None,
    decoding(help="Variant to run; `asrkit info` lists them and names the default."),
]
ModeOption = Annotated[Mode | None, decoding(help="full: look at the whole recording at once.")]
Chunk = Annotated[
    int | None,
    decoding(
        min=1,
        help="Stream in chunks of this many frames of 40 ms. [default: the first context the variant was trained in, mostly full]",
    ),
]
Left = Annotated[
    int | None,
    decoding(min=0, help="Frames before the chunk that attention sees. [default: as trained with that chunk]"),
]
Device = Annotated[str, decoding(help="auto, cpu, cuda or cuda:N.")]
ConfidenceTemperature = Annotated[
    float | None,
    confidence(help="Divides the scores of the n-best texts before the confidences are computed. [default: 1]"),
]


@dataclass
class ModelChoice:
    """The options of how a model is run: in which variant, context and place."""

    variant: Variant = None
    mode: ModeOption = None
    chunk: Chunk = None
    left: Left = None
    device: Device = "auto"
    threads: Threads = None

    @property
    def context(self) -> ContextChoice:
        from asrkit.decoding.choice import ContextChoice

        return ContextChoice(full=self.mode is Mode.full, chunk=self.chunk, left=self.left)


def register(app: typer.Typer) -> None:
    """Add the commands that decode."""
    app.command("evaluate")(expanded(evaluate))
    app.command("tune")(expanded(tune))
    app.command("transcribe")(expanded(transcribe))


def evaluate(  # long: a parameter for each option
    run: Annotated[
        Path,
        io(
            "--from",
            help="Run directory of any stage, an exported directory, or an external recognizer: whisper:NAME_OR_PATH or sherpa-onnx:DIR.",
            show_default=False,
        ),
    ],
    manifest: Annotated[Path, io(help="Cuts to decode: .jsonl, .jsonl.gz or a Shar directory.")],
    out: Annotated[
        Path | None,
        io(
            help="Directory for the results. [default: evaluation/ in the run directory; for an external recognizer, here]"
        ),
    ] = None,
    method: Annotated[
        list[MethodOrAll] | None,
        decoding(help="Search method. Repeatable. [default: greedy; beam with a language model or hotwords]"),
    ] = None,
    beam: Beam = None,
    *,
    choice: ModelChoice,
    max_duration: Annotated[float, decoding(min=1, help="Seconds of audio to decode at once.")] = 200.0,
    jobs: Jobs = None,
    ray_address: Cluster = None,
    fusion: FusionOptions,
    tuned: Tuned = None,
    graph: GraphChoice,
    calibrate: Annotated[
        Path | None, confidence(help="Cuts, such as dev, to fit the confidence temperature on first.")
    ] = None,
    confidence_temperature: ConfidenceTemperature = None,
    formats: Annotated[
        list[TextFormat] | None,
        output("--format", help="Also write the hypotheses as txt, json, ctm or stm. Repeatable."),
    ] = None,
    as_json: Annotated[bool, output("--json", help="Print the results as JSON, one line per method.")] = False,
) -> None:
    """Decode a manifest and count its word and character errors.

    Examples:

        asrkit evaluate --from exp/backbone --manifest data/prompts/test.jsonl.gz --method all

        asrkit evaluate --from exp/near --variant near --chunk 16 --left 64 --manifest test.jsonl.gz

        asrkit evaluate --from exp/near --variant attention --mode full --manifest test.jsonl.gz

        asrkit evaluate --from exp/backbone --method beam --lm exp/lm4 --lm-scale 0.3 --manifest test.jsonl.gz

        asrkit evaluate --from exp/backbone --graph exp/hlg --graph-scale 0.5 --calibrate dev.jsonl.gz --manifest test.jsonl.gz

        asrkit evaluate --from whisper:tiny.en --manifest data/prompts/test.jsonl.gz

    A streaming context is decoded chunk by chunk, as on a device. The table shows the latency: that of the chunk (algorithmic
    latency), and the time from the end of a word to its output, if the manifest has word alignments.

    Writes evaluation/MANIFEST-DIGEST-VARIANT-CONTEXT-METHOD/ in the run directory, such as
    test-3f2a9c01-near-chunk16-left64-greedy:
    result.json, alignments.txt, confusions.txt and utterances.jsonl.
    """
    from asrkit.data.parallel import Workers
    from asrkit.decoding.external.interface import is_external
    from asrkit.decoding.search import METHODS
    from asrkit.reporting.tables import evaluation_table, table_console
    from asrkit.stages.evaluate import evaluate as run_evaluation
    from asrkit.stages.evaluate_external import evaluate_external

    width, domain = domain_options(tuned, beam, fusion, graph, bool(method))
    usual = "greedy" if domain.fusion is None else domain.fusion.method
    names: list[Any] = [name.value for name in method or ()] or [usual]
    _check_beam(beam, names)
    shared: dict[str, Any] = {
        "methods": list(dict.fromkeys(part for name in names for part in (METHODS if name == "all" else (name,)))),
        "beam": width,
        "max_duration": max_duration,
        "device": choice.device,
        "threads": choice.threads,
        "out": out,
    }
    if is_external(str(run)):
        own: dict[str, Any] = {
            "--variant": choice.variant,
            "--mode": choice.mode,
            "--chunk": choice.chunk,
            "--left": choice.left,
            "--graph": domain.graph,
            "--format": formats,
        }
        own |= {"--calibrate": calibrate, "--confidence-temperature": confidence_temperature}
        own |= {"--jobs": None if jobs == 1 else jobs, "--ray-address": ray_address}
        own["--lm, --lodr, --hotwords, --decoding and their options"] = domain.fusion
        _refuse(run, own)
        evaluations = evaluate_external(str(run), manifest, **shared)
    else:
        with Workers(jobs, ray_address) as workers:
            evaluations = run_evaluation(
                run,
                manifest,
                variant=choice.variant,
                context=choice.context,
                workers=workers,
                domain=domain,
                calibrate_on=calibrate,
                temperature=confidence_temperature,
                formats=cast(Any, [form.value for form in formats or ()]),
                **shared,
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


def _refuse(run: Path, given: dict[str, Any]) -> None:
    """Refuse options that an external recognizer does not have."""
    if unused := [option for option, value in given.items() if value is not None]:
        raise UserError(f"{run}: an external recognizer does not take {', '.join(unused)}; leave them out")


def tune(
    run: Run,
    manifest: Annotated[Path, io(help="Dev cuts to count the errors on: .jsonl, .jsonl.gz or a Shar directory.")],
    out: Annotated[
        Path,
        io(
            callback=file_named(".yaml", ".yml"),
            help="File to write, such as decoding.yaml, for `--decoding` of evaluate, transcribe and export.",
        ),
    ],
    over: Annotated[
        str | None,
        decoding(
            help="Options to tune, separated by commas: lm-scale, lodr-scale, length-bonus, blank-penalty, temperature, "
            "hotwords-score, beam; with --graph graph-scale, search-beam, output-beam, max-active. NAME=0.1:0.2:0.3 tries these "
            "values instead of the usual ones. [default: of graph-scale, lm-scale and blank-penalty those that have an effect]"
        ),
    ] = None,
    method: Annotated[
        FusedMethod | None,
        decoding(help="Search to tune: that of the transducer, or that of CTC. [default: beam]"),
    ] = None,
    beam: Beam = None,
    *,
    choice: ModelChoice,
    fusion: FusionOptions,
    graph: GraphChoice,
) -> None:
    """Find the weights of language models, hotwords and graphs that give the fewest word errors on dev cuts.

    Examples:

        asrkit tune --from exp/backbone --lm exp/lm4 --manifest dev.jsonl.gz --over lm-scale,blank-penalty --out exp/decoding.yaml

        asrkit tune --from exp/backbone --graph exp/hlg --manifest dev.jsonl.gz --over graph-scale,search-beam --out exp/graph.yaml

        asrkit evaluate --from exp/backbone --decoding exp/decoding.yaml --manifest test.jsonl.gz

    The cuts are encoded once and decoded by --method, or over --graph, for every value. Options are varied one at a time, in turns, starting from
    the values given here. A result of `asrkit evaluate --decoding` records what it was tuned on, with a warning if that is the
    manifest it was evaluated on.
    """
    from asrkit.decoding.search import CTC_GRAPH
    from asrkit.stages.tune import tune as run_tuning

    width, domain = domain_options(None, beam, fusion, graph, method is not None)
    usual = CTC_GRAPH if domain.graph is not None else "beam"
    tuned = run_tuning(
        run,
        manifest,
        out,
        over,
        domain=domain,
        method=cast(Any, usual if method is None else method.value),
        beam=width,
        variant=choice.variant,
        context=choice.context,
        device=choice.device,
        threads=choice.threads,
        note=lambda line: typer.echo(line, err=True),
    )
    typer.echo(
        f"{out}: word error rate {100 * tuned.wer:.2f} % on {tuned.words} words; {len(tuned.trials)} settings were tried"
    )


def transcribe(  # long: a parameter for each option
    run: Run,
    audio: Annotated[
        list[Path],
        typer.Argument(
            help="Audio files of any format that libsndfile reads (not .m4a), rate and length; with --stream also - (raw PCM)."
        ),
    ],
    method: Annotated[
        Method | None,
        decoding(help="Search method. [default: greedy; beam with a language model, hotwords or --nbest]"),
    ] = None,
    beam: Beam = None,
    *,
    choice: ModelChoice,
    language: Annotated[
        str | None, decoding(help="Language spoken, for a model with a language input; `asrkit info` lists them.")
    ] = None,
    stream: Annotated[bool, streams("--stream", help="Show the text while the audio comes in.")] = False,
    fast: Annotated[
        bool, streams("--fast", help="With --stream: read files as fast as possible instead of in real time.")
    ] = False,
    pause: Annotated[
        float | None,
        streams(
            min=0.1, help="With --stream: seconds without a word that end an utterance (endpointing). [default: 1]"
        ),
    ] = None,
    longest: Annotated[
        float | None, streams(min=1, help="With --stream: longest utterance in seconds. [default: 20]")
    ] = None,
    fusion: FusionOptions,
    tuned: Tuned = None,
    graph: GraphChoice,
    confidence_temperature: ConfidenceTemperature = None,
    nbest: Annotated[
        int,
        output(
            "--nbest",
            min=0,
            help="Also print this many texts of each file, or of each part of a long one, with scores; for --format txt and json.",
        ),
    ] = 0,
    form: Annotated[
        AnyFormat,
        output(
            "--format", help="txt; json or ctm, with times and confidences; srt or vtt, subtitles; or stm, segments."
        ),
    ] = AnyFormat.txt,
    out: Annotated[
        Path | None, output(help="Folder to write a file for each recording to, such as talk.srt. [default: print]")
    ] = None,
    timestamps: Annotated[
        bool, output("--timestamps", help="Print one line per word with its start in seconds.")
    ] = False,
    as_json: Annotated[
        bool,
        output("--json", help="Short for --format json. With --stream: one JSON object per change."),
    ] = False,
) -> None:
    """Transcribe audio files, or a live stream.

    Examples:

        asrkit transcribe --from exp/backbone a.wav b.flac

        asrkit transcribe --from exp/near --stream --chunk 16 talk.wav

        asrkit transcribe --from exp/backbone --hotwords names.txt --nbest 4 talk.wav

        asrkit transcribe --from exp/backbone --method ctc-beam --lm exp/lm4 --format srt --out subtitles talk.wav

        arecord -q -t raw -f S16_LE -r 16000 -c 1 | asrkit transcribe --from exp/near --stream -

    Long files are split at pauses. A file that cannot be read is reported, the others are transcribed, and the exit code is 1.

    With --stream the text so far is printed whenever it changes: on one line of a terminal, otherwise on a line each, marked
    partial or final. Standard input must be 16-bit little-endian mono PCM at 16 kHz without a header. Ctrl-C ends the
    stream; the text so far is printed, and the exit code is 130.
    """
    width, domain = domain_options(tuned, beam, fusion, graph, method is not None)
    usual = domain.fusion.method if domain.fusion is not None else "beam" if nbest else "greedy"
    if as_json and form not in (AnyFormat.txt, AnyFormat.json):
        raise UserError(f"--json and --format {form.value}: give one of them")
    form = AnyFormat.json if as_json else form
    shared: dict[str, Any] = {
        "method": usual if method is None else method.value,
        "beam": max(width, nbest) if beam is None else width,
        "variant": choice.variant,
        "context": choice.context,
        "language": language,
        "device": choice.device,
        "threads": choice.threads,
        "warn": lambda line: typer.echo(f"warning: {line}", err=True),
    }
    _check_beam(beam, [shared["method"]])
    _check_output(stream, audio, form.value, out, timestamps, nbest)
    _check_stream_options(stream, audio, timestamps, fast, pause, longest, nbest, confidence_temperature)
    if stream:
        _stream(run, audio, not fast, pause, longest, form is AnyFormat.json, shared | {"domain": domain})
        return
    shared |= {"domain": domain, "nbest": nbest, "temperature": confidence_temperature}
    _transcribe(run, audio, form.value, out, timestamps, shared)


def _check_beam(beam: int | None, methods: Sequence[str]) -> None:
    """Refuse a beam that no search has."""
    if beam is not None and not {"beam", "ctc-beam", "all"} & {*methods}:
        raise UserError(f"--beam: has no effect with --method {methods[0]}; add --method beam, or drop it")


def _check_output(stream: bool, audio: list[Path], form: str, out: Path | None, timestamps: bool, nbest: int) -> None:
    """Refuse outputs that contradict each other."""
    findings = []
    if stream and (form not in ("txt", "json") or out is not None):
        findings.append("--stream: prints text or JSON lines; drop --format and --out")
    if timestamps and (form != "txt" or out is not None):
        findings.append("--timestamps: prints its own output; drop --format and --out")
    if nbest and (form not in ("txt", "json") or (form == "txt" and out is not None)):
        findings.append(f"--nbest: --format {form} has room for one text only; use --format json")
    if form in ("srt", "vtt") and out is None and len(audio) > 1:
        findings.append(f"--format {form}: is for one recording; name a folder with --out to write a file for each")
    if out is not None:
        names = [path.stem for path in audio]
        findings += [
            f"--out: two recordings are called {name}; transcribe them separately, or rename one"
            for name in sorted(set(names))
            if names.count(name) > 1
        ]
        findings += [
            f"{there}: exists beside its recording, and may be its transcript; choose another --out, or move it away"
            for path in audio
            if form == "txt" and out.resolve() == path.parent.resolve() and (there := path.with_suffix(".txt")).exists()
        ]
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
                typer.echo(visible(f"{word.start:10.2f}  {word.text}"))
        elif out is not None and done.error is None:
            typer.echo(f"{done.path}: {write_transcript(out, done, form)}")
        elif not timestamps and out is None and (done.error is None or form == "json"):
            typer.echo(visible(render([done], form)), nl=False)
        for piece in done.nbest if form == "txt" else ():
            for choice in piece.texts:
                typer.echo(visible(f"{piece.start:10.2f}  {choice.score:10.3f}  {choice.text}"))
    if failed:
        raise typer.Exit(1)


def _check_stream_options(
    stream: bool,
    audio: list[Path],
    timestamps: bool,
    fast: bool,
    pause: float | None,
    longest: float | None,
    nbest: int,
    confidence_temperature: float | None,
) -> None:
    """Refuse options without effect."""
    findings = []
    if stream and timestamps:
        findings.append("--stream and --timestamps do not go together; --stream --json prints the times of words")
    if stream and nbest:
        findings.append("--stream and --nbest do not go together; transcribe the whole file for its n-best texts")
    if stream and confidence_temperature is not None:
        findings.append("--confidence-temperature: --stream prints no confidences; drop it")
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
