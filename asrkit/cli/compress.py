"""quantize, qat and prune."""

from __future__ import annotations

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
    changes_of,
    train_or_stop,
)

Parent = Annotated[Path, typer.Option("--from", help="Run directory of the model to compress.")]
Bits = Annotated[int | None, typer.Option(help="Of the weights: 8, 4 or 2. [default: 8]")]
ActBits = Annotated[int | None, typer.Option(help="Of the layers' inputs: 8 or 4; left out, they stay float.")]
Only = Annotated[
    list[str] | None,
    typer.Option(help="encoder, submodels, joiner or ctc_head. Repeatable. [default: encoder and submodels]"),
]
FromScratch = Annotated[bool, typer.Option("--from-scratch", help="Begin with new weights, not with the parent's.")]
Teacher = Annotated[
    Path | None, typer.Option(help="Run directory of a model that teaches besides, such as the parent.")
]
Variant = Annotated[str | None, typer.Option(help="The one to train; left out, the parent's default.")]


def register(app: typer.Typer) -> None:
    """Add the commands that make a model smaller."""
    app.command("quantize")(quantize)
    app.command("qat")(qat)
    app.command("prune")(prune)


def quantize(
    parent: Parent,
    out: Annotated[Path, typer.Option(help="New run directory.")],
    bits: Bits = None,
    act_bits: ActBits = None,
    only: Only = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Turn a trained model's weights into integers, without training.

    Example:

        asrkit quantize --from exp/attention --bits 8 --out exp/int8

    The baseline that `asrkit qat` must beat. Settings are those under quantization of qat, such as
    --set weights.scale=block or --set layers.first=3.
    """
    from asrkit.config import resolve
    from asrkit.models.compression import QuantizationConfig
    from asrkit.stages.quantize import quantize as run

    given = _bits("", bits, act_bits, only)
    run(parent, out, resolve(QuantizationConfig, config, changes_of(overrides, given)))
    typer.echo(f"{out}: quantized; `asrkit info {out}` shows its size, `asrkit evaluate` what it costs")


def qat(
    parent: Parent,
    manifest: Manifest,
    out: Out,
    bits: Bits = None,
    act_bits: ActBits = None,
    only: Only = None,
    budget: Annotated[
        str | None, typer.Option(help="Share of the float size, such as 20%; bits are chosen layer by layer.")
    ] = None,
    from_scratch: FromScratch = False,
    teacher: Teacher = None,
    variant: Variant = None,
    dev: Dev = None,
    config: Config = None,
    overrides: Overrides = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
) -> None:
    """Train a model with integer weights, so that they are what training made of them.

    Examples:

        asrkit qat --from exp/attention --bits 4 --act-bits 8 --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --teacher exp/attention --out exp/int4

        asrkit qat --from exp/sparse --bits 4 --manifest data/prompts/train.jsonl.gz --out exp/sparse-int4

        asrkit qat --from exp/attention --budget 20% --manifest data/prompts/train.jsonl.gz --out exp/mixed

    A pruned parent's masks stay. Everything in the chosen variant learns, so other variants of the
    checkpoint are no longer what they were.
    """
    from asrkit.config import resolve
    from asrkit.errors import UserError
    from asrkit.stages.qat import QatConfig
    from asrkit.stages.qat import qat as run
    from asrkit.training.session import from_scratch_defaults

    given = _bits("quantization.", bits, act_bits, only)
    given |= {
        "budget": _share(budget),
        "from_scratch": True if from_scratch else None,
        "variant": variant,
        "seed": seed,
        "data.max_duration": max_duration,
    }
    if budget is not None and bits is not None:
        raise UserError("--bits and --budget: the budget chooses the bits; leave one out")
    defaults = from_scratch_defaults(QatConfig) if from_scratch else None
    settings = resolve(QatConfig, config, changes_of(overrides, given), defaults)
    train_or_stop(out, lambda: run(parent, manifest, out, settings, teacher=teacher, dev=dev, device=device))


def prune(
    parent: Parent,
    manifest: Manifest,
    out: Out,
    sparsity: Annotated[str | None, typer.Option(help="N:M, or a share such as 0.67. [default: 2:4]")] = None,
    block: Annotated[str | None, typer.Option(help="Outputs x inputs pruned as one, with a share: 8x1.")] = None,
    schedule: Annotated[str | None, typer.Option(help="shots, iterative or cubic. [default: shots]")] = None,
    shots: Annotated[int | None, typer.Option(help="How often masks are found. [default: 1]")] = None,
    only: Only = None,
    from_scratch: FromScratch = False,
    teacher: Teacher = None,
    variant: Variant = None,
    dev: Dev = None,
    config: Config = None,
    overrides: Overrides = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
) -> None:
    """Remove weights in a pattern, and train what is left.

    Examples:

        asrkit prune --from exp/attention --sparsity 2:4 --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --out exp/sparse

        asrkit prune --from exp/attention --sparsity 0.67 --block 8x1 --schedule iterative \\
            --set schedule.interval=100 --manifest data/prompts/train.jsonl.gz --out exp/blocks

    Masks are found in the trained weights, once or a few times, and then never change.
    """
    from asrkit.config import resolve
    from asrkit.stages.prune import PruneConfig
    from asrkit.stages.prune import prune as run
    from asrkit.training.session import from_scratch_defaults

    given: dict[str, object] = {
        "mask": _mask(sparsity, block),
        "schedule.kind": schedule,
        "schedule.shots": shots,
        "layers.only": _listed(only),
        "from_scratch": True if from_scratch else None,
        "variant": variant,
        "seed": seed,
        "data.max_duration": max_duration,
    }
    defaults = from_scratch_defaults(PruneConfig) if from_scratch else None
    settings = resolve(PruneConfig, config, changes_of(overrides, given), defaults)
    train_or_stop(out, lambda: run(parent, manifest, out, settings, teacher=teacher, dev=dev, device=device))


def _bits(prefix: str, bits: int | None, act_bits: int | None, only: list[str] | None) -> dict[str, object]:
    return {
        f"{prefix}weights.bits": bits,
        f"{prefix}activations.bits": act_bits,
        f"{prefix}layers.only": _listed(only),
    }


def _listed(words: list[str] | None) -> str | None:
    return f"[{','.join(words)}]" if words else None


def _share(text: str | None) -> float | None:
    """0.2 of ``20%`` or ``0.2``."""
    from asrkit.errors import UserError

    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UserError(f"--budget {text}: write a share of the float size, such as 20%") from None


def _mask(sparsity: str | None, block: str | None) -> str | None:
    """``2:4`` or ``0.67`` (and ``8x1``) as a YAML mapping."""
    from asrkit.errors import UserError

    if sparsity is None:
        if block is not None:
            raise UserError(f"--block {block}: goes with a share, such as --sparsity 0.67")
        return None
    keep, colon, group = sparsity.partition(":")
    if colon:
        if not (keep.isdecimal() and group.isdecimal()):
            raise UserError(f"--sparsity {sparsity}: write N:M, such as 2:4, or a share, such as 0.67")
        if block is not None:
            raise UserError(f"--block {block}: goes with a share; {sparsity} is N:M")
        return f"{{keep: {keep}, group: {group}}}"
    try:
        share = float(sparsity)
    except ValueError:
        raise UserError(f"--sparsity {sparsity}: write N:M, such as 2:4, or a share, such as 0.67") from None
    rows, cross, columns = (block or "1x1").partition("x")
    if not (cross and rows.isdecimal() and columns.isdecimal()):
        raise UserError(f"--block {block}: write outputs x inputs, such as 8x1")
    return f"{{sparsity: {share}, block: [{rows}, {columns}]}}"
