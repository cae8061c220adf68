"""export: a run directory's model as files that sherpa-onnx loads as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut

from asrkit import __version__
from asrkit.config import to_dict
from asrkit.data.batch import Batch, evaluation_batches
from asrkit.data.checks import decodable_cuts
from asrkit.data.manifests import open_cuts
from asrkit.data.shar import shards_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import AcousticModel, TorchAcousticModel
from asrkit.decoding.choice import ContextChoice, listed, was_trained
from asrkit.decoding.evaluation import measure_wer
from asrkit.decoding.exported import ExportedAcousticModel
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.search import Method, search
from asrkit.decoding.speed import measure_speed
from asrkit.errors import UserError
from asrkit.export.directory import (
    README,
    REPORT,
    SUFFIXES,
    Exported,
    FileRecord,
    Format,
    ParityRecord,
    PartRecord,
    RunRecord,
    TokenRecord,
    pack_directory,
)
from asrkit.export.graphs import CTC, ENCODER, StateLayout, graphs
from asrkit.export.integers import OPSET
from asrkit.export.onnx_file import GRAPH, write_onnx
from asrkit.export.parity import (
    Differences,
    compare_layers,
    compare_offline,
    compare_predictor_and_joiner,
    compare_streaming,
    random_log_mel,
    streaming_frames,
)
from asrkit.export.readme import describe
from asrkit.export.runtime import ExportedModel
from asrkit.export.script import write_script
from asrkit.extras import require
from asrkit.models import AsrModel, load_model
from asrkit.models.asr import in_language
from asrkit.models.compression import LayerChoice, QuantizationConfig, choose_layers, compressed_layers, quantized_spec
from asrkit.models.sizes import part_of, sizes
from asrkit.models.surgery import dequantized_model, rebuilt, recompressed
from asrkit.nn.compression import ActivationQuantization, CompressedLinear, WeightQuantization
from asrkit.nn.context import FULL, Context, parse_context
from asrkit.reporting.machine import processor
from asrkit.reporting.wer import ErrorCounts, align, count
from asrkit.run_dir import (
    EXPORT,
    TOKENIZER,
    TOKENS,
    WEIGHTS,
    RunDir,
    atomic_directory,
    atomic_write,
    occupied,
    open_run,
    sha256_of,
    write_yaml,
)

OFFLINE_FRAMES = 400  # feature frames of the longest random utterance
SEARCHES: tuple[Method, ...] = ("greedy", "ctc")
MAX_CUTS, MAX_SECONDS = 4, 20.0  # recordings heard in the check
LARGE_STATE = 500_000  # numbers; copying a million takes 5 ms
TWO_BITS_CLIENT = "1.13.4"  # the oldest sherpa-onnx with MatMulNBits of 2 bits

# How --quantize makes integers of a float model: ours, one setting each; `asrkit quantize` has all others.
DIVISIBLE = LayerChoice(indivisible="skip")
QUANTIZED: dict[str, QuantizationConfig] = {
    "int8": QuantizationConfig(weights=WeightQuantization(bits=8)),
    "int4": QuantizationConfig(weights=WeightQuantization(bits=4, scale="block", block_size=32), layers=DIVISIBLE),
    "int2": QuantizationConfig(
        weights=WeightQuantization(bits=2, scale="block", block_size=32, symmetric=False), layers=DIVISIBLE
    ),
    "dynamic": QuantizationConfig(
        weights=WeightQuantization(bits=8),
        activations=ActivationQuantization(bits=8, scale="onnx", rounding="half_even"),
    ),
}


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
    warn: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the exported directory ``out``, after the check that it computes what the model does.

    Args:
        variant: the active sub-models; None is the one the last stage trained.
        streaming: in the context of ``chunk`` and ``left``; None is the first streaming one it was trained in.
        language: the one the files hear, of a model with languages; its vector becomes a part of them.
        quantize: a key of QUANTIZED, for a model whose weights are float.
        dequantize: integer weights become the float32 numbers they stand for, masks zeros in dense weights.
        report: cuts to measure the WER on: of the files, of the float model, and of each part quantized alone.
        pack: a .tar of the directory besides; there are both or neither.
        license: of the model, for its card; an SPDX name.
        warn: is told where the model will run in a way it was not trained for, and what could not be checked.

    Raises:
        UserError: the run directory cannot be exported so, ``out`` is taken, or the check fails; nothing is left.
    """
    for package in ("onnx", "onnxruntime"):
        require(package, for_="export")
    run = open_run(run_path)
    model = load_model(run)
    name = variant or model.spec.variant
    findings = [
        *occupied(out),
        *_refusals(out, streaming or (chunk is None and left is None), quantize, dequantize, format, pack),
    ]
    if name not in model.spec.variants:
        findings.append(f"{run_path}: no variant {name}; there are {', '.join(model.spec.variants)}")
    try:
        model = in_language(model, language)
    except UserError as error:
        findings += error.lines
    cuts = None
    if report is not None:
        try:
            cuts = list(decodable_cuts(report, [language] if language else [])[0])
        except UserError as error:
            findings += error.lines
    if findings:
        raise UserError.of(findings)
    context = _context(run_path, model, name, streaming, chunk, left, warn)
    submodels, weights_sha256 = model.submodels_of(name), sha256_of(run.path / WEIGHTS)
    if quantize is not None:
        settings = QUANTIZED[quantize]
        wanted = len(choose_layers(model, settings.layers, submodels))
        model = rebuilt(quantized_spec(model, settings, submodels), model).eval()
        if skipped := wanted - len(active_layers(model, submodels)):
            warn(
                f"--quantize {quantize}: {skipped} of {wanted} layers stay float, as their inputs are no multiple of "
                f"{settings.weights.block_size}; asrkit quantize takes other blocks"
            )
    layers = active_layers(model, submodels)
    dense = dequantize or format == "torchscript"
    if dense and any(layer.how.activations is not None for layer in layers.values()):
        raise UserError(
            f"{run_path}: has layers with integer inputs, whose integer products are written as ONNX integers only; leave "
            "--format and --dequantize out"
        )
    if dequantize and not layers:
        raise UserError(f"--dequantize: variant {name} of {run_path} is float32 without masks; leave it out")
    plain = dequantized_model(model)
    written = {} if dense else layers
    for path in written:
        # Their numbers come later; the tracer would make one tensor of two that are equal.
        torch.nn.init.normal_(plain.get_submodule(path).weight)  # type: ignore[arg-type]
    spoken = "" if language is None else f", language {language}"
    comment = f"variant {name}, context {context}{spoken}, weights {weights_sha256}"
    planned = graphs(plain, name, context, comment)
    state_size = StateLayout(model, submodels, context.left).size if context.streaming else 0
    if state_size > LARGE_STATE:
        warn(
            f"a stream's state has {state_size:,} numbers, and the runtime copies it at every chunk, which takes longer than "
            f"need be above {LARGE_STATE:,}; a smaller --left or fewer sub-models make it smaller"
        )
    with atomic_directory(out) as temporary, nullcontext() if pack is None else atomic_write(pack) as packed:
        if packed is not None:
            packed.touch()  # that it cannot be written is found before the work
        names = [f"{graph.file}{SUFFIXES[format]}" for graph in planned]
        tensors: dict[str, dict[str, int]] = {}
        for file, graph in zip(names, planned, strict=True):
            if format == "onnx":
                tensors[file] = write_onnx(graph, temporary / file, written)
            else:
                write_script(graph, temporary / file)
        Tokenizer.load(run.tokenizer_path).copy_to(temporary / TOKENIZER)
        original = TorchAcousticModel(model, name, context)
        files = ExportedAcousticModel(
            ExportedModel(temporary, state_size, format), context, model.vocab_size, model.context_size
        )
        parity = check(original, files, _recordings(run, warn), layers, written)
        exported = Exported(
            format=format,
            variant=name,
            submodels=list(submodels),
            context=str(context),
            language=language,
            vocab_size=model.vocab_size,
            context_size=model.context_size,
            joiner_dim=model.spec.joiner_dim,
            state_size=state_size,
            sample_rate=model.spec.features.sample_rate,
            opset=OPSET if format == "onnx" else None,
            compression=_said(layers, quantize is not None, dense),
            quantize=quantize,
            dequantized=dense and bool(layers),
            files={
                file: FileRecord(
                    bytes=(temporary / file).stat().st_size,
                    sha256=sha256_of(temporary / file),
                    tensors=tensors.get(file),
                )
                for file in (*names, TOKENS, TOKENIZER)
            },
            parts=_parts(model, tensors),
            parity=parity,
            client=TWO_BITS_CLIENT if any(map(_multiplies_two_bits, written.values())) else None,
            run=RunRecord(path=str(run_path), weights_sha256=weights_sha256, lineage=run.lineage),
            license=license,
            versions=_versions(),
        )
        write_yaml(temporary / EXPORT, to_dict(exported))
        measured = None
        if cuts is not None:
            tokenizer = Tokenizer.load(run.tokenizer_path)
            measured = {"manifest": str(report), **_measure(temporary, original, files, tokenizer, cuts)}
            (temporary / REPORT).write_text(json.dumps(measured, indent=2) + "\n")
        (temporary / README).write_text(describe(exported, measured), encoding="utf-8")
        (temporary / ".gitattributes").write_text(f"*{SUFFIXES[format]} filter=lfs diff=lfs merge=lfs -text\n")
        if packed is not None:
            pack_directory(temporary, packed, out.absolute().name)
    return exported


