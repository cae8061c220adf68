"""export."""

from __future__ import annotations

import json
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from asrkit.cli.domain import GraphChoice, domain_options
from asrkit.cli.fusion import FusionOptions, LmScale, LodrScale, Tuned
from asrkit.cli.options import io

if TYPE_CHECKING:
    from asrkit.export.directory import Exported

# The keys of asrkit.stages.export.QUANTIZED and of asrkit.export.directory.SUFFIXES, which would import torch here.
Quantize = StrEnum("Quantize", ["int8", "int4", "int2", "dynamic"])
Format = StrEnum("Format", ["onnx", "torchscript"])


of_model = partial(typer.Option, rich_help_panel="Model")
of_file = partial(typer.Option, rich_help_panel="File format")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(  # long: a parameter for each option
    run: Annotated[Path, io("--from", help="Run directory of any stage.", show_default=False)],
    out: Annotated[Path, io(help="Directory to create; it must not exist or must be empty.", show_default=False)],
    pack: Annotated[Path | None, io(help="Also write the directory as this .tar file.")] = None,
    report: Annotated[
        Path | None,
        io(
            help="Cuts to measure on: WER of the export, of the float model and of each part's integers; speed; memory."
        ),
    ] = None,
    variant: Annotated[
        str | None, of_model(help="Variant to export; `asrkit info` lists them and names the default.")
    ] = None,
    streaming: Annotated[
        bool, of_model("--streaming", help="Export for live audio, which comes chunk by chunk.")
    ] = False,
    chunk: Annotated[
        int | None,
        of_model(
            min=1, help="With --streaming: frames of 40 ms per chunk. [default: the first streaming context trained]"
        ),
    ] = None,
    left: Annotated[
        int | None,
        of_model(
            min=0,
            help="With --streaming: frames before the chunk that attention sees. [default: as trained with that chunk]",
        ),
    ] = None,
    language: Annotated[
        str | None,
        of_model(help="Language the files recognize, of a model with a language input.", show_default=False),
    ] = None,
    graph: Annotated[
        Path | None, of_model(help="Decoding graph for CTC, made by `asrkit graph`, for sherpa-onnx to search.")
    ] = None,
    graph_scale: Annotated[float, of_model(min=0.0, help="Weight of the language model in the graph.")] = 1.0,
    lm: Annotated[
        Path | None,
        io(
            "--lm",
            help="Network of train-lm for sherpa-onnx's beam search, written as lm.onnx; with --streaming an LSTM.",
        ),
    ] = None,
    lm_scale: LmScale = None,
    lodr: Annotated[
        Path | None, io("--lodr", help="Low-order n-gram that sherpa-onnx subtracts beside --lm, written as lodr.fst.")
    ] = None,
    lodr_scale: LodrScale = None,
    tuned: Tuned = None,
    format: Annotated[
        Format, of_file(help="onnx, for sherpa-onnx, or torchscript, for libtorch, in float32.")
    ] = Format.onnx,
    quantize: Annotated[
        Quantize | None,
        of_file(help="Turn float weights into integers without training; dynamic is 8 bits with integer inputs too."),
    ] = None,
    dequantize: Annotated[
        bool, of_file("--dequantize", help="Write integer weights as float32, for runtimes without integer kernels.")
    ] = False,
    license: Annotated[str | None, of_file(help="License of the model, for its README: an SPDX name.")] = None,
) -> None:
    """Write a model as ONNX files that sherpa-onnx loads as they are.

    Examples:

        asrkit export --from exp/near --variant backbone --out exp/onnx

        asrkit export --from exp/near --streaming --chunk 16 --left 64 --out exp/onnx-streaming

        asrkit export --from exp/near --lm exp/lm-bpe --lm-scale 0.3 --out exp/onnx-lm

        asrkit export --from exp/sparse-int4 --report data/prompts/test.jsonl.gz --pack model.tar --out exp/onnx-int4

        asrkit export --from exp/backbone --graph exp/hlg --graph-scale 0.5 --out exp/onnx-graph

    The directory holds a transducer (encoder, decoder, joiner), the same encoder with CTC, tokens.txt, README.md with the
    commands that run them, and export.yaml. The integers and masks are the trained ones. Nothing is written unless
    onnxruntime computes the same as torch. `asrkit evaluate` and `asrkit transcribe` also run the exported directory.
    """
    from asrkit.stages.export import export as run_export

    options = FusionOptions(lm=lm, lm_scale=lm_scale, lodr=lodr, lodr_scale=lodr_scale)
    beam, domain = domain_options(tuned, None, options, GraphChoice(), False)
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
        graph=graph,
        graph_scale=graph_scale,
        fusion=domain.fusion,
        beam=beam,
        warn=lambda line: typer.echo(f"warning: {line}", err=True),
    )
    _print(exported, out, None if report is None else json.loads((directory / "report.json").read_text()))
    if pack is not None:
        typer.echo(f"packed: {pack}")


def _print(exported: Exported, out: Path, report: dict[str, Any] | None) -> None:
    """What is in the directory, how exact it is, and what ``report`` measured."""
    from asrkit.reporting.tables import percent

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
        for name, rates in report["systems"].items():
            greedy, beam = (percent(rates[method]["wer"]) for method in ("greedy", "beam"))
            typer.echo(f"WER {greedy} % greedy, {beam} % beam  {name}")
        speed = report["speed"]
        typer.echo(f"real-time factor {speed['real_time_factor']:.4f}, {speed['peak_memory_mb']:.0f} MB, 1 thread")
    typer.echo(f"checked on: {'; '.join(exported.parity.heard)}")
    for method, search in exported.parity.tokens.items():
        same = "all the same" if not search.differing else f"{search.differing} differ, tipped by rounded inputs"
        typer.echo(f"{search.tokens} tokens by {method}, {same}")
    typer.echo(f"commands to run it: {out / 'README.md'}")
