"""submodel list, remove, extract, attach and combine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asrkit.cli.app import App
from asrkit.cli.options import io, output

if TYPE_CHECKING:
    from asrkit.stages.submodel import Derived

From = Annotated[Path, io("--from", help="Run directory of any stage.", show_default=False)]
Out = Annotated[Path, io(help="New run directory; it must not exist or must be empty.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the group ``submodel``."""
    group = App(
        help="List, remove, extract, attach and combine sub-models. `asrkit add-submodel` trains them.",
        no_args_is_help=True,
    )
    group.command("list")(list_)
    group.command("remove")(remove)
    group.command("extract")(extract)
    group.command("attach")(attach)
    group.command("combine")(combine)
    app.add_typer(group, name="submodel")


def list_(
    run: Annotated[Path, typer.Argument(help="Run directory of any stage.")],
    as_json: Annotated[bool, output("--json", help="Print everything as JSON, for scripts.")] = False,
) -> None:
    """List the sub-models of a run, their sizes, and the variants that use them.

    Example:

        asrkit submodel list exp/near
    """
    from asrkit.stages.submodel_list import describe_submodels

    description = describe_submodels(run)
    if as_json:
        typer.echo(json.dumps(description, indent=2, ensure_ascii=False))
        return
    if description["submodels"]:
        _print_table(description["submodels"])
    else:
        typer.echo(f"{run}: no sub-models; `asrkit add-submodel` trains one")
    typer.echo(f"default variant: {description['variant']}")


def remove(
    run: From,
    name: Annotated[str, io(help="Sub-model to remove.", show_default=False)],
    out: Out,
) -> None:
    """Copy a run without one of its sub-models.

    Example:

        asrkit submodel remove --from exp/near --name attention --out exp/only-near

    The variants that used it are removed too. If one of them was the default, backbone becomes the default.
    """
    from asrkit.stages.submodel import remove_submodel

    _tell(remove_submodel(run, name, out))


def extract(
    run: From,
    name: Annotated[str, io(help="Sub-model to extract.", show_default=False)],
    out: Annotated[Path, io(help="File to write, .safetensors.", show_default=False)],
) -> None:
    """Write one sub-model to a file, to share it with others who have the same backbone.

    Example:

        asrkit submodel extract --from exp/near --name near --out near.safetensors

    The file holds its weights and shape, the variants that need no other sub-model, the contexts it was trained in, the
    digest of its backbone, and its lineage.
    """
    from asrkit.stages.submodel import extract_submodel

    _tell(extract_submodel(run, name, out))


def attach(
    run: From,
    file: Annotated[Path, io(help="File that `asrkit submodel extract` wrote.", show_default=False)],
    out: Out,
    name: Annotated[str | None, io(help="New name of the sub-model. [default: its own]")] = None,
) -> None:
    """Copy a run and add a sub-model that was extracted from another run of the same backbone.

    Example:

        asrkit submodel attach --from exp/backbone --file near.safetensors --out exp/with-near
        asrkit evaluate --from exp/with-near --variant near --manifest data/prompts/test.jsonl.gz

    A sub-model of a different backbone is refused. The default variant does not change.
    """
    from asrkit.stages.submodel import attach_submodel

    _tell(attach_submodel(run, file, out, name=name))


def combine(
    run: From,
    variant: Annotated[str, io(help="Name of the new variant.", show_default=False)],
    submodel: Annotated[
        list[str], io(help="Sub-model the variant uses, in the order they were added. Repeatable.", show_default=False)
    ],
    out: Out,
    context: Annotated[
        list[str] | None,
        io(help="full, or chunk=16,left=64 in frames of 40 ms; the first is the default one. Repeatable."),
    ] = None,
) -> None:
    """Copy a run and name a combination of its sub-models.

    Example:

        asrkit submodel combine --from exp/near --variant both --submodel attention --submodel near \\
            --context chunk=16,left=64 --out exp/both
        asrkit evaluate --from exp/both --variant both --manifest data/prompts/test.jsonl.gz

    Nothing is trained, so evaluate the result: sub-models that were not trained together may not work together. Without --context
    the variant gets the contexts that all of them were trained in. The default variant does not change.
    """
    from asrkit.stages.submodel import combine_submodels

    _tell(combine_submodels(run, variant, submodel, out, contexts=context or ()))


def _tell(derived: Derived) -> None:
    for warning in derived.warnings:
        typer.echo(f"warning: {warning}", err=True)
    for note in derived.notes:
        typer.echo(note)
    typer.echo(f"in {derived.out}")


def _print_table(submodels: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from asrkit.reporting.tables import table_console

    table = Table(
        *("name", "kind", "layers", "position", "dim", "context", "parameters", "variants"),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for part in submodels:
        table.add_row(
            *(part["name"], part["kind"], _ranges(part["layers"]), part["position"], str(part["dim"])),
            part["context"] if part["kind"] == "attention" else "-",
            f"{part['parameters']:,}",
            ", ".join(part["variants"]) or "none",
        )
    for number in (4, 6):
        table.columns[number].justify = "right"
    table_console().print(table)


def _ranges(layers: list[int]) -> str:
    """``0-2,5`` of [0, 1, 2, 5]."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