def _refusals(
    out: Path, consistent: bool, quantize: str | None, dequantize: bool, format: Format, pack: Path | None
) -> list[str]:
    """What is wrong with the options themselves."""
    findings = []
    if not consistent:
        findings.append("--chunk and --left say how to stream; give --streaming too")
    if dequantize and format == "torchscript":
        findings.append("--dequantize: TorchScript is float32 anyway; leave it out")
    elif (dequantize or format == "torchscript") and quantize and QUANTIZED[quantize].activations is not None:
        without = "--dequantize" if dequantize else "--format"
        findings.append(
            f"--quantize {quantize}: makes integer inputs, which are written as ONNX integers only; leave {without} out"
        )
    if pack is not None:
        if pack.exists():
            findings.append(f"{pack}: exists; choose another --pack or remove it")
        elif out.resolve() in (pack.resolve(), *pack.resolve().parents):
            findings.append(f"{pack}: lies in --out, which it is to hold; choose another --pack")
        elif any(parent.exists() and not parent.is_dir() for parent in pack.absolute().parents):
            findings.append(f"{pack}: leads through a file; choose another --pack")
    return findings


def active_layers(model: AsrModel, submodels: Sequence[str]) -> dict[str, CompressedLinear]:
    """The masked and quantized layers of a variant."""
    return {
        path: layer
        for path, layer in compressed_layers(model).items()
        if not part_of(path).startswith("submodel ") or part_of(path).removeprefix("submodel ") in submodels
    }


