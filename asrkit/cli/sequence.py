"""sequence-train."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from asrkit.cli.options import (
    Config,
    Dev,
    Device,
    Driver,
    FetchEvery,
    GpusPerWorker,
    Manifests,
    MaxDuration,
    MaxStaleness,
    Out,
    Overrides,
    Parent,
    PushEvery,
    RayAddress,
    Seed,
    Shards,
    Staleness,
    Workers,
    given,
    io,
    replica_options,
    train_or_stop,
)

Criterion = StrEnum("Criterion", ["mwer", "sampled-mbr", "mmi", "bmmi", "smbr", "mpe"])
of_criterion = partial(typer.Option, rich_help_panel="Criterion")


def register(app: typer.Typer) -> None:
    """Add the command that trains on whole sequences."""
    app.command("sequence-train")(sequence_train)


def sequence_train(
    parent: Parent,
    manifest: Manifests,
    out: Out,
    dev: Dev = None,
    variant: Annotated[str | None, io(help="Variant to train. [default: the parent's default variant]")] = None,
    criterion: Annotated[
        Criterion | None,
        of_criterion(
            help="mwer: expected errors over hypotheses; sampled-mbr: over sampled paths; mmi, bmmi, smbr or mpe: over lattices "
            "of the CTC head, by k2. [default: mwer]"
        ),
    ] = None,
    beam: Annotated[int | None, of_criterion(help="mwer: hypotheses for each utterance. [default: 4]")] = None,
    smoothing: Annotated[
        float | None,
        of_criterion(help="Weight of the recognizer's own loss. [default: 0.01; 1 with lattices]", show_default=False),
    ] = None,
    cache: Annotated[
        bool,
        of_criterion(
            "--cache", help="Search once, before the training, and keep hypotheses or lattices in the run directory."
        ),
    ] = False,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    driver: Driver = None,
    workers: Workers = None,
    max_staleness: MaxStaleness = None,
    staleness: Staleness = None,
    fetch_every: FetchEvery = None,
    push_every: PushEvery = None,
    shards: Shards = None,
    gpus_per_worker: GpusPerWorker = None,
    ray_address: RayAddress = None,
    device: Device = "auto",
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Train a model further by a criterion on whole sequences: expected word errors (MWER), or MMI, sMBR and MPE on lattices.

    Examples:

        asrkit sequence-train --from exp/backbone --criterion mwer --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --out exp/mwer

        asrkit sequence-train --from exp/backbone --criterion smbr --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --out exp/smbr

        asrkit sequence-train --from exp/backbone --criterion mwer --workers 2 --max-staleness 4 \\
            --manifest data/prompts/train.jsonl.gz --out exp/replicas

    Start from a model that has learned what it can from the ordinary loss. It keeps its masks and integers.
    """
    from asrkit.config import resolve
    from asrkit.errors import UserError
    from asrkit.methods.sequence.config import SequenceTrainConfig
    from asrkit.stages.sequence_train import sequence_train as run

    replicas = replica_options(
        driver, workers, max_staleness, staleness, fetch_every, push_every, shards, gpus_per_worker, ray_address
    )
    options = given(
        {
            "criterion": criterion and criterion.value,
            "hypotheses.beam": beam,
            "smoothing": smoothing,
            "cache": cache or None,
            "variant": variant,
            "seed": seed,
            "data.max_duration": max_duration,
        }
    )
    settings = resolve(SequenceTrainConfig, config, overrides or (), options=options | replicas)
    if beam is not None and settings.criterion != "mwer":
        raise UserError(
            f"--beam: --criterion {settings.criterion} has no list of hypotheses; leave it out, or use mwer"
        )
    train_or_stop(out, lambda: run(parent, manifest, out, settings, dev=dev, device=device))
