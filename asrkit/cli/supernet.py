"""supernet and supernet-cut."""

from __future__ import annotations

from functools import partial
from pathlib import Path
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
    Seed,
    given,
    io,
    train_or_stop,
)

members = partial(typer.Option, rich_help_panel="The two members")


def register(app: typer.Typer) -> None:
    """Add the commands that train a supernet and cut members out of it."""
    app.command("supernet")(supernet)
    app.command("supernet-cut")(supernet_cut)


def supernet(
    parent: Annotated[Path, io("--from", help="Run directory of a recognizer, or of a pretrained encoder.")],
    manifest: Manifest,
    out: Out,
    dev: Dev = None,
    variant: Annotated[
        str | None, io(help="Variant of the parent to make both members of. [default: the parent's default variant]")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        io(help="sentencepiece model, for a pretrained encoder. Without it one is trained on the manifest."),
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
    from asrkit.stages.supernet import defaults
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
    settings = resolve(SupernetConfig, config, overrides or (), defaults(parent), options=options)
    train_or_stop(out, lambda: run(parent, manifest, out, settings, dev=dev, tokenizer=tokenizer, device=device))


def supernet_cut(
    parent: Annotated[Path, io("--from", help="Run directory of a supernet.")],
    out: Annotated[Path, io(help="New run directory.")],
    sparsity: Annotated[
        str | None,
        members(
            help="Sparsity of the member, such as 0.5; or one for the layers outside of blocks, if they have masks, and one for each block, such as 0.5,0.5,0.7; 0 is the dense member."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        members(
            help="Instead, share of the float size to fit in, such as 40%: sparsities with a low loss on --dev are searched."
        ),
    ] = None,
    dev: Annotated[Path | None, io(help="Cuts to measure the loss of members on, with --budget.")] = None,
    device: Device = "auto",
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Cut one member out of a supernet, as a run by itself, without training.

    Examples:

        asrkit supernet-cut --from exp/super --sparsity 0.67 --out exp/cut

        asrkit supernet-cut --from exp/many --budget 50% --dev data/prompts/dev.jsonl.gz --out exp/half

    A member has one of the sparsities that the supernet was trained with in each block of the encoder (`members.sparsities`).
    """
    from asrkit.cli.compress import share_of
    from asrkit.config import resolve
    from asrkit.errors import UserError
    from asrkit.methods.supernet.cut import SearchConfig
    from asrkit.stages.supernet_cut import supernet_cut as run

    if (sparsity is None) == (budget is None):
        raise UserError("give either --sparsity, or --budget with --dev")
    if (budget is None) != (dev is None):
        raise UserError("--budget searches by the loss on --dev; give both, or --sparsity alone")
    settings = resolve(SearchConfig, config, overrides or ())
    chosen = None if sparsity is None else _numbers(sparsity)
    run(parent, out, settings, chosen=chosen, budget=share_of(budget), dev=dev, device=device, tell=typer.echo)
    typer.echo(f"{out}: cut out; `asrkit info {out}` shows its size, `asrkit evaluate` measures it")


def _numbers(text: str) -> list[float]:
    """``0.5,0.7`` as [0.5, 0.7]."""
    from asrkit.errors import UserError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--sparsity {text}: write a share such as 0.5, or one for each group of layers, such as 0.5,0.5,0.7"
        ) from None
