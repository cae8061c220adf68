"""export: a run directory's model as files that sherpa-onnx loads as they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from lhotse.cut import Cut

from asrkit.config import to_dict
from asrkit.data.checks import decodable_cuts
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.choice import ContextChoice, export_context
from asrkit.decoding.export_check import check_export, recordings_of
from asrkit.decoding.export_report import measure_export
from asrkit.decoding.exported import ExportedAcousticModel
from asrkit.decoding.fusion import FusionConfig, FusionRequest, load_fusion
from asrkit.disk import atomic_directory, atomic_write, occupied, sha256_of
from asrkit.errors import UserError
from asrkit.export.directory import Exported, Format, LmRecord, finished_without_pack, pack_directory
from asrkit.export.graphs import StateLayout
from asrkit.export.layers import active_layers, quantized, silence
from asrkit.export.lm import LmPlan, cannot_take
from asrkit.export.runtime import ExportedModel
from asrkit.export.writer import ExportOptions, ExportPlan, write_card, write_files, write_record
from asrkit.extras import require
from asrkit.models import load_model
from asrkit.models.ctc_graph import load_graph
from asrkit.models.lm import LanguageModel
from asrkit.models.surgery import in_language, in_variant
from asrkit.nn.context import parse_context
from asrkit.run_dir import WEIGHTS, RunDir, open_run

LARGE_STATE = 500_000  # numbers; copying a million takes 5 ms


def export(
    run_path: Path,
    out: Path,
    *,
    variant: str | None = None,
    streaming: bool = False,
    chunk: int | None = None,
    left: int | None = None,
    language: str | None = None,
    quantize: str | None = None,
    dequantize: bool = False,
    format: Format = "onnx",
    report: Path | None = None,
    pack: Path | None = None,
    license: str | None = None,
    graph: Path | None = None,
    graph_scale: float = 1.0,
    fusion: FusionRequest | None = None,
    beam: int = 4,
    warn: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the exported directory ``out``, after the check that it computes what the model does.

    Args:
        variant: the active sub-models; None is the one the last stage trained.
        streaming: in the context of ``chunk`` and ``left``; None is the first streaming one it was trained in.
        language: the one the files recognize, of a model with languages; its vector becomes a part of them.
        quantize: a key of QUANTIZED, for a model whose weights are float.
        dequantize: integer weights become the float32 numbers they stand for, masks zeros in dense weights.
        report: cuts to measure the WER on: of the files, of the float model, and of each part quantized alone.
        pack: also write the directory as this .tar, which appears after it; after a kill between the two the same call completes it.
        license: of the model, for its card; an SPDX name.
        graph: the directory of a decoding graph, which the client searches CTC over; graph_scale: its weight.
        fusion: language models for the client's beam search, of ``beam`` hypotheses.
        warn: is given a line where the model will run in a way it was not trained for, and for what could not be checked.

    Raises:
        UserError: the run directory cannot be exported so, ``out`` is taken, or the check fails; nothing is left.
    """
    for package in ("onnx", "onnxruntime", *(["kaldifst"] if graph is not None else [])):
        require(package, for_="export")
    options = ExportOptions(
        variant,
        streaming,
        chunk,
        left,
        language,
        quantize,
        dequantize,
        format,
        None if report is None else str(report),
        license,
        None if graph is None else str(graph),
        graph_scale,
        None if fusion is None else {**to_dict(fusion), "beam": beam},
    )
    run = open_run(run_path)
    for line in run.unfinished:
        warn(line)
    weights_sha256 = sha256_of(run.path / WEIGHTS)
    findings = options.refusals(out, pack)
    if pack is not None and not findings and (done := finished_without_pack(out, asdict(options), weights_sha256)):
        with atomic_write(pack) as packed:
            pack_directory(out, packed, pack, out.absolute().name)
        return done
    plan, cuts = _plan(run, weights_sha256, options, [*occupied(out), *findings], warn, fusion)
    with nullcontext() if pack is None else atomic_write(pack) as packed:  # comes last: see finished_without_pack
        if packed is not None:
            packed.touch()  # a path that cannot be written is reported before the work
        with atomic_directory(out) as directory:
            exported = _write(plan, cuts, directory, warn)
            if pack is not None and packed is not None:
                pack_directory(directory, packed, pack, out.absolute().name)
    return exported


