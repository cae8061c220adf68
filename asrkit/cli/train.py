"""train-backbone and the other training stages."""

from __future__ import annotations

from enum import StrEnum
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

SubModelKind = StrEnum("SubModelKind", ["attention", "adapter"])
Position = StrEnum("Position", ["serial", "parallel"])


def register(app: typer.Typer) -> None:
    """Add the training commands."""
    app.command("train-backbone")(train_backbone)
    app.command("add-submodel")(add_submodel)


def train_backbone(
    manifest: Manifest,
    out: Out,
    parent: Annotated[
        Path | None, typer.Option("--from", help="Run directory of a model to train on; left out, a new one is made.")
    ] = None,
    dev: Dev = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="sentencepiece model of a new model; left out, one is trained.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="The one to train, with --from; left out, the model's default.")
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
) -> None:
    """Train a convolutional backbone with a transducer and a CTC head, or train a model on with other data.

    Examples:

        asrkit train-backbone --manifest data/prompts/train.jsonl.gz --dev data/prompts/dev.jsonl.gz \\
            --out exp/backbone --set model.size=tiny --set training.steps=2000

        asrkit train-backbone --from exp/backbone --manifest data/mine/train.jsonl.gz \\
            --dev data/mine/dev.jsonl.gz --out exp/mine --set training.steps=500

    Several processes: torchrun --standalone --nproc_per_node 2 -m asrkit train-backbone ... The run directory holds config.yaml
    with every setting; settings come from the defaults, then --config, then --set. Killed or interrupted, the same
    command goes on from the last saved step.
    """
    from asrkit.config import resolve
    from asrkit.stages.train_backbone import TrainBackboneConfig, defaults
    from asrkit.stages.train_backbone import train_backbone as run

    changes = changes_of(overrides, {"variant": variant, "seed": seed, "data.max_duration": max_duration})
    settings = resolve(TrainBackboneConfig, config, changes, defaults(parent is not None))
    train_or_stop(out, lambda: run(manifest, out, settings, parent=parent, dev=dev, tokenizer=tokenizer, device=device))


def add_submodel(
    parent: Annotated[Path, typer.Option("--from", help="Run directory of the model to add to.")],
    name: Annotated[str, typer.Option(help="Of the sub-model, and of the variant that has it.")],
    manifest: Manifest,
    out: Out,
    kind: Annotated[SubModelKind | None, typer.Option(help="What to add. [default: attention]")] = None,
    layers: Annotated[
        str | None, typer.Option(help="all, or numbers from 0 on: 0-5 or 0,2,4. [default: all]", show_default=False)
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="full, or left=64,chunk=16 (frames of 40 ms). [default: full]")
    ] = None,
    position: Annotated[
        Position | None,
        typer.Option(
            help="Where it attaches: serial (before the convolution) or parallel (beside it). [default: serial]"
        ),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="noop, random, or a sub-model to copy, such as joint. [default: noop]")
    ] = None,
    active: Annotated[
        list[str] | None, typer.Option(help="Sub-model that stays active, frozen, beneath it. Repeatable.")
    ] = None,
    dev: Dev = None,
    config: Config = None,
    overrides: Overrides = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
) -> None:
    """Train attention, or an adapter, on top of a frozen model: another operating point in the same checkpoint.

    Examples:

        asrkit add-submodel --from exp/backbone --name attention --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --out exp/attention

        asrkit add-submodel --from exp/attention --name near --layers 0-2 --context left=64,chunk=16 \\
            --manifest data/prompts/train.jsonl.gz --out exp/near

    Everything that was in the model stays as it was, bit for bit, and so do the results of its variants; the
    options --kind to --active are short for --set submodel.kind=... and active=[...].
    """
    from asrkit.config import resolve
    from asrkit.stages.add_submodel import AddSubModelConfig
    from asrkit.stages.add_submodel import add_submodel as run

    given = {
        "submodel.kind": kind and kind.value,
        "submodel.context": context,
        "submodel.position": position and position.value,
        "submodel.init": init,
        "active": f"[{','.join(active)}]" if active else None,
        "seed": seed,
        "data.max_duration": max_duration,
    }
    if layers is not None:
        given["submodel.layers"] = _layers(layers)
    settings = resolve(AddSubModelConfig, config, changes_of(overrides, given))
    train_or_stop(out, lambda: run(parent, name, manifest, out, settings, dev=dev, device=device))


def _layers(text: str) -> str:
    """``0-2,5`` as ``[0,1,2,5]``, ``all`` as ``null``."""
    from asrkit.errors import UserError

    if text == "all":
        return "null"
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(f"--layers {text}: write all, a range such as 0-5, or numbers such as 0,2,4")
        numbers += range(int(first), int(last) + 1)
    return str(numbers)
