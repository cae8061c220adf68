"""train-backbone and the other training stages."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

SubModelKind = StrEnum("SubModelKind", ["attention", "adapter"])
Place = StrEnum("Place", ["serial", "parallel"])

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a setting: key.subkey=value. Repeatable.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the training commands."""
    app.command("train-backbone")(train_backbone)
    app.command("add-submodel")(add_submodel)


def train_backbone(
    manifest: Annotated[Path, typer.Option(help="Cuts to train on: .jsonl, .jsonl.gz or a Shar directory.")],
    out: Annotated[Path, typer.Option(help="Run directory; repeated with the same settings, the run goes on.")],
    dev: Annotated[Path | None, typer.Option(help="Cuts whose WER chooses the best weights.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="sentencepiece model; left out, one is trained.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=N.")] = None,
    max_duration: Annotated[
        float | None,
        typer.Option(help="Seconds of audio a step and process; short for --set data.max_duration=N."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a convolutional backbone with a transducer and a CTC head.

    Example:

        asrkit train-backbone --manifest data/prompts/train.jsonl.gz --dev data/prompts/dev.jsonl.gz \\
            --out exp/backbone --set model.size=tiny --set training.steps=2000

    Several processes: torchrun --nproc_per_node 2 -m asrkit train-backbone ... The run directory holds config.yaml
    with every setting; settings come from the defaults, then --config, then --set. Killed or interrupted, the same
    command goes on from the last saved step.
    """
    from asrkit.config import resolve
    from asrkit.stages.train_backbone import TrainBackboneConfig
    from asrkit.stages.train_backbone import train_backbone as run
    from asrkit.training.loop import Interrupted

    changes = changes_of(overrides, {"seed": seed, "data.max_duration": max_duration})
    try:
        run(
            manifest,
            out,
            resolve(TrainBackboneConfig, config, changes),
            dev=dev,
            tokenizer=tokenizer,
            device=device,
        )
    except Interrupted as stop:
        raise stopped(out, stop.code) from None


def add_submodel(
    parent: Annotated[Path, typer.Option("--from", help="Run directory of the model to add to.")],
    name: Annotated[str, typer.Option(help="Of the sub-model, and of the configuration that has it.")],
    manifest: Annotated[Path, typer.Option(help="Cuts to train on: .jsonl, .jsonl.gz or a Shar directory.")],
    out: Annotated[Path, typer.Option(help="Run directory; repeated with the same settings, the run goes on.")],
    kind: Annotated[SubModelKind | None, typer.Option(help="What to add. [default: attention]")] = None,
    layers: Annotated[
        str | None, typer.Option(help="all, or numbers from 0 on: 0-5 or 0,2,4. [default: all]", show_default=False)
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="full, or left=64,chunk=16 (frames of 40 ms). [default: full]")
    ] = None,
    place: Annotated[Place | None, typer.Option(help="To the convolution. [default: serial]")] = None,
    init: Annotated[
        str | None, typer.Option(help="noop, random, or a sub-model to copy, such as joint. [default: noop]")
    ] = None,
    on: Annotated[
        list[str] | None, typer.Option(help="Sub-model that stays active, frozen, beneath it. Repeatable.")
    ] = None,
    dev: Annotated[Path | None, typer.Option(help="Cuts whose WER chooses the best weights.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=N.")] = None,
    max_duration: Annotated[
        float | None,
        typer.Option(help="Seconds of audio a step and process; short for --set data.max_duration=N."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train attention, or an adapter, on top of a frozen model: another operating point in the same checkpoint.

    Examples:

        asrkit add-submodel --from exp/backbone --name attention --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --out exp/attention

        asrkit add-submodel --from exp/attention --name near --layers 0-2 --context left=64,chunk=16 \\
            --manifest data/prompts/train.jsonl.gz --out exp/near

    Everything that was in the model stays as it was, bit for bit, and so do the results of its configurations; the
    options --kind to --on are short for --set submodel.kind=... and on=[...].
    """
    from asrkit.config import resolve
    from asrkit.stages.add_submodel import AddSubModelConfig
    from asrkit.stages.add_submodel import add_submodel as run
    from asrkit.training.loop import Interrupted

    given = {
        "submodel.kind": kind and kind.value,
        "submodel.context": context,
        "submodel.place": place and place.value,
        "submodel.init": init,
        "on": f"[{','.join(on)}]" if on else None,
        "seed": seed,
        "data.max_duration": max_duration,
    }
    if layers is not None:
        given["submodel.layers"] = _layers(layers)
    try:
        run(
            parent,
            name,
            manifest,
            out,
            resolve(AddSubModelConfig, config, changes_of(overrides, given)),
            dev=dev,
            device=device,
        )
    except Interrupted as stop:
        raise stopped(out, stop.code) from None


def changes_of(overrides: list[str] | None, given: Mapping[str, object]) -> list[str]:
    """Every --set, and the options that are short for one."""
    return [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value is not None)]


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


def stopped(out: Path, code: int) -> typer.Exit:
    typer.echo(f"stopped; the state is saved, the same command goes on from it ({out})", err=True)
    return typer.Exit(code)
