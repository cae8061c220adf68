"""align and train-lm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asrkit.cli.options import (
    Config,
    Device,
    Out,
    Overrides,
    Seed,
    changes_of,
    train_or_stop,
)


def register(app: typer.Typer) -> None:
    """Add the commands around language models."""
    app.command("align")(align)
    app.command("train-lm")(train_lm)


def align(
    parent: Annotated[Path, typer.Option("--from", help="Run directory of the model whose CTC head aligns.")],
    manifest: Annotated[Path, typer.Option(help="Cuts to align: .jsonl, .jsonl.gz or a Shar directory.")],
    out: Annotated[Path, typer.Option(help="Manifest to write, .jsonl.gz: the cuts with their alignments.")],
    unit: Annotated[
        list[str] | None, typer.Option(help="bpe, phone or senone; words always are. Repeatable. [default: bpe]")
    ] = None,
    phones: Annotated[
        str | None, typer.Option(help="Within a word: even, or gaussian, a second forced pass. [default: even]")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="sentencepiece model of the bpe units; left out, the model's own.")
    ] = None,
    senones: Annotated[
        Path | None, typer.Option(help="The tree of senones to use; left out, one is grown on these cuts.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Of supervisions that name none, for their phones.")] = None,
    config: Config = None,
    overrides: Overrides = None,
    device: Device = "auto",
) -> None:
    """Find when each word, and each word piece, phone or senone, is said.

    Examples:

        asrkit align --from exp/backbone --manifest data/prompts/train.jsonl.gz --out exp/aligned.jsonl.gz

        asrkit align --from exp/backbone --unit phone --unit senone --phones gaussian \\
            --manifest data/prompts/train.jsonl.gz --out exp/aligned.jsonl.gz

    The alignments are lhotse's, in the supervisions, in seconds. Cuts that cannot be aligned are refused by id, or left out with
    --set bad_cuts=skip. The tree of senones is written beside --out.
    """
    from asrkit.config import resolve
    from asrkit.stages.align import AlignConfig
    from asrkit.stages.align import align as run

    given = {"units": f"[{','.join(unit)}]" if unit else None, "phones": phones, "language": language}
    settings = resolve(AlignConfig, config, changes_of(overrides, given))
    done = run(parent, manifest, out, settings, tokenizer=tokenizer, senones=senones, device=device)
    for finding in done.left_out:
        typer.echo(f"left out: cut {finding.cut_id}: {finding.kind}: {finding.detail}", err=True)
    units = ", ".join(["word", *settings.units])
    typer.echo(f"{out}: {done.cuts} cuts, aligned by {units}; mean score of a word {done.score:.2f}")
    if done.tree is not None:
        typer.echo(f"{done.tree}: the tree of senones; give it to align and train-lm as --senones")


def train_lm(
    out: Out,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to train on, one sentence a line.")] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="Instead: cuts, of which the words count for bpe, else the alignments.")
    ] = None,
    unit: Annotated[str | None, typer.Option(help="bpe, phone or senone. [default: bpe]")] = None,
    language: Annotated[str | None, typer.Option(help="Whose pronunciation the text's phones are, such as en.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="sentencepiece model for bpe, such as the recognizer's; left out, one is trained."),
    ] = None,
    senones: Annotated[Path | None, typer.Option(help="The tree that align wrote, for the senones of a text.")] = None,
    dev: Annotated[
        Path | None, typer.Option(help="Text or cuts to measure perplexity on; left out, a share is held out.")
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
    seed: Seed = None,
    device: Device = "auto",
) -> None:
    """Train a language model over word pieces, phones or senones, to teach a recognizer.

    Examples:

        asrkit train-lm --text corpus.txt --unit bpe --tokenizer exp/backbone/tokenizer.model --out exp/lm-bpe

        asrkit train-lm --text corpus.txt --unit phone --language en --out exp/lm-phone

        asrkit train-lm --manifest aligned.jsonl.gz --unit senone --out exp/lm-senone

    Perplexity on the held-out sentences chooses the best weights. --set model.architecture=transformer replaces the LSTM.
    """
    from asrkit.config import resolve
    from asrkit.errors import UserError
    from asrkit.stages.train_lm import TrainLmConfig
    from asrkit.stages.train_lm import train_lm as run

    source = text or manifest
    if source is None or (text is not None and manifest is not None):
        raise UserError("give one of --text and --manifest to train on")
    given = {"unit": unit, "language": language, "seed": seed}
    settings = resolve(TrainLmConfig, config, changes_of(overrides, given))
    train_or_stop(out, lambda: run(source, out, settings, dev=dev, tokenizer=tokenizer, senones=senones, device=device))
