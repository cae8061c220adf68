"""label: texts for recordings without them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asrkit.cli.options import Cluster, Jobs, io

if TYPE_CHECKING:
    from asrkit.stages.label import Labeled

filtering = partial(typer.Option, rich_help_panel="Filters")
recognizing = partial(typer.Option, rich_help_panel="Recognition")


def register(app: typer.Typer) -> None:
    """Add the command ``label``."""
    app.command("label")(label)


def label(
    recognizer: Annotated[
        list[str],
        io(
            "--with",
            help="whisper:NAME_OR_PATH, sherpa-onnx:DIR, or a run or exported directory. Give a second one to check the first.",
            show_default=False,
        ),
    ],
    manifest: Annotated[Path, io(help="Cuts to label: .jsonl, .jsonl.gz or a Shar directory.", show_default=False)],
    out: Annotated[
        Path, io(help="Manifest to write, .jsonl.gz. Running the same command again resumes it.", show_default=False)
    ],
    language: Annotated[
        str | None, recognizing(help="Language of cuts without one. [default: detected, if the recognizer can]")
    ] = None,
    max_seconds: Annotated[
        float, recognizing(min=1, help="Longest utterance in seconds; longer recordings are cut at pauses.")
    ] = 20.0,
    replace_texts: Annotated[
        bool,
        recognizing("--replace-texts", help="Also label cuts that have a text, and show how good the labels are."),
    ] = False,
    max_duration: Annotated[float, recognizing(min=1, help="Seconds of audio to recognize at once.")] = 200.0,
    device: Annotated[str, recognizing(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int | None, recognizing(min=1, help="CPU threads. [default: the recognizer's own choice]")
    ] = None,
    jobs: Jobs = None,
    ray_address: Cluster = None,
    min_confidence: Annotated[
        float,
        filtering(min=0, max=1, help="Lowest confidence of a label (geometric mean of its tokens' probabilities)."),
    ] = 0.6,
    max_disagreement: Annotated[
        float,
        filtering(min=0, help="With a second --with: most word errors of its text against the first's, per word."),
    ] = 0.3,
    max_rate: Annotated[float, filtering(min=1, help="Most characters per second.")] = 25.0,
    max_repeats: Annotated[int, filtering(min=1, help="Most times the same words may come in a row.")] = 3,
) -> None:
    """Label recordings without texts with a recognizer, and leave out doubtful labels.

    Examples:

        asrkit label --with whisper:tiny.en --manifest data/raw/all.jsonl.gz --out data/labeled.jsonl.gz

        asrkit label --with whisper:tiny.en --with exp/backbone --manifest data/raw/all.jsonl.gz --out data/labeled.jsonl.gz

    Beside OUT, *.dropped.tsv lists what was left out and why. *.texts.jsonl keeps every text: a killed run resumes from it, and
    the same command with other filters recognizes nothing again. Models are never downloaded.
    """
    from asrkit.data.parallel import Workers
    from asrkit.methods.labeling import Filters
    from asrkit.stages.label import label as run

    filters = Filters(min_confidence, max_disagreement, max_rate, max_repeats)
    with Workers(jobs, ray_address) as workers:
        made = run(
            recognizer,
            manifest,
            out,
            language=language,
            filters=filters,
            max_seconds=max_seconds,
            replace_texts=replace_texts,
            max_duration=max_duration,
            device=device,
            threads=threads,
            workers=workers,
        )
    _show(made, out)


def _show(made: Labeled, out: Path) -> None:
    """Print what was labeled and left out, and how good the labels are if the cuts had texts."""
    from asrkit.reporting.tables import percent, plain_table, table_console

    typer.echo(f"{out}: labeled {made.labeled} utterances, {made.labeled_seconds / 60:.1f} min")
    if made.given:
        typer.echo(f"{made.given} cuts had a text and were not changed")
    reasons = ", ".join(f"{number} {reason}" for reason, number in made.dropped.most_common())
    if reasons:
        listed = out.with_name(out.name.removesuffix(".jsonl.gz") + ".dropped.tsv")
        typer.echo(f"dropped {made.dropped.total()}, {made.dropped_seconds / 60:.1f} min: {reasons} ({listed})")
    if made.thresholds:
        table = plain_table(
            "labels against the given texts",
            numbers=("confidence from", "words kept %", "words", "WER %", "sub", "ins", "del"),
        )
        for row in made.thresholds:
            errors = row.errors
            rate = errors.rate if errors.words else None
            cells = (errors.words, percent(rate), errors.substitutions, errors.insertions, errors.deletions)
            table.add_row(f"{row.confidence:g}", percent(row.share), *map(str, cells))
        table_console().print(table)
