"""prune, quantize and qat."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

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

pruning = partial(typer.Option, rich_help_panel="Pruning")
quantization = partial(typer.Option, rich_help_panel="Quantization")

Parent = Annotated[Path, io("--from", help="Run directory of the model to compress.")]
Teacher = Annotated[
    Path | None, io(help="Run directory of a model to distill from while training; the parent is a good choice.")
]
Variant = Annotated[str | None, io(help="Variant to train. [default: the parent's default variant]")]
Bits = Annotated[int | None, quantization(help="Bits per weight: 8, 4 or 2. [default: 8]")]
ActBits = Annotated[
    int | None, quantization(help="Bits per input value of a layer: 8 or 4. Without it inputs stay float.")
]
ONLY = (
    "Part of the model to compress: encoder, submodels, joiner or ctc_head. Repeatable. [default: encoder, submodels]"
)
SPARSITY = "N:M keeps N of every M inputs; a share such as 0.67 is pruned instead."
Block = Annotated[str | None, pruning(help="Outputs x inputs pruned as one block, such as 8x1. Only with a share.")]
Shots = Annotated[int | None, pruning(help="How often the mask is computed. [default: 1]")]
FromScratch = Annotated[
    bool,
    training("--from-scratch", help="Start from new weights instead of the parent's, with its shape and tokenizer."),
]


def register(app: typer.Typer) -> None:
    """Add the commands that make a model smaller."""
    app.command("prune")(prune)
    app.command("quantize")(quantize)
    app.command("qat")(qat)


def prune(
    parent: Parent,
    manifest: Manifest,
    out: Out,
    dev: Dev = None,
    teacher: Teacher = None,
    variant: Variant = None,
    sparsity: Annotated[str | None, pruning(help=f"{SPARSITY} [default: 2:4]")] = None,
    block: Block = None,
    schedule: Annotated[
        str | None, pruning(help="How masks are computed over time: shots, iterative or cubic. [default: shots]")
    ] = None,
    shots: Shots = None,
    only: Annotated[list[str] | None, pruning(help=ONLY)] = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
    from_scratch: FromScratch = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Remove weights in a pattern, and train the rest.

    Examples:

        asrkit prune --from exp/attention --sparsity 2:4 --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --out exp/sparse

        asrkit prune --from exp/attention --sparsity 0.67 --block 8x1 --schedule iterative \\
            --set schedule.interval=100 --manifest data/prompts/train.jsonl.gz --out exp/blocks

    Masks are computed from the trained weights, once or a few times, and then never change.
    """
    from asrkit.config import resolve
    from asrkit.methods.compression import from_scratch_defaults
    from asrkit.stages.prune import PruneConfig
    from asrkit.stages.prune import prune as run

    options = given(
        {
            "mask": _mask(sparsity, block),
            "schedule.kind": schedule,
            "schedule.shots": shots,
            "layers.only": only or None,
            "from_scratch": from_scratch or None,
            "variant": variant,
            "seed": seed,
            "data.max_duration": max_duration,
        }
    )
    defaults = from_scratch_defaults(PruneConfig) if from_scratch else None
    settings = resolve(PruneConfig, config, overrides or (), defaults, options=options)
    train_or_stop(out, lambda: run(parent, manifest, out, settings, teacher=teacher, dev=dev, device=device))


