"""Options that several commands share, the panels of the help, and how a training command ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from asrkit.errors import UserError


def file_named(*suffixes: str) -> Callable[[Path | None], Path | None]:
    """A callback for an option that names a file to write. `--json` takes no value in other commands; here it must not take the
    manifest after it, and replace it."""

    def check(path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() not in suffixes:
            raise UserError(f"{path}: would be written, and its name does not end in {suffixes[0]}; give one that does")
        return path

    return check


# The panels of --help, everyday options first: a panel stands where its first option does.
io = partial(typer.Option, rich_help_panel="Input and output")
training = partial(typer.Option, rich_help_panel="Training")
replicas = partial(typer.Option, rich_help_panel="Replicas")
settings = partial(typer.Option, rich_help_panel="Settings")
output = partial(typer.Option, rich_help_panel="What is printed")

Parent = Annotated[Path, io("--from", help="Run directory of the model to start from.")]
Manifest = Annotated[Path, io(help="Cuts to train on: .jsonl, .jsonl.gz or a Shar directory.")]
Dev = Annotated[Path | None, io(help="Cuts to measure WER on while training; the best weights are chosen by it.")]
Out = Annotated[Path, io(help="Run directory. Running the same command again resumes it.")]
Seed = Annotated[int | None, training(help="Seed of everything random: sets `seed`.")]
MaxDuration = Annotated[float | None, training(help="Seconds of audio per step and process: sets `data.max_duration`.")]
Device = Annotated[str, training(help="auto, cpu, cuda or cuda:N.")]

Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel="Speed",
        help="Processes that share the work. The result does not depend on their number. [default: 1; with --ray-address all of its processors]",
        show_default=False,
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        rich_help_panel="Speed",
        help="Run the processes on a Ray cluster (HOST:PORT or auto), or with Ray on this machine (local).",
    ),
]

# Options of stages whose settings have ``asynchronous``; ``replica_options`` says which settings they set.
DriverName = StrEnum("DriverName", ["auto", "serial", "simulated", "ray"])
Manifests = Annotated[
    list[Path],
    io(
        "--manifest",
        help="Cuts to train on: .jsonl, .jsonl.gz or a Shar directory. If there are several, each is the data of one replica and never leaves it.",
    ),
]
Driver = Annotated[
    DriverName | None,
    replicas(
        "--driver",
        help="ray: replicas in processes of their own; simulated: reproducible, in this process; serial. [default: ray if there are several workers]",
    ),
]
Workers = Annotated[int | None, replicas(help="Replicas that compute gradients. [default: one for each manifest]")]
MaxStaleness = Annotated[
    int | None,
    replicas(
        help="ray: updates that may be made between a replica's fetch and the use of its gradients; 0 is a barrier. [default: 4]"
    ),
]
Staleness = Annotated[int | None, replicas(help="simulated: updates by which all gradients are late. [default: 0]")]
FetchEvery = Annotated[
    int | None, replicas(help="Pushes of a replica between two fetches of the weights. [default: 1]")
]
PushEvery = Annotated[
    int | None,
    replicas(help="Batches whose gradients a replica sums for a push: sets `training.accumulate`. [default: 1]"),
]
Shards = Annotated[int | None, replicas(help="ray: server processes that share the parameters. [default: 1]")]
GpusPerWorker = Annotated[float | None, replicas(help="ray: GPUs of each replica. [default: 0]")]
RayAddress = Annotated[
    str | None,
    replicas(help="Address of a running Ray cluster, or auto. Without it Ray is started on this machine alone."),
]

Config = Annotated[Path | None, settings(help="YAML file of settings; `asrkit config` prints one to start from.")]
Overrides = Annotated[
    list[str] | None,
    settings(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting, as in training.steps=2000. Repeatable. `asrkit config STAGE --all` lists every key.",
        show_default=False,
    ),
]


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` for Typer: each parameter whose type is a dataclass of options becomes one parameter for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {
        name: kind for name, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        kinds = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=kinds[option.name]
            )
            for option in fields(groups[name])
        ]

    @wraps(command)
    def run(**values: Any) -> None:
        built = {name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**values, **built)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, by the setting they set."""
    return {key: value for key, value in options.items() if value is not None}


def replica_options(
    driver: DriverName | None,
    workers: int | None,
    max_staleness: int | None,
    staleness: int | None,
    fetch_every: int | None,
    push_every: int | None,
    shards: int | None,
    gpus_per_worker: float | None,
    ray_address: str | None,
) -> dict[str, Any]:
    """The options of replicas that were given, by the setting they set."""
    names = {
        "asynchronous.driver": driver and driver.value,
        "asynchronous.workers": workers,
        "asynchronous.max_staleness": max_staleness,
        "asynchronous.staleness": staleness,
        "asynchronous.fetch_every": fetch_every,
        "training.accumulate": push_every,
        "asynchronous.shards": shards,
        "asynchronous.gpus_per_worker": gpus_per_worker,
        "asynchronous.ray_address": ray_address,
    }
    return given(names)


def train_or_stop(out: Path, stage: Callable[[], object]) -> None:
    """Run a training stage; one that was asked to stop has saved its state and ends with the signal's exit code."""
    from asrkit.training.stopping import Interrupted

    try:
        stage()
    except Interrupted as stop:
        typer.echo(f"stopped; the state is saved: run the same command again to resume {out}", err=True)
        raise typer.Exit(stop.code) from None