def _multiplies_two_bits(layer: CompressedLinear) -> bool:
    """Whether the runtime multiplies a layer by MatMulNBits of 2 bits."""
    weights, integer_inputs = layer.how.weights, layer.how.activations is not None
    return weights is not None and weights.bits == 2 and not (integer_inputs and layer.multiplies_integers)


def _said(layers: Mapping[str, CompressedLinear], untrained: bool, dense: bool) -> str:
    """One line on what the weights are."""
    if not layers:
        return "float32"
    bits = sorted({layer.how.weights.bits for layer in layers.values() if layer.how.weights is not None})
    inputs = sorted({layer.how.activations.bits for layer in layers.values() if layer.how.activations is not None})
    kept = sum(int(layer.mask.sum()) for layer in layers.values() if layer.how.mask is not None)
    masked = sum(layer.weight.numel() for layer in layers.values() if layer.how.mask is not None)
    said = [f"{len(layers)} layers"]
    if bits:
        said.append(f"weights of {' and '.join(map(str, bits))} bits")
    if inputs:
        said.append(f"inputs of {' and '.join(map(str, inputs))} bits")
    if masked:
        said.append(f"{100 * kept / masked:.0f} % of the masked weights kept")
    if untrained:
        said.append("rounded without training")
    return ", ".join(said) + (", as dense float32" if dense else "")


