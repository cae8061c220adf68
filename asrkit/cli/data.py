"""data prompts, import, fetch, check and synthesize."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asrkit.cli.app import App
from asrkit.cli.options import Cluster, Jobs, file_named, io, output
from asrkit.errors import UserError

if TYPE_CHECKING:
    from lhotse.cut import Cut

texts = partial(typer.Option, rich_help_panel="Text")
splits = partial(typer.Option, rich_help_panel="Splits")
speech = partial(typer.Option, rich_help_panel="Speech")

Out = Annotated[Path, io(help="Folder for the manifests and the audio.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the group ``data``."""
    group = App(help="Download, import, check and synthesize data.", no_args_is_help=True)
    group.command("prompts")(prompts)
    group.command("import")(import_)
    group.command("fetch")(fetch)
    group.command("check")(check)
    group.command("synthesize")(synthesize)
    app.add_typer(group, name="data")


def _one_of(option: str, value: str, *choices: str) -> str:
    if value not in choices:
        raise UserError(f"{option} {value}: choose from {', '.join(choices)}")
    return value


def _text_style(value: str) -> str:
    return _one_of("--text", value, "words", "raw")


def _import_style(value: str) -> str:
    return _one_of("--text", value, "words", "raw", "none")


def _band(value: str) -> str:
    return _one_of("--band", value, "wide", "telephone")


def _engine(value: str) -> str:
    return _one_of("--engine", value, "espeak", "piper")


def _list(value: str) -> frozenset[str]:
    return frozenset(part.strip() for part in value.split(",") if part.strip())


def _print_splits(splits: Mapping[str, list[Cut]], out: Path) -> None:
    from rich.table import Table

    from asrkit.reporting.console import PlainConsole

    table = Table("manifest", "language", "utterances", "minutes", "words", "speakers", box=None)
    for split, cuts in splits.items():
        languages = sorted({cut.supervisions[0].language or "-" for cut in cuts})
        for language in languages:
            of_language = [cut for cut in cuts if (cut.supervisions[0].language or "-") == language]
            minutes = sum(cut.duration for cut in of_language) / 60
            words = sum(len((cut.supervisions[0].text or "").split()) for cut in of_language)
            speakers = len({cut.supervisions[0].speaker for cut in of_language} - {None})
            table.add_row(
                f"{split}.jsonl.gz", language, str(len(of_language)), f"{minutes:.1f}", str(words), str(speakers or "-")
            )
    for column in table.columns[2:]:
        column.justify = "right"
    PlainConsole().print(table)
    typer.echo(f"in {out}")