def _plan(
    run: RunDir,
    weights_sha256: str,
    options: ExportOptions,
    findings: list[str],
    warn: Callable[[str], None],
    fusion: FusionRequest | None,
) -> tuple[ExportPlan, list[Cut] | None]:
    """Check everything, ``findings`` being known already; decide what goes into the files, and read the cuts to measure on."""
    model = load_model(run)
    name = options.variant or model.spec.variant
    if name not in model.spec.variants:
        findings.append(f"{run.path}: no variant {name}; there are {', '.join(model.spec.variants)}")
    try:
        model = in_language(model, options.language)
    except UserError as error:
        findings += error.lines
    cuts = None
    if options.report is not None:
        try:
            cuts = list(decodable_cuts(Path(options.report), [options.language] if options.language else [])[0])
        except UserError as error:
            findings += error.lines
    tokenizer, graph = Tokenizer.load(run.tokenizer_path), None
    if options.graph is not None:
        try:
            graph, _ = load_graph(Path(options.graph), tokenizer)
        except UserError as error:
            findings += error.lines
    lm = None
    if fusion is not None:
        try:
            lm = _language_models(fusion, run, options, warn)
        except UserError as error:
            findings += error.lines
    if findings:
        raise UserError.of(findings)
    model = in_variant(model, name)  # with the masks and integers that are on in it, and no others
    trained = [parse_context(text) for text in model.spec.variants[name].contexts]
    submodels = model.submodels_of(name)
    attends = any(model.spec.submodels[part].kind == "attention" for part in submodels)
    choice = ContextChoice(chunk=options.chunk, left=options.left, streaming=options.streaming)
    context = export_context(trained, attends, choice, f"{run.path}: variant {name}", warn)
    if options.quantize is not None:
        model = quantized(model, options.quantize, submodels, warn)
    silence(model, tokenizer.special_ids)
    layers = active_layers(model, submodels)
    if options.dense and any(layer.how.activations is not None for layer in layers.values()):
        raise UserError(
            f"{run.path}: has layers with integer inputs, which only ONNX integers can express; drop --format and --dequantize"
        )
    if options.dequantize and not layers:
        raise UserError(f"--dequantize: variant {name} of {run.path} is float32 without masks; drop it")
    state_size = StateLayout(model, submodels, context.left).size if context.streaming else 0
    if state_size > LARGE_STATE:
        warn(
            f"a stream's state has {state_size:,} numbers, and the runtime copies it at every chunk, which is slow above "
            f"{LARGE_STATE:,}; a smaller --left or fewer sub-models make it smaller"
        )
    written = {} if options.dense else layers
    plan = ExportPlan(run, weights_sha256, options, model, name, context, layers, written, state_size, graph, lm)
    return plan, cuts


def _language_models(
    request: FusionRequest, run: RunDir, options: ExportOptions, warn: Callable[[str], None]
) -> LmPlan:
    """What the client decodes with; ``warn`` is given a line for what else counts in the search here.

    Raises:
        UserError: a language model cannot be read, is not of the run's tokens, or the client cannot take it.
    """
    if request.method == "ctc-graph":
        raise UserError("--decoding: was tuned for a graph; give its --graph and --graph-scale instead")
    if request.lm is None:
        raise UserError("--lodr, --decoding: are exported only with a language model; add --lm")
    if request.method != "beam":
        raise UserError(
            f"--decoding: was tuned for --method {request.method}, and the client's language model is for the transducer; "
            "tune with --method beam"
        )
    if findings := request.other_recognizer(sha256_of(run.path / WEIGHTS)):
        raise UserError.of(findings)
    usual = FusionConfig()
    others = ("blank_penalty", "length_bonus", "temperature", *(["hotwords_score"] if request.hotwords else []))
    lost = {name: value for name in others if (value := getattr(request.settings, name)) != getattr(usual, name)}
    if lost or request.hotwords:
        listed = ", ".join(
            ["hotwords"] * bool(request.hotwords) + [f"{name} {value:g}" for name, value in lost.items()]
        )
        warn(f"--decoding: {listed}: not exported; sherpa-onnx takes it as an argument, or has no such setting")
    use: Literal["fusion", "rescore"] = "fusion" if options.streaming else "rescore"
    if request.tuned_with is not None and request.settings.lm_use != use:
        warn(
            f"--decoding: lm_scale {request.settings.lm_scale:g} was tuned for {request.settings.lm_use}, and the client uses the language model for "
            f"{use}; tune {'without' if options.streaming else 'with'} --lm-rescore"
        )
    fusion = load_fusion(request, Tokenizer.load(run.tokenizer_path), torch.device("cpu"))
    lm, lodr = (getattr(part, "model", None) for part in (fusion.lm, fusion.lodr))
    if findings := cannot_take(lm, lodr, options.streaming):
        raise UserError.of(findings)
    assert isinstance(lm, LanguageModel) and options.lm is not None
    record = LmRecord(
        sources={name: dict(source) for name, source in fusion.sources.items()},
        lm_scale=request.settings.lm_scale,
        lodr_scale=request.settings.lodr_scale,
        beam=options.lm["beam"],
        uses_lm=use,
    )
    return LmPlan(lm, lodr, record)


def _write(plan: ExportPlan, cuts: list[Cut] | None, directory: Path, warn: Callable[[str], None]) -> Exported:
    """Write every file into ``directory``, check that they compute what the model does, and measure them on ``cuts``."""
    tensors = write_files(plan, directory)
    original = TorchAcousticModel(plan.model, plan.variant, plan.context)
    files = ExportedAcousticModel(
        ExportedModel(directory, plan.state_size, plan.options.format),
        plan.context,
        original.vocab_size,
        original.context_size,
    )
    tokenizer = Tokenizer.load(plan.run.tokenizer_path)
    recordings = recordings_of(plan.run, warn)
    parity = check_export(original, files, recordings, plan.layers, plan.written, tokenizer.special_ids)
    exported = write_record(plan, directory, tensors, parity)
    measured = None
    if cuts is not None:
        measured = {"manifest": plan.options.report, **measure_export(directory, original, files, tokenizer, cuts)}
    write_card(directory, exported, measured)
    return exported
