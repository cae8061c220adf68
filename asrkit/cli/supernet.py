"""supernet."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from asrkit.cli.compress import block_of
from asrkit.cli.options import (
    Config,
    Dev,
    Device,
    Manifest,
    MaxDuration,
    Out,
    Overrides,
    Parent,
    Seed,
    given,
    io,
    train_or_stop,
)

members = partial(typer.Option, rich_help_panel="The two members")


def register(app: typer.Typer) -> None:
    """Add the command ``supernet``."""
    app.command("supernet")(supernet)


def supernet(
    parent: Parent,
    manifest: Manifest,
    out: Out,
    dev: Dev = None,
    variant: Annotated[
        str | None, io(help="Variant of the parent to make both members of. [default: the parent's default variant]")
    ] = None,
    sparsity: Annotated[
        float | None, members(help="Share of the weights that the sparse member leaves out. [default: 0.67]")
    ] = None,
    block: Annotated[str | None, members(help="Outputs x inputs that stay or go as one block. [default: 8x1]")] = None,
    dense: Annotated[str | None, members(help="Context of the dense member. [default: full]")] = None,
    sparse: Annotated[
        str | None,
        members(help="Context of the sparse member, in frames of 40 ms. [default: chunk=8,left=32]"),
    ] = None,
    lasso: Annotated[
        float | None,
        members(help="Strength of the decay that makes whole blocks small before they go. [default: 0, off]"),
    ] = None,
    freeze_masks: Annotated[
        bool, members("--freeze-masks", help="Keep the masks of a parent that is a supernet already.")
    ] = False,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Train one set of weights as two models: dense with full context, and sparse for streaming.

    Examples:

        asrkit supernet --from exp/backbone --sparsity 0.67 --block 8x1 --dense full --sparse chunk=8,left=32 \\
            --manifest data/prompts/train.jsonl.gz --dev data/prompts/dev.jsonl.gz --out exp/super

        asrkit evaluate --from exp/super --variant sparse --manifest data/prompts/test.jsonl.gz

        asrkit export --from exp/super --variant sparse --streaming --out exp/onnx

    Each process draws one of the two for each step. The masks of the sparse one grow during training; the dense one has none, so it
    goes on training the weights under them. The run has two variants, `dense` and `sparse`, for every other command.
    """
    from asrkit.config import resolve
    from asrkit.methods.supernet.config import SupernetConfig
    from asrkit.stages.supernet import supernet as run

    options = given(
        {
            "variant": variant,
            "sparsity": sparsity,
            "block": None if block is None else block_of(block),
            "dense": dense,
            "sparse": sparse,
            "lasso.scale": lasso,
            "freeze_masks": freeze_masks or None,
            "seed": seed,
            "data.max_duration": max_duration,
        }
    )
    settings = resolve(SupernetConfig, config, overrides or (), options=options)
    train_or_stop(out, lambda: run(parent, manifest, out, settings, dev=dev, device=device))