def prompts(
    lang: Annotated[list[str], io(help="Language: en, es, fr, it or ru. Repeatable.", show_default=False)],
    out: Out,
    cache: Annotated[Path | None, io(help="Folder for the downloads. [default: OUT/packages]")] = None,
    text: Annotated[
        str,
        texts(callback=_text_style, help="words: lower case, numbers spelled out, no punctuation; raw: as written."),
    ] = "words",
    dev: Annotated[float, splits(min=0, max=0.4, help="Share of the sentences for dev.")] = 0.1,
    test: Annotated[float, splits(min=0, max=0.4, help="Share of the sentences for test.")] = 0.1,
) -> None:
    """Download telephone prompts, real speech, from Debian's archive. Needs apt-get, but not root.

    Example:

        asrkit data prompts --lang en --lang fr --out data/prompts

    Writes train, dev and test.jsonl.gz (with several languages also one of each per language, such as train-fr.jsonl.gz),
    16 kHz FLAC under audio/, and dropped.tsv, which lists what was left out and why. A sentence is in one split only.
    """
    from collections import Counter

    from asrkit.data.corpora.prompts import fetch_prompts

    made = fetch_prompts(lang, out, cache=cache, style=text, dev=dev, test=test, say=typer.echo)
    if made is None:
        typer.echo(f"{out}: already complete")
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
        Path | None, io(help="Folder that relative paths start from. [default: the TSV's folder or the one above]")
    ] = None,
    lang: Annotated[str | None, texts(help="Language of rows that name none.")] = None,
    text: Annotated[
        str,
        texts(
            callback=_import_style,
            help="words: lower case, numbers spelled out, no punctuation; raw: as written; none: recordings without texts, to pretrain on.",
        ),
    ] = "words",
    split: Annotated[
        str, splits(help="How to split: auto, column, hash (of the text: each text is in one set only) or none.")
    ] = "auto",
    split_by: Annotated[
        str | None, splits(help="Column to split by: --test and --dev list its values, the rest is train.")
    ] = None,
    test: Annotated[str, splits(help="Values of --split-by that go to test, separated by commas.")] = "",
    dev: Annotated[str, splits(help="Values of --split-by that go to dev, separated by commas.")] = "",
    where: Annotated[list[str] | None, io(help="Keep only rows with column=value[,value]. Repeatable.")] = None,
    bad: Annotated[str, io(help="refuse: stop at bad rows; skip: leave them out and list them.")] = "refuse",
    convert: Annotated[bool, io("--convert", help="Write 16 kHz mono FLAC instead of pointing to the files.")] = False,
    jobs: Jobs = None,
    ray_address: Cluster = None,
) -> None:
    """Make manifests from your own recordings.

    Examples:

        asrkit data import transcripts.tsv --out data/mine --split-by speaker --test lucas,yweweler --dev george

        asrkit data import recordings/ --text none --out data/unlabeled

    In a folder, a.wav needs a.txt beside it, at any depth. Recordings of any rate are resampled as they are read. Of several
    channels the first is used; --convert uses their mean.
    """
    from asrkit.data.corpora.importing import Splitting, import_recordings
    from asrkit.data.parallel import Workers

    _one_of("--bad", bad, "refuse", "skip")
    _one_of("--split", split, "auto", "column", "hash", "none")
    if text == "none" and split == "hash":
        raise UserError("--split hash: divides by the texts, and --text none has none; use --split-by, or leave it out")
    if (test or dev) and not split_by:
        raise UserError("--test, --dev: list values of a column; name the column with --split-by")
    if split_by and split != "auto":
        raise UserError(f"--split {split} and --split-by: are two ways to split; give one of them")
    if (jobs is not None or ray_address is not None) and not convert:
        raise UserError("--jobs, --ray-address: work with --convert only; leave them out")
    conditions: dict[str, frozenset[str]] = {}
    for condition in where or []:
        name, equals, values = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: write column=value")
        conditions[name] = conditions.get(name, frozenset()) | _list(values)
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
        workers=Workers(jobs, ray_address),
    )
    _print_splits(made.cuts, out)
    if made.skipped:
        typer.echo(f"skipped {len(made.skipped)} bad rows ({out / 'skipped.txt'})")
    if split == "hash" and (empty := [name for name in ("train", "dev", "test") if name not in made.cuts]):
        typer.echo(
            f"no text fell into {' or '.join(empty)}: a text is in one set only, and there are few; split by speaker instead, as in "
            "--split-by speaker --test anne --dev bob, or by a column split"
        )


def fetch(
    url: Annotated[
        str,
        typer.Argument(
            help="URL of a shard's cuts, or of several: https://HOST/corpus/cuts.{000000..000009}.jsonl.gz."
        ),
    ],
    out: Annotated[Path, io(help="Folder to copy the shards to.", show_default=False)],
    field: Annotated[
        list[str] | None,
        io(help="recording or features: the tar files to copy with the cuts. Repeatable. [default: recording]"),
    ] = None,
) -> None:
    """Copy a Shar directory from a web server or an object store.

    Examples:

        asrkit data fetch "https://example.org/corpus/cuts.{000000..000009}.jsonl.gz" --out data/corpus

        asrkit data fetch "s3://bucket/corpus/cuts.{000000..000009}.jsonl.gz" --out data/corpus

    The folder is then a manifest for all commands. If the command is interrupted, run it again: it copies what is missing.
    """
    from asrkit.data.corpora.fetch import fetch_shar

    cuts = fetch_shar(url, out, tuple(field or ["recording"]), lambda path: typer.echo(path, err=True))
    typer.echo(f"{out}: {len(cuts)} cuts, {cuts.durations.sum() / 3600:.1f} hours")


def check(
    manifest: Annotated[list[Path], typer.Argument(help="Training manifests.")],
    tokenizer: Annotated[Path | None, io(help="sentencepiece model, to check characters and lengths against.")] = None,
    test: Annotated[
        list[Path] | None, io(help="Held-out manifest, to check that it shares nothing with them. Repeatable.")
    ] = None,
    audio: Annotated[bool, io(help="Read every recording, or look only at the manifests.")] = True,
    jobs: Jobs = None,
    ray_address: Cluster = None,
    json_out: Annotated[
        Path | None, output("--json", callback=file_named(".json"), help="Write all findings to this JSON file.")
    ] = None,
) -> None:
    """Describe manifests, list cuts that cannot be trained on, and find what training and test data share.

    Example:

        asrkit data check data/prompts/train.jsonl.gz --test data/prompts/dev.jsonl.gz --test data/prompts/test.jsonl.gz

    Exits with 1 if a cut is unusable, or if an id or a recording is in both sets.
    """
    from asrkit.data.parallel import Workers
    from asrkit.stages.data_check import check_manifests, describe

    with Workers(jobs, ray_address) as workers:
        report = check_manifests(manifest, test or [], tokenizer, read_audio=audio, workers=workers)
    if json_out is not None:
        report.write(json_out)
    for line in describe(report):
        typer.echo(line)
    if report.failed:
        raise typer.Exit(1)