def _parts(model: AsrModel, tensors: Mapping[str, Mapping[str, int]]) -> dict[str, PartRecord]:
    """What each part takes in the transducer's ONNX files (the CTC head in its own) beside what was counted."""
    stored: dict[str, int] = {}
    for file, parts in tensors.items():
        for part, size in parts.items():
            if (part == "ctc_head") == file.startswith(CTC):
                stored[part] = stored.get(part, 0) + size
    stored.pop(GRAPH, None)
    return {
        part: PartRecord(stored=stored[part], counted=counted["bytes"], float32=counted["float_bytes"])
        for part, counted in sizes(model).items()
        if part in stored
    }


def _measure(
    directory: Path, original: TorchAcousticModel, files: ExportedAcousticModel, tokenizer: Tokenizer, cuts: list[Cut]
) -> dict[str, Any]:
    """WER of the files, of the model with float weights, and of each part compressed alone; speed and memory of the files."""
    model, variant, context = original.model, original.variant, original.context
    systems: dict[str, AcousticModel] = {"exported": files}
    how = model.spec.compression
    if how:
        systems["float"] = TorchAcousticModel(recompressed(model, {}), variant, context)
        for part in dict.fromkeys(map(part_of, active_layers(model, model.submodels_of(variant)))):
            alone = {path: one for path, one in how.items() if part_of(path) == part}
            systems[f"{part} alone"] = TorchAcousticModel(recompressed(model, alone), variant, context)
    rows = {}
    for what, system in systems.items():
        found: dict[str, Any] = {}
        for method in ("greedy", "beam"):
            words, _, _ = measure_wer(system, evaluation_batches(cuts, 200.0), tokenizer, method=method)  # type: ignore[arg-type]
            found[method] = {"wer": words.rate, "errors": words.errors, "words": words.words}
        rows[what] = found
    speed = measure_speed(directory, variant, context)
    pieces = [1000 * seconds for seconds in speed.pieces]
    return {
        "systems": rows,
        "speed": {
            "real_time_factor": speed.real_time_factor,
            "peak_memory_mb": speed.memory_mb,
            "threads": 1,
            "piece_ms": {"median": float(np.median(pieces)), "99th": float(np.percentile(pieces, 99))},
            "processor": processor(),
        },
    }


