"""train-backbone and the other training stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a setting: key.subkey=value. Repeatable.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the training commands."""
    app.command("train-backbone")(train_backbone)


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

    changes = list(overrides or [])
    changes += [f"seed={seed}"] if seed is not None else []
    changes += [f"data.max_duration={max_duration}"] if max_duration is not None else []
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
        typer.echo(f"stopped; the state is saved, the same command goes on from it ({out})", err=True)
        raise typer.Exit(stop.code) from None
