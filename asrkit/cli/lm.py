"""align and train-lm."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from asrkit.cli.options import Cluster, Config, Device, Jobs, Out, Overrides, Seed, given, io, train_or_stop

LmKind = StrEnum("LmKind", ["lstm", "transformer", "ngram"])

alignment = partial(typer.Option, rich_help_panel="Alignment")
language_model = partial(typer.Option, rich_help_panel="Language model")


def register(app: typer.Typer) -> None:
    """Add the commands around language models."""
    app.command("align")(align)
    app.command("train-lm")(train_lm)


def align(
    parent: Annotated[Path, io("--from", help="Run directory of the model whose CTC head aligns.")],
    manifest: Annotated[Path, io(help="Cuts to align: .jsonl, .jsonl.gz or a Shar directory.")],
    out: Annotated[Path, io(help="Manifest to write, .jsonl.gz: the cuts with their alignments.")],
    unit: Annotated[
        list[str] | None,
        alignment(help="Unit to align in addition to words: bpe, phone or senone. Repeatable. [default: bpe]"),
    ] = None,
    phones: Annotated[
        str | None,
        alignment(
            help="How phones share the time of their word: even, or gaussian, a second forced pass. [default: even]"
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, alignment(help="sentencepiece model of the bpe units. [default: the model's own]")
    ] = None,
    senones: Annotated[
        Path | None, alignment(help="Senone tree to use. Without it one is grown on these cuts.")
    ] = None,
    language: Annotated[str | None, alignment(help="Language of supervisions that name none; phones need one.")] = None,
    device: Device = "auto",
    jobs: Jobs = None,
    ray_address: Cluster = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Find the times of each word, word piece, phone or senone.

    Examples:

        asrkit align --from exp/backbone --manifest data/prompts/train.jsonl.gz --out exp/aligned.jsonl.gz

        asrkit align --from exp/backbone --unit phone --unit senone --phones gaussian \\
            --manifest data/prompts/train.jsonl.gz --out exp/aligned.jsonl.gz

    The times are Lhotse alignments in the supervisions, in seconds. Cuts that cannot be aligned are listed and refused, or left
    out with --set bad_cuts=skip. A new senone tree is written beside --out.
    """
    from asrkit.config import resolve
    from asrkit.data.parallel import Workers
    from asrkit.stages.align import AlignConfig
    from asrkit.stages.align import align as run

    options = given({"units": unit or None, "phones": phones, "language": language})
    settings = resolve(AlignConfig, config, overrides or (), options=options)
    with Workers(jobs, ray_address) as workers:
        done = run(
            parent, manifest, out, settings, tokenizer=tokenizer, senones=senones, device=device, workers=workers
        )
    for finding in done.left_out:
        typer.echo(f"left out: cut {finding.cut_id}: {finding.kind}: {finding.detail}", err=True)
    units = ", ".join(["word", *settings.units])
    typer.echo(f"{out}: {done.cuts} cuts, aligned by {units}; mean word score {done.score:.2f}")
    if done.tree is not None:
        typer.echo(f"{done.tree}: the senone tree; pass it to align and train-lm with --senones")


def train_lm(
    out: Out,
    text: Annotated[Path | None, io(help="UTF-8 text to train on, one sentence per line. Or use --manifest.")] = None,
    manifest: Annotated[
        Path | None, io(help="Cuts to train on: their words for bpe, else their alignments. Or use --text.")
    ] = None,
    dev: Annotated[
        Path | None, io(help="Text or cuts to measure perplexity on. Without it some sentences are held out.")
    ] = None,
    kind: Annotated[
        LmKind | None, language_model(help="lstm, transformer, or ngram, which is counted in seconds. [default: lstm]")
    ] = None,
    order: Annotated[
        int | None, language_model(help="Length of the longest n-grams: sets `ngram.order`. [default: 4]")
    ] = None,
    unit: Annotated[
        str | None,
        language_model(help="Unit to predict: bpe, phone or senone; with --kind ngram bpe or word. [default: bpe]"),
    ] = None,
    language: Annotated[
        str | None, language_model(help="Language to pronounce --text in, such as en, for phones and senones.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        language_model(help="sentencepiece model for bpe, such as the recognizer's. Without it one is trained."),
    ] = None,
    senones: Annotated[
        Path | None, language_model(help="Senone tree that `asrkit align` wrote, for the senones of a text.")
    ] = None,
    seed: Seed = None,
    device: Device = "auto",
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Train a language model over word pieces, words, phones or senones, to decode with or to teach a recognizer.

    Examples:

        asrkit train-lm --text corpus.txt --kind ngram --order 4 --tokenizer exp/backbone/tokenizer.model --out exp/lm4

        asrkit train-lm --text corpus.txt --unit bpe --tokenizer exp/backbone/tokenizer.model --out exp/lm-bpe

        asrkit train-lm --text corpus.txt --unit phone --language en --out exp/lm-phone

        asrkit train-lm --manifest aligned.jsonl.gz --unit senone --out exp/lm-senone

    The weights with the best perplexity on the held-out sentences are kept. An n-gram model is written as an ARPA file.
    """
    from asrkit.config import resolve
    from asrkit.errors import UserError
    from asrkit.stages.train_lm import TrainLmConfig
    from asrkit.stages.train_lm import train_lm as run
    from asrkit.training.ngram import NgramConfig

    source = text or manifest
    if source is None or (text is not None and manifest is not None):
        raise UserError("--text, --manifest: give one of them to train on")
    if order is not None and kind is not LmKind.ngram:
        raise UserError("--order: works with --kind ngram only")
    network = None if kind in (None, LmKind.ngram) else kind
    options = {"unit": unit, "language": language, "seed": seed, "model.architecture": network and network.value}
    defaults = TrainLmConfig(ngram=NgramConfig()) if kind is LmKind.ngram else None
    settings = resolve(
        TrainLmConfig, config, overrides or (), defaults, options=given({**options, "ngram.order": order})
    )
    if network is not None and settings.ngram is not None:
        raise UserError(
            f"--kind {network.value}: --config or --set has settings of an n-gram (ngram); leave them or --kind out"
        )
    train_or_stop(
        out,
        lambda: run(
            source, out, settings, dev=dev, tokenizer=tokenizer, senones=senones, device=device, note=typer.echo
        ),
    )