def check(
    original: TorchAcousticModel,
    exported: ExportedAcousticModel,
    recordings: Batch | None,
    layers: Mapping[str, CompressedLinear],
    written: Mapping[str, CompressedLinear],
) -> ParityRecord:
    """Compare each layer of ``written``, which the files hold as it is, by itself; of the model, whose compressed ``layers``
    they imitate, every output of every file, and the tokens found, on random features and on
    ``recordings``.

    Raises:
        UserError: an output differs by more than the tolerance, or a token differs.
    """
    model, context = original.model, original.context
    variant = original.variant or model.spec.variant
    rounded = [layer.how.activations.bits for layer in layers.values() if layer.how.activations is not None]
    differences = Differences(min(rounded, default=None))
    if written:
        compare_layers(written, exported.onnx.path, differences)
    num_frames = streaming_frames(model, variant, context) if context.streaming else OFFLINE_FRAMES
    features = random_log_mel(model, num_frames)
    lens = torch.tensor([num_frames, num_frames * 2 // 3, num_frames // 4])
    if context.streaming:
        compare_streaming(model, variant, context, exported.onnx, features, differences)
    else:
        compare_offline(model, variant, exported.onnx, features, lens, differences)
    heard = {"random log-mel": (features, lens)}
    if recordings is not None:
        heard[", ".join(recordings.cut_ids)] = (recordings.features, recordings.feature_lens)
    outputs = {what: (original.encode(*batch), exported.encode(*batch)) for what, batch in heard.items()}
    for expected, found in outputs.values():
        assert expected.ctc_log_probs is not None and found.ctc_log_probs is not None
        differences.add(f"{ENCODER}: encoder_out", expected.joiner_in, found.joiner_in)
        differences.add(f"{CTC}: log_probs", expected.ctc_log_probs, found.ctc_log_probs)
    joiner_in = next(iter(outputs.values()))[0].joiner_in[0]
    compare_predictor_and_joiner(model, exported.onnx, joiner_in, differences)
    records = differences.check()
    counted: dict[str, TokenRecord] = {}
    for method in SEARCHES:
        total = ErrorCounts()
        for what, (expected, found) in outputs.items():
            pairs = zip(search(original, expected, method), search(exported, found, method), strict=True)
            errors = sum((count(align(_symbols(ours), _symbols(theirs))) for ours, theirs in pairs), ErrorCounts())
            # Inputs that round to one code in torch and to the next in the runtime tip a token that is as good as another.
            if errors.errors and not rounded:
                raise UserError(
                    f"{method}: the exported files give other tokens than torch in {what} ({errors.errors} of "
                    f"{errors.words}), though every output agrees; nothing was exported; report this with the versions of "
                    "both"
                )
            total += errors
        counted[method] = TokenRecord(tokens=total.words, differing=total.errors)
    return ParityRecord(heard=list(heard), outputs=records, tokens=counted)


def _symbols(hypothesis: Hypothesis) -> list[str]:
    return [str(token) for token in hypothesis.tokens]


def _context(
    run_path: Path,
    model: AsrModel,
    name: str,
    streaming: bool,
    chunk: int | None,
    left: int | None,
    warn: Callable[[str], None],
) -> Context:
    """The context to export in; only one the variant was trained for, or for streaming one like it."""
    trained = [parse_context(text) for text in model.spec.variants[name].contexts]
    where = f"{run_path}: variant {name}"
    if not streaming:
        if FULL not in trained:
            raise UserError(f"{where} was trained in {listed(trained)} only, not in full context; give --streaming")
        return FULL
    if not any(context.streaming for context in trained):
        raise UserError(
            f"{where} was trained in full context only, so it cannot stream: its convolutions and attention would miss "
            "the future they learned to hear; train it with --set 'contexts.train=[full,\"chunk=16,left=64\"]'"
        )
    attends = any(model.spec.submodels[part].kind == "attention" for part in model.submodels_of(name))
    context = ContextChoice(chunk=chunk, left=left, streaming=True).among(trained, attends, where)
    if not was_trained(context, trained, attends):
        warn(f"{where} was never trained in context {context}, but in {listed(trained)}; expect more errors")
    return context


def _recordings(run: RunDir, warn: Callable[[str], None]) -> Batch | None:
    """A few short cuts of the first manifest or Shar directory that is still there, of the last stages first."""
    named = dict.fromkeys(Path(name) for entry in reversed(run.lineage) for name in entry.get("manifests") or {})
    unread = []
    for path in named:
        if not shards_of(path) and not (path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file()):
            continue
        try:
            cuts = list(islice((cut for cut in open_cuts(path) if cut.duration < MAX_SECONDS), MAX_CUTS))
            if (batch := next(evaluation_batches(cuts, MAX_CUTS * MAX_SECONDS), None)) is not None:
                return batch
            unread.append(f"{path}: no cut is below {MAX_SECONDS:.0f} s")
        except Exception as error:  # audio that has moved raises whatever its reader does
            unread.append(f"{path}: {str(error).splitlines()[0]}")
    reasons = "; ".join(unread) or "none of the manifests in its lineage is here"
    warn(
        f"{run.path}: the parity check hears no recordings, only random features ({reasons}); export from the folder the "
        "lineage's paths begin in"
    )
    return None


def _versions() -> dict[str, str]:
    packages = {name: require(name, for_="export").__version__ for name in ("onnx", "onnxruntime")}
    return {"asrkit": __version__, "torch": torch.__version__, **packages}