def quantize(
    parent: Parent,
    out: Annotated[Path, io(help="New run directory.")],
    bits: Bits = None,
    act_bits: ActBits = None,
    only: Annotated[list[str] | None, quantization(help=ONLY)] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Post-training quantization: turn a trained model's weights into integers, without training.

    Example:

        asrkit quantize --from exp/attention --bits 8 --out exp/int8

    This is the baseline that `asrkit qat` must beat. The settings are those under `quantization` of qat.
    """
    from asrkit.config import resolve
    from asrkit.models.compression import QuantizationConfig
    from asrkit.stages.quantize import quantize as run

    options = given({"weights.bits": bits, "activations.bits": act_bits, "layers.only": only or None})
    run(parent, out, resolve(QuantizationConfig, config, overrides or (), options=options))
    typer.echo(f"{out}: quantized; `asrkit info {out}` shows its size, `asrkit evaluate` measures it")


def qat(
    parent: Parent,
    manifest: Manifest,
    out: Out,
    dev: Dev = None,
    teacher: Teacher = None,
    variant: Variant = None,
    bits: Bits = None,
    act_bits: ActBits = None,
    budget: Annotated[
        str | None, quantization(help="Share of the float size to fit in, such as 20%: bits are chosen layer by layer.")
    ] = None,
    only: Annotated[list[str] | None, quantization(help=ONLY)] = None,
    sparsity: Annotated[
        str | None, pruning(help=f"Prune in the same fine-tuning. {SPARSITY} [default: prune nothing]")
    ] = None,
    block: Block = None,
    shots: Shots = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
    from_scratch: FromScratch = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Quantization-aware training: train a model whose weights are integers, exactly as they will run.

    Examples:

        asrkit qat --from exp/attention --bits 4 --act-bits 8 --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --teacher exp/attention --out exp/int4

        asrkit qat --from exp/attention --bits 4 --sparsity 2:4 --manifest data/prompts/train.jsonl.gz --out exp/joint

        asrkit qat --from exp/sparse --bits 4 --manifest data/prompts/train.jsonl.gz --out exp/sparse-int4

        asrkit qat --from exp/attention --budget 20% --manifest data/prompts/train.jsonl.gz --out exp/mixed

    A pruned parent keeps its masks. All weights of the variant are trained, so the other variants of the checkpoint change too.
    """
    from asrkit.config import resolve
    from asrkit.errors import UserError
    from asrkit.methods.compression import from_scratch_defaults
    from asrkit.stages.qat import QatConfig
    from asrkit.stages.qat import qat as run

    if budget is not None and bits is not None:
        raise UserError("--bits and --budget: the budget chooses the bits; use one of them")
    options = given(
        {
            "quantization.weights.bits": bits,
            "quantization.activations.bits": act_bits,
            "quantization.layers.only": only or None,
            "budget": share_of(budget),
            "mask": _mask(sparsity, block),
            "schedule.shots": shots,
            "from_scratch": from_scratch or None,
            "variant": variant,
            "seed": seed,
            "data.max_duration": max_duration,
        }
    )
    defaults = from_scratch_defaults(QatConfig) if from_scratch else None
    settings = resolve(QatConfig, config, overrides or (), defaults, options=options)
    train_or_stop(out, lambda: run(parent, manifest, out, settings, teacher=teacher, dev=dev, device=device))


def share_of(text: str | None) -> float | None:
    """0.2 of ``20%`` or ``0.2``."""
    from asrkit.errors import UserError

    if text is None:
        return None
    with suppress(ValueError):
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if 0 < share <= 1:
            return share
    raise UserError(f"--budget {text}: write a share of the float size above 0 and at most 100%, such as 20%")


def _mask(sparsity: str | None, block: str | None) -> dict[str, Any] | None:
    """``2:4`` or ``0.67`` (and ``8x1``) as the setting ``mask``."""
    from asrkit.errors import UserError

    if sparsity is None:
        if block is not None:
            raise UserError(f"--block {block}: needs a share, such as --sparsity 0.67")
        return None
    keep, colon, group = sparsity.partition(":")
    if colon:
        if not (keep.isdecimal() and group.isdecimal()):
            raise UserError(f"--sparsity {sparsity}: write N:M, such as 2:4, or a share, such as 0.67")
        if block is not None:
            raise UserError(f"--block {block}: needs a share, such as --sparsity 0.67, and {sparsity} is N:M")
        return {"keep": int(keep), "group": int(group)}
    try:
        share = float(sparsity)
    except ValueError:
        raise UserError(f"--sparsity {sparsity}: write N:M, such as 2:4, or a share, such as 0.67") from None
    return {"sparsity": share, "block": block_of(block or "1x1")}


def block_of(text: str) -> list[int]:
    """``8x1`` as [8, 1]."""
    from asrkit.errors import UserError

    rows, cross, columns = text.partition("x")
    if not (cross and rows.isdecimal() and columns.isdecimal()):
        raise UserError(f"--block {text}: write outputs x inputs, such as 8x1")
    return [int(rows), int(columns)]
