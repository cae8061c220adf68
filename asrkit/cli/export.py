"""export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    run: Annotated[Path, typer.Option("--from", help="Run directory of any stage.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory to make; it must not exist, or be empty.", show_default=False)],
    configuration: Annotated[
        str | None,
        typer.Option(help="Which sub-models are in the files; left out, those of the last stage."),
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="For sound as it comes in, chunk by chunk.")] = False,
    chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Encoder frames of 40 ms at once; left out, the first streaming context trained."),
    ] = None,
    left: Annotated[
        int | None,
        typer.Option(min=0, help="Frames before the chunk that attention sees; left out, as trained with that chunk."),
    ] = None,
) -> None:
    """Write a model as ONNX files that sherpa-onnx loads as they are.

    Examples:

        asrkit export --from exp/near --configuration backbone --out exp/onnx

        asrkit export --from exp/near --streaming --chunk 16 --left 64 --out exp/onnx-streaming

    The directory holds a transducer (encoder, decoder, joiner), the same encoder with CTC, tokens.txt, README.md with
    the commands that run them, and export.yaml. Nothing is written unless onnxruntime computes what torch does.
    evaluate and transcribe take the directory as they take a run directory.
    """
    from asrkit.stages.export import export as run_export

    exported = run_export(
        run,
        out,
        configuration=configuration,
        streaming=streaming,
        chunk=chunk,
        left=left,
        warn=lambda line: typer.echo(f"warning: {line}", err=True),
    )
    typer.echo(f"configuration {exported.configuration}, context {exported.context}")
    for name, record in exported.files.items():
        typer.echo(f"{record.bytes:>12,} bytes  {out / name}")
    for name, difference in exported.parity.outputs.items():
        typer.echo(f"torch against onnxruntime: {difference.max:.1e} at most, {difference.mean:.1e} on average  {name}")
    found = ", ".join(f"{count} by {method}" for method, count in exported.parity.tokens.items())
    typer.echo(f"the same tokens: {found}; commands to run it: {out / 'README.md'}")
