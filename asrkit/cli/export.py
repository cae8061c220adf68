"""export."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

# The keys of asrkit.stages.export.QUANTIZED and of asrkit.export.directory.SUFFIXES, which would import torch here.
Quantize = StrEnum("Quantize", ["int8", "int4", "int2", "dynamic"])
Format = StrEnum("Format", ["onnx", "torchscript"])


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    run: Annotated[Path, typer.Option("--from", help="Run directory of any stage.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory to make; it must not exist, or be empty.", show_default=False)],
    variant: Annotated[
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
    language: Annotated[
        str | None, typer.Option(help="What the files hear, of a model with languages.", show_default=False)
    ] = None,
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Make integers of float weights, untrained; dynamic: 8 bits with integer inputs too."),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Integer weights as float32, for runtimes that lack them.")
    ] = False,
    format: Annotated[Format, typer.Option(help="torchscript is for libtorch, in float32.")] = Format.onnx,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Cuts to measure WER on: exported, in float, each part's integers alone; speed and memory too."
        ),
    ] = None,
    pack: Annotated[Path | None, typer.Option(help="A .tar file of the directory besides.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the model, for its card: an SPDX name.")] = None,
) -> None:
    """Write a model as ONNX files that sherpa-onnx loads as they are.

    Examples:

        asrkit export --from exp/near --variant backbone --out exp/onnx

        asrkit export --from exp/near --streaming --chunk 16 --left 64 --out exp/onnx-streaming

        asrkit export --from exp/sparse-int4 --report data/prompts/test.jsonl.gz --pack model.tar --out exp/onnx-int4

    The directory holds a transducer (encoder, decoder, joiner), the same encoder with CTC, tokens.txt, README.md with
    the commands that run them, and export.yaml. Integers and masks are those that were trained. Nothing is written unless
    onnxruntime computes what torch does. evaluate and transcribe take the directory as they take a run directory.
    """
    from asrkit.stages.export import export as run_export

    directory = out.absolute()  # --out . is replaced, and then no path begins there
    exported = run_export(
        run,
        out,
        variant=variant,
        streaming=streaming,
        chunk=chunk,
        left=left,
        language=language,
        quantize=None if quantize is None else quantize.value,
        dequantize=dequantize,
        format=cast(Any, format.value),
        report=report,
        pack=pack,
        license=license,
        warn=lambda line: typer.echo(f"warning: {line}", err=True),
    )
    typer.echo(f"variant {exported.variant}, context {exported.context}; {exported.compression}")
    for name, record in exported.files.items():
        typer.echo(f"{record.bytes:>12,} bytes  {out / name}")
    for name, part in exported.parts.items():
        typer.echo(f"{part.stored:>12,} bytes of {part.float32:,} in float32  {name}")
    for name, difference in exported.parity.outputs.items():
        typer.echo(
            f"torch against {exported.format}: {difference.max:.1e} at most, {difference.mean:.1e} on average  {name}"
        )
    if report is not None:
        measured = json.loads((directory / "report.json").read_text())
        for name, found in measured["systems"].items():
            typer.echo(
                f"WER {100 * found['greedy']['wer']:.2f} % greedy, {100 * found['beam']['wer']:.2f} % beam  {name}"
            )
        speed = measured["speed"]
        typer.echo(f"real-time factor {speed['real_time_factor']:.4f}, {speed['peak_memory_mb']:.0f} MB, 1 thread")
    typer.echo(f"heard: {'; '.join(exported.parity.heard)}")
    for method, heard in exported.parity.tokens.items():
        same = "all the same" if not heard.differing else f"{heard.differing} differ, tipped by rounded inputs"
        typer.echo(f"{heard.tokens} tokens by {method}, {same}")
    typer.echo(f"commands to run it: {out / 'README.md'}")
    if pack is not None:
        typer.echo(f"packed: {pack}")
