"""An export's files, written from a plan: the graphs, the tokens, export.yaml and the model card.

The check and the measurement of what is written are decoding's (``decoding/export_check.py``, ``decoding/export_report.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from asrkit import __version__
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.export.directory import (
    ATTRIBUTES,
    BPE_VOCAB,
    README,
    REPORT,
    SUFFIXES,
    Exported,
    Format,
    ParityRecord,
    RunRecord,
    record_of,
    save_exported,
)
from asrkit.export.graphs import graphs
from asrkit.export.integers import OPSET
from asrkit.export.layers import QUANTIZED, describe_layers, multiplies_two_bits, part_records
from asrkit.export.lm import LmPlan, write_language_models
from asrkit.export.onnx_file import write_onnx
from asrkit.export.openfst import GRAPH_FST, write_graph
from asrkit.export.readme import describe
from asrkit.export.script import write_script
from asrkit.extras import require
from asrkit.models import AsrModel
from asrkit.models.ctc_graph import CtcGraph
from asrkit.models.surgery import dequantized_model
from asrkit.nn.compression import CompressedLinear
from asrkit.nn.context import Context
from asrkit.run_dir import TOKENIZER, TOKENS, RunDir

TWO_BITS_CLIENT = "1.13.4"  # the oldest sherpa-onnx with MatMulNBits of 2 bits
Tensors = dict[str, dict[str, int] | None]  # by file: bytes by part of the model; None of TorchScript


@dataclass(frozen=True)
class ExportOptions:
    """What the user asked of the files, but for where they go. ``report``: the manifest to measure on. ``graph``: the directory of a
    decoding graph for CTC, ``graph_scale``: its weight. ``lm``: the paths and scales of language models."""

    variant: str | None = None
    streaming: bool = False
    chunk: int | None = None
    left: int | None = None
    language: str | None = None
    quantize: str | None = None
    dequantize: bool = False
    format: Format = "onnx"
    report: str | None = None
    license: str | None = None
    graph: str | None = None
    graph_scale: float = 1.0
    lm: dict[str, Any] | None = None

    @property
    def dense(self) -> bool:
        """Whether integers and masks are written as the float32 weights they stand for."""
        return self.dequantize or self.format == "torchscript"

    def refusals(self, out: Path, pack: Path | None) -> list[str]:
        """What is wrong with the options themselves, whatever the model."""
        findings = []
        if not self.streaming and (self.chunk is not None or self.left is not None):
            findings.append("--chunk and --left are for streaming; give --streaming too")
        if self.graph is not None and self.format == "torchscript":
            findings.append("--graph: works with ONNX files only; drop --format")
        if not isfinite(self.graph_scale):
            findings.append(f"--graph-scale {self.graph_scale}: must be a number of 0 or more")
        if self.graph is None and self.graph_scale != 1.0:
            findings.append("--graph-scale: has no effect without --graph; add it")
        if self.dequantize and self.format == "torchscript":
            findings.append("--dequantize: TorchScript is float32 anyway; drop it")
        elif self.dense and self.quantize and QUANTIZED[self.quantize].activations is not None:
            option = "--dequantize" if self.dequantize else "--format"
            findings.append(
                f"--quantize {self.quantize}: makes integer inputs, which only ONNX integers can express; drop {option}"
            )
        if self.lm is not None and self.format != "onnx":
            findings.append("--lm: works with ONNX files only; drop --format")
        if pack is not None:
            if pack.exists():
                findings.append(f"{pack}: exists; choose another --pack or remove it")
            elif out.resolve() in (pack.resolve(), *pack.resolve().parents):
                findings.append(f"{pack}: lies in --out, which it is a copy of; choose another --pack")
            elif any(parent.exists() and not parent.is_dir() for parent in pack.absolute().parents):
                findings.append(f"{pack}: a part of its path is a file; choose another --pack")
        return findings


@dataclass(frozen=True)
class ExportPlan:
    """What goes into the files: ``model``, rounded where that was asked for, in one variant and context, and the graph.

    layers: the compressed ones of the variant. written: those that the files hold as integers and masks.
    """

    run: RunDir
    weights_sha256: str
    options: ExportOptions
    model: AsrModel
    variant: str
    context: Context
    layers: dict[str, CompressedLinear]
    written: dict[str, CompressedLinear]
    state_size: int
    graph: CtcGraph | None = None
    lm: LmPlan | None = None


def write_files(plan: ExportPlan, directory: Path) -> Tensors:
    """Write the graphs, the tokenizer and its two lists."""
    options = plan.options
    plain = dequantized_model(plan.model)
    for path in plan.written:
        # Their numbers come later; the tracer would make one tensor of two that are equal.
        torch.nn.init.normal_(plain.get_submodule(path).weight)  # type: ignore[arg-type]
    language = f", language {options.language}" if options.language else ""
    comment = f"variant {plan.variant}, context {plan.context}{language}, weights {plan.weights_sha256}"
    tensors: Tensors = {}
    for graph in graphs(plain, plan.variant, plan.context, comment):
        file = f"{graph.file}{SUFFIXES[options.format]}"
        if options.format == "onnx":
            tensors[file] = write_onnx(graph, directory / file, plan.written)
        else:
            write_script(graph, directory / file)
            tensors[file] = None
    tokenizer = Tokenizer.load(plan.run.tokenizer_path)
    tokenizer.copy_to(directory / TOKENIZER)
    tokenizer.write_scores(directory / BPE_VOCAB)
    if plan.graph is not None:
        write_graph(directory / GRAPH_FST, plan.graph, options.graph_scale)
    if plan.lm is not None:
        tensors |= dict.fromkeys(write_language_models(plan.lm, plan.context.streaming, comment, directory))
    return tensors


def write_record(plan: ExportPlan, directory: Path, tensors: Tensors, parity: ParityRecord) -> Exported:
    """Write export.yaml on the files that are there, and return what it says."""
    model, options = plan.model, plan.options
    dequantized = options.dense and bool(plan.layers)
    exported = Exported(
        format=options.format,
        variant=plan.variant,
        submodels=list(model.submodels_of(plan.variant)),
        context=str(plan.context),
        language=options.language,
        vocab_size=model.vocab_size,
        context_size=model.context_size,
        joiner_dim=model.spec.joiner_dim,
        state_size=plan.state_size,
        sample_rate=model.spec.features.sample_rate,
        opset=OPSET if options.format == "onnx" else None,
        compression=describe_layers(plan.layers, options.quantize is not None, options.dense),
        quantize=options.quantize,
        dequantized=dequantized,
        files={
            name: record_of(directory / name, tensors.get(name))
            for name in (*tensors, TOKENS, TOKENIZER, BPE_VOCAB, *([] if plan.graph is None else [GRAPH_FST]))
        },
        parts=part_records(model, {file: parts for file, parts in tensors.items() if parts is not None}),
        parity=parity,
        client=TWO_BITS_CLIENT if any(map(multiplies_two_bits, plan.written.values())) else None,
        run=RunRecord(path=str(plan.run.path), weights_sha256=plan.weights_sha256, lineage=plan.run.lineage),
        license=options.license,
        lm=None if plan.lm is None else plan.lm.record,
        versions=_versions(),
        options=asdict(options),
    )
    save_exported(directory, exported)
    return exported


def write_card(directory: Path, exported: Exported, measured: Mapping[str, Any] | None) -> None:
    """Write README.md, .gitattributes and, of what was ``measured``, report.json."""
    if measured is not None:
        (directory / REPORT).write_text(json.dumps(measured, indent=2) + "\n")
        exported.files[REPORT] = record_of(directory / REPORT)
        save_exported(directory, exported)
    (directory / README).write_text(describe(exported, measured), encoding="utf-8")
    (directory / ATTRIBUTES).write_text(f"*{SUFFIXES[exported.format]} filter=lfs diff=lfs merge=lfs -text\n")


def _versions() -> dict[str, str]:
    packages = {name: require(name, for_="export").__version__ for name in ("onnx", "onnxruntime")}
    return {"asrkit": __version__, "torch": torch.__version__, **packages}
