"""data prompts, import, check and synthesize."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asrkit.errors import UserError

if TYPE_CHECKING:
    from lhotse.cut import Cut

Out = Annotated[Path, typer.Option(help="Folder for the manifests and audio.", show_default=False)]
Text = Annotated[str, typer.Option(help="words: lower case, numbers spelled, no punctuation; raw: as written.")]


def register(app: typer.Typer) -> None:
    """Add the group ``data``."""
    group = typer.Typer(help="Get, make and check data.", no_args_is_help=True)
    group.command("prompts")(prompts)
    group.command("import")(import_)
    group.command("check")(check)
    group.command("synthesize")(synthesize)
    app.add_typer(group, name="data")


def _one_of(option: str, value: str, *choices: str) -> str:
    if value not in choices:
        raise UserError(f"{option} {value}: choose from {', '.join(choices)}")
    return value


def _text_style(value: str) -> str:
    return _one_of("--text", value, "words", "raw")


def _band(value: str) -> str:
    return _one_of("--band", value, "wide", "telephone")


def _list(value: str) -> frozenset[str]:
    return frozenset(part.strip() for part in value.split(",") if part.strip())


def _print_splits(splits: Mapping[str, list[Cut]], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("manifest", "language", "utterances", "minutes", "words", "speakers", box=None)
    for split, cuts in splits.items():
        languages = sorted({cut.supervisions[0].language or "-" for cut in cuts})
        for language in languages:
            mine = [cut for cut in cuts if (cut.supervisions[0].language or "-") == language]
            minutes = sum(cut.duration for cut in mine) / 60
            words = sum(len(cut.supervisions[0].text.split()) for cut in mine)
            speakers = len({cut.supervisions[0].speaker for cut in mine} - {None})
            table.add_row(
                f"{split}.jsonl.gz", language, str(len(mine)), f"{minutes:.1f}", str(words), str(speakers or "-")
            )
    for column in table.columns[2:]:
        column.justify = "right"
    Console().print(table)
    typer.echo(f"in {out}")


def prompts(
    lang: Annotated[list[str], typer.Option(help="en, es, fr, it or ru. Repeatable.", show_default=False)],
    out: Out,
    cache: Annotated[Path | None, typer.Option(help="Where downloads are kept; left out, OUT/packages.")] = None,
    text: Annotated[
        str, typer.Option(callback=_text_style, help="words: lower case, numbers spelled; raw: as written.")
    ] = "words",
    dev: Annotated[float, typer.Option(min=0, max=0.4, help="Share of the sentences for dev.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=0.4, help="Share of the sentences for test.")] = 0.1,
) -> None:
    """Get telephone prompts, real speech, from Debian's archive; needs apt-get, no root.

    Example:

        asrkit data prompts --lang en --lang fr --out data/prompts

    Writes train, dev and test.jsonl.gz, with several languages also one of each for a language (train-fr.jsonl.gz),
    16 kHz FLAC under audio/, and dropped.tsv: what is left out and why. A sentence is in one split only.
    """
    from collections import Counter

    from asrkit.data.corpora.prompts import fetch_prompts

    made = fetch_prompts(lang, out, cache=cache, style=text, dev=dev, test=test, say=typer.echo)
    if made is None:
        typer.echo(f"{out}: already there")
        return
    _print_splits(made.cuts, out)
    counts = Counter(dropped.reason for dropped in made.dropped)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    typer.echo(f"dropped {len(made.dropped)}: {reasons} ({out / 'dropped.tsv'})")


def import_(
    source: Annotated[
        Path, typer.Argument(help="TSV with columns path, text[, id, split, lang, speaker]; or a folder.")
    ],
    out: Out,
    root: Annotated[
        Path | None, typer.Option(help="Where relative paths start; left out, the TSV's folder or the one above.")
    ] = None,
    lang: Annotated[str | None, typer.Option(help="Language of rows that name none.")] = None,
    text: Annotated[
        str, typer.Option(callback=_text_style, help="words: lower case, numbers spelled; raw: as written.")
    ] = "words",
    split: Annotated[str, typer.Option(help="auto, column, hash (of the text) or none.")] = "auto",
    split_by: Annotated[
        str | None, typer.Option(help="Column whose values --test and --dev list; the rest is train.")
    ] = None,
    test: Annotated[str, typer.Option(help="Values of --split-by for test, with commas.")] = "",
    dev: Annotated[str, typer.Option(help="Values of --split-by for dev, with commas.")] = "",
    where: Annotated[list[str] | None, typer.Option(help="Keep rows with column=value[,value]. Repeatable.")] = None,
    bad: Annotated[str, typer.Option(help="refuse: stop at bad rows; skip: leave them out and list them.")] = "refuse",
    convert: Annotated[
        bool, typer.Option("--convert", help="Write 16 kHz mono FLAC instead of pointing to the files.")
    ] = False,
) -> None:
    """Make manifests of recordings of your own.

    Example:

        asrkit data import transcripts.tsv --out data/mine --split-by speaker --test lucas,yweweler --dev george

    A folder holds a.wav with a.txt beside it, at any depth. Recordings may be of any rate: they are resampled as they
    are read. Of several channels the first is taken, with --convert their mean.
    """
    from asrkit.data.corpora.importing import Splitting, import_recordings

    _one_of("--bad", bad, "refuse", "skip")
    _one_of("--split", split, "auto", "column", "hash", "none")
    if (test or dev) and not split_by:
        raise UserError("--test and --dev list values of a column; name it with --split-by")
    conditions = {}
    for condition in where or []:
        name, equals, values = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: write column=value")
        conditions[name] = _list(values)
    made = import_recordings(
        source,
        out,
        root=root,
        language=lang,
        style=text,
        splitting=Splitting(split_by or split, _list(test), _list(dev)),
        where=conditions,
        refuse=bad == "refuse",
        convert=convert,
    )
    _print_splits(made.cuts, out)
    if made.skipped:
        typer.echo(f"skipped {len(made.skipped)} bad rows ({out / 'skipped.txt'})")


def check(
    manifest: Annotated[list[Path], typer.Argument(help="Manifests to train on.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="sentencepiece model: characters and lengths are checked too.")
    ] = None,
    test: Annotated[
        list[Path] | None, typer.Option(help="Held-out manifest, to find what it shares. Repeatable.")
    ] = None,
    audio: Annotated[bool, typer.Option(help="Read every recording.")] = True,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write everything found to this file.")] = None,
) -> None:
    """Say what manifests hold, list the cuts that cannot be trained on, and what training and test data share.

    Example:

        asrkit data check data/prompts/train.jsonl.gz --test data/prompts/dev.jsonl.gz --test data/prompts/test.jsonl.gz

    Exits with 1 when a cut is unusable, or a recording is in both sets.
    """
    from asrkit.stages.data_check import check_manifests, describe

    report = check_manifests(manifest, test or [], tokenizer, read_audio=audio)
    if json_out is not None:
        report.write(json_out)
    for line in describe(report):
        typer.echo(line)
    if report.failed:
        raise typer.Exit(1)


def synthesize(
    lang: Annotated[
        list[str], typer.Option(help="Language of each --text or --manifest, in their order.", show_default=False)
    ],
    out: Out,
    text: Annotated[list[Path] | None, typer.Option(help="File with one sentence a line. Repeatable.")] = None,
    manifest: Annotated[list[Path] | None, typer.Option(help="Manifest to take the texts of. Repeatable.")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="How much speech.")] = 60.0,
    voices: Annotated[
        str, typer.Option(help="espeak-ng voices, with commas: en-us or en-us+f2; left out, the language's.")
    ] = "",
    chains: Annotated[
        float, typer.Option(min=0, max=0.95, help="Share of new sentences, of word pairs in the texts.")
    ] = 0.0,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="Manifest whose sentences are not said: dev, test. Repeatable.")
    ] = None,
    band: Annotated[str, typer.Option(callback=_band, help="wide or telephone (nothing above 4 kHz).")] = "wide",
    seed: Annotated[int, typer.Option(help="Another seed draws other voices, speeds and pitches.")] = 0,
) -> None:
    """Make speech to train on with espeak-ng, in many voices, speeds and pitches; never for test data.

    Example:

        asrkit data synthesize --manifest data/prompts/train.jsonl.gz --lang en --out data/synthetic --minutes 60 \\
            --chains 0.5 --exclude data/prompts/dev.jsonl.gz --exclude data/prompts/test.jsonl.gz

    Several languages: --text en.txt --lang en --text fr.txt --lang fr, or one --manifest and several --lang.
    To train on real and synthetic speech: lhotse combine real.jsonl.gz synthetic.jsonl.gz both.jsonl.gz
    """
    from asrkit.data.corpora.synthesize import synthesize as run

    files = [*(text or []), *(manifest or [])]
    if len(files) == 1:
        files *= len(lang)
    if not files or len(files) != len(lang):
        raise UserError(f"{len(files)} --text and --manifest for {len(lang)} --lang; give one language for each")
    made = run(
        list(zip(files, lang, strict=True)),
        out,
        minutes=minutes,
        seed=seed,
        voices=[voice.strip() for voice in voices.split(",") if voice.strip()],
        band=band,
        chains=chains,
        exclude=exclude or (),
    )
    if made is None:
        typer.echo(f"{out}: already there")
        return
    _print_splits({"train": made.cuts}, out)
    typer.echo(f"from {made.texts} sentences; {made.excluded} excluded, {made.unusable} lines not usable")
