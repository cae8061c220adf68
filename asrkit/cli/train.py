"""pretrain, train-backbone and add-submodel."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from asrkit.cli.options import (
    Config,
    Dev,
    Device,
    Manifest,
    MaxDuration,
    Out,
    Overrides,
    Seed,
    given,
    io,
    train_or_stop,
    training,
)

SubModelKind = StrEnum("SubModelKind", ["attention", "adapter"])
Position = StrEnum("Position", ["serial", "parallel"])
of_submodel = partial(typer.Option, rich_help_panel="Sub-model")


def register(app: typer.Typer) -> None:
    """Add the commands that train an encoder or a backbone, and what goes on top of it."""
    app.command("pretrain")(pretrain)
    app.command("train-backbone")(train_backbone)
    app.command("add-submodel")(add_submodel)


def pretrain(
    manifest: Annotated[Path, io(help="Cuts to train on, texts ignored: .jsonl, .jsonl.gz or a Shar directory.")],
    out: Out,
    dev: Annotated[Path | None, io(help="Cuts to measure the contrastive loss on while training.")] = None,
    parent: Annotated[
        Path | None,
        io("--from", help="Run directory of a pretrained encoder to train further. Without it a new one is made."),
    ] = None,
    variant: Annotated[
        str | None, io(help="Variant to train, with --from. [default: the encoder's default variant]")
    ] = None,
    supernet: Annotated[
        bool, training("--supernet", help="Find masks meanwhile, which `asrkit supernet --freeze-masks` keeps.")
    ] = False,
    sparsity: Annotated[
        float | None, training(help="With --supernet, share of the weights that the masks leave out. [default: 0.67]")
    ] = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Pretrain an encoder on audio alone (self-supervised, wav2vec 2.0), to make a recognizer of it with fewer transcripts.

    Examples:

        asrkit pretrain --manifest data/prompts/train.jsonl.gz --dev data/prompts/dev.jsonl.gz --out exp/pretrained

        asrkit train-backbone --from exp/pretrained --manifest data/mine/train.jsonl.gz --out exp/mine

        asrkit pretrain --from exp/pretrained --manifest data/mine/train.jsonl.gz --out exp/adapted --set training.steps=500
    """
    from asrkit.config import resolve
    from asrkit.errors import UserError
    from asrkit.methods.pretraining import PretrainConfig
    from asrkit.methods.supernet.config import SelfPruningConfig
    from asrkit.stages.pretrain import pretrain as run

    if sparsity is not None and not supernet:
        raise UserError(f"--sparsity {sparsity}: works only with --supernet; add it, or leave --sparsity out")
    options = given(
        {"variant": variant, "seed": seed, "data.max_duration": max_duration, "supernet.sparsity": sparsity}
    )
    defaults = PretrainConfig(supernet=SelfPruningConfig()) if supernet else None
    settings = resolve(PretrainConfig, config, overrides or (), defaults, options=options)
    train_or_stop(out, lambda: run(manifest, out, settings, parent=parent, dev=dev, device=device))


def train_backbone(
    manifest: Manifest,
    out: Out,
    dev: Dev = None,
    parent: Annotated[
        Path | None,
        io(
            "--from",
            help="Run directory of a model to train further, or of a pretrained encoder. Without it a new model is made.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        io(help="sentencepiece model for a new model, or one made of a pretrained encoder. Without it one is trained."),
    ] = None,
    variant: Annotated[
        str | None, io(help="Variant to train, with --from. [default: the model's default variant]")
    ] = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Train a convolutional backbone with a transducer and a CTC head, or train any model further on other data.

    Examples:

        asrkit train-backbone --manifest data/prompts/train.jsonl.gz --dev data/prompts/dev.jsonl.gz \\
            --out exp/backbone --set model.size=tiny --set training.steps=2000

        asrkit train-backbone --from exp/backbone --manifest data/mine/train.jsonl.gz \\
            --dev data/mine/dev.jsonl.gz --out exp/mine --set training.steps=500

        asrkit train-backbone --from exp/pretrained --manifest data/mine/train.jsonl.gz --out exp/mine

    Several processes (torch 2 needs no --redirects and --tee):

        torchrun --rdzv_backend c10d --rdzv_endpoint localhost:0 --redirects 1 --tee 1 --nproc_per_node 2 \\
            -m asrkit train-backbone --manifest data/prompts/train.jsonl.gz --out exp/backbone

    Settings come from the defaults, then --config, then --set; config.yaml in the run directory holds every one of them.
    """
    from asrkit.config import resolve
    from asrkit.stages.train_backbone import TrainBackboneConfig, defaults
    from asrkit.stages.train_backbone import train_backbone as run

    options = given({"variant": variant, "seed": seed, "data.max_duration": max_duration})
    settings = resolve(TrainBackboneConfig, config, overrides or (), defaults(parent), options=options)
    train_or_stop(out, lambda: run(manifest, out, settings, parent=parent, dev=dev, tokenizer=tokenizer, device=device))


def add_submodel(
    parent: Annotated[Path, io("--from", help="Run directory of the model to add to.")],
    manifest: Manifest,
    out: Out,
    name: Annotated[str, of_submodel(help="Name of the new sub-model, and of the variant that uses it.")],
    dev: Dev = None,
    kind: Annotated[SubModelKind | None, of_submodel(help="What to add. [default: attention]")] = None,
    layers: Annotated[
        str | None,
        of_submodel(
            help="Encoder blocks to add it to: all, or numbers from 0 such as 0-5 or 0,2,4. [default: all]",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        str | None,
        of_submodel(help="What attention sees: full, or left=64,chunk=16 in frames of 40 ms. [default: full]"),
    ] = None,
    position: Annotated[
        Position | None,
        of_submodel(
            help="Where it attaches: serial (before the convolution) or parallel (beside it). [default: serial]"
        ),
    ] = None,
    init: Annotated[
        str | None,
        of_submodel(help="Initial weights: noop, random, or the sub-model to copy, such as joint. [default: noop]"),
    ] = None,
    active: Annotated[
        list[str] | None,
        of_submodel(help="Existing sub-model to run, frozen, while the new one trains. Repeatable."),
    ] = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Train attention, or an adapter, on top of a frozen model: another operating point in the same checkpoint.

    Examples:

        asrkit add-submodel --from exp/backbone --name attention --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --out exp/attention

        asrkit add-submodel --from exp/attention --name near --layers 0-2 --context left=64,chunk=16 \\
            --manifest data/prompts/train.jsonl.gz --out exp/near

    The existing weights do not change, and neither do the results of the existing variants.
    """
    from asrkit.config import resolve
    from asrkit.stages.add_submodel import AddSubModelConfig
    from asrkit.stages.add_submodel import add_submodel as run

    options = given(
        {
            "submodel.kind": kind and kind.value,
            "submodel.context": context,
            "submodel.position": position and position.value,
            "submodel.init": init,
            "active": active or None,
            "seed": seed,
            "data.max_duration": max_duration,
        }
    )
    if layers is not None:
        options["submodel.layers"] = _layers(layers)
    settings = resolve(AddSubModelConfig, config, overrides or (), options=options)
    train_or_stop(out, lambda: run(parent, name, manifest, out, settings, dev=dev, device=device))


def _layers(text: str) -> list[int] | None:
    """``0-2,5`` as [0, 1, 2, 5], ``all`` as None."""
    from asrkit.errors import UserError

    if text == "all":
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(f"--layers {text}: write all, a range such as 0-5, or block numbers such as 0,2,4")
        numbers += range(int(first), int(last) + 1)
    return numbers