def synthesize(  # long: a parameter for each option
    lang: Annotated[
        list[str], io(help="Language of each --text, then of each --manifest. Repeatable.", show_default=False)
    ],
    out: Out,
    text: Annotated[list[Path] | None, io(help="Text file with one sentence per line. Repeatable.")] = None,
    manifest: Annotated[list[Path] | None, io(help="Manifest whose texts are spoken. Repeatable.")] = None,
    minutes: Annotated[float, speech(min=0.01, help="Minutes of speech to make.")] = 60.0,
    engine: Annotated[
        str, speech(callback=_engine, help="espeak: many synthetic voices; piper: natural voices, from files.")
    ] = "espeak",
    voice: Annotated[
        list[Path] | None, speech(help="Voice of Piper, NAME.onnx with NAME.onnx.json beside it. Repeatable.")
    ] = None,
    voices: Annotated[
        str, speech(help="espeak-ng voices, separated by commas, such as en-us,en-us+f2. [default: the language's]")
    ] = "",
    chains: Annotated[
        float, speech(min=0, max=0.95, help="Share of new sentences, made of word pairs that occur in the texts.")
    ] = 0.0,
    exclude: Annotated[
        list[Path] | None, io(help="Manifest whose sentences are left out, such as dev and test. Repeatable.")
    ] = None,
    band: Annotated[str, speech(callback=_band, help="Bandwidth: wide, or telephone (nothing above 4 kHz).")] = "wide",
    device: Annotated[
        float,
        speech(
            "--device-share",
            min=0,
            max=1,
            help="Share of the utterances to overdrive or to send through a lossy codec.",
        ),
    ] = 0.0,
    seed: Annotated[int, speech(min=0, max=2**63 - 1, help="Seed of voices, speeds and pitches.")] = 0,
    jobs: Jobs = None,
    ray_address: Cluster = None,
) -> None:
    """Make training speech with espeak-ng or Piper, in many voices, speeds and pitches. Do not test on it.

    Examples:

        asrkit data synthesize --manifest data/prompts/train.jsonl.gz --lang en --out data/synthetic --minutes 60 \\
            --chains 0.5 --exclude data/prompts/dev.jsonl.gz --exclude data/prompts/test.jsonl.gz

        asrkit data synthesize --engine piper --voice en_US-joe-medium.onnx --text corpus.txt --lang en --minutes 60 \\
            --out data/spoken

    Several languages: --text en.txt --lang en --text fr.txt --lang fr, or one --manifest and several --lang.
    To train on it beside real speech: asrkit train-backbone --set 'data.also=[data/synthetic/train.jsonl.gz]' ...
    """
    from asrkit.data.corpora.synthesize import synthesize as run
    from asrkit.data.parallel import Workers

    files = [*(text or []), *(manifest or [])]
    if len(files) == 1:
        files *= len(lang)
    if not files or len(files) != len(lang):
        raise UserError(f"--lang: {len(lang)} for {len(files)} files of --text and --manifest; give one for each")
    if voice and engine != "piper":
        raise UserError(
            "--voice: takes a voice file of Piper; add --engine piper, or name espeak-ng's voices with --voices"
        )
    with Workers(jobs, ray_address) as workers:
        made = run(
            list(zip(files, lang, strict=True)),
            out,
            minutes=minutes,
            seed=seed,
            voices=[voice.strip() for voice in voices.split(",") if voice.strip()],
            band=band,
            chains=chains,
            exclude=exclude or (),
            piper=(voice or []) if engine == "piper" else None,
            device=device,
            workers=workers,
        )
    if made is None:
        typer.echo(f"{out}: already complete")
        return
    _print_splits({"train": made.cuts}, out)
    typer.echo(f"from {made.texts} sentences; {made.excluded} excluded, {made.unusable} unusable lines")
