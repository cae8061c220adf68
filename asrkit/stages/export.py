"""export: a run directory's model as files that sherpa-onnx loads as they are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from asrkit import __version__
from asrkit.config import to_dict
from asrkit.data.batches import Batch, evaluation_batches
from asrkit.data.manifests import open_cuts
from asrkit.data.tokenizer import Tokenizer
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.choice import ContextChoice, listed, was_trained
from asrkit.decoding.exported import OnnxAcousticModel
from asrkit.decoding.search import Method, search
from asrkit.errors import UserError
from asrkit.export.directory import README, Exported, FileRecord, ParityRecord, RunRecord
from asrkit.export.graphs import CTC, ENCODER, FILES, StateLayout, graphs
from asrkit.export.onnx_file import OPSET, require_onnx, write_onnx
from asrkit.export.parity import (
    TOLERANCE,
    Differences,
    compare_offline,
    compare_predictor_and_joiner,
    compare_streaming,
    random_log_mel,
    streaming_frames,
)
from asrkit.export.readme import describe
from asrkit.export.runtime import OnnxModel
from asrkit.models import AsrModel, load_model
from asrkit.models.compress import scaled_back
from asrkit.nn.context import FULL, Context, parse_context
from asrkit.run_dir import EXPORT, TOKENIZER, TOKENS, WEIGHTS, RunDir, atomic_directory, open_run, sha256_of, write_yaml

OFFLINE_FRAMES = 400  # feature frames of the longest random utterance
SEARCHES: tuple[Method, ...] = ("greedy", "ctc")
MAX_CUTS, MAX_SECONDS = 4, 20.0  # recordings heard in the check


def export(
    run_path: Path,
    out: Path,
    *,
    configuration: str | None = None,
    streaming: bool = False,
    chunk: int | None = None,
    left: int | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the exported directory ``out``, after the check that it computes what the model does.

    Args:
        configuration: the active sub-models; None is the one the last stage trained.
        streaming: in the context of ``chunk`` and ``left``; None is the first streaming one it was trained in.
        warn: is told where the model will run in a way it was not trained for, and what could not be checked.

    Raises:
        UserError: the run directory cannot be exported so, ``out`` is taken, or the check fails; nothing is left.
    """
    require_onnx()
    if not streaming and (chunk is not None or left is not None):
        raise UserError("--chunk and --left say how to stream; give --streaming too")
    run = open_run(run_path)
    model = load_model(run)
    name = configuration or model.spec.configuration
    if name not in model.spec.configurations:
        raise UserError(f"{run_path}: no configuration {name}; there are {', '.join(model.spec.configurations)}")
    context = _context(run_path, model, name, streaming, chunk, left, warn)
    submodels, weights_sha256 = model.submodels_of(name), sha256_of(run.path / WEIGHTS)
    plain = model
    if model.spec.compression:
        plain = scaled_back(model)
        warn(
            f"{run_path}: {len(model.spec.compression)} layers are masked or quantised; the files hold the float32 weights their "
            "integers stand for, so they recognise the same and are as large as float files"
        )
    planned = graphs(plain, name, context, f"configuration {name}, context {context}, weights {weights_sha256}")
    state_size = StateLayout(model, submodels, context.left).size if context.streaming else 0
    with atomic_directory(out) as temporary:
        parameters = {graph.file: write_onnx(graph, temporary / graph.file) for graph in planned}
        Tokenizer.load(run.tokenizer_path).copy_to(temporary / TOKENIZER)
        parity = check(
            TorchAcousticModel(model, name, context),
            OnnxAcousticModel(OnnxModel(temporary, state_size), context, model.vocab_size, model.context_size),
            _recordings(run, warn),
        )
        exported = Exported(
            configuration=name,
            submodels=list(submodels),
            context=str(context),
            vocab_size=model.vocab_size,
            context_size=model.context_size,
            joiner_dim=model.spec.joiner_dim,
            state_size=state_size,
            sample_rate=model.spec.features.sample_rate,
            opset=OPSET,
            files={
                file: FileRecord(
                    bytes=(temporary / file).stat().st_size,
                    sha256=sha256_of(temporary / file),
                    parameters=parameters.get(file),
                )
                for file in (*FILES, TOKENS, TOKENIZER)
            },
            parity=parity,
            run=RunRecord(path=str(run_path), weights_sha256=weights_sha256, lineage=run.lineage),
            versions=_versions(),
        )
        write_yaml(temporary / EXPORT, to_dict(exported))
        (temporary / README).write_text(describe(exported), encoding="utf-8")
    return exported


def check(original: TorchAcousticModel, exported: OnnxAcousticModel, recordings: Batch | None = None) -> ParityRecord:
    """Compare every output of every file, and the tokens found, on random features and on ``recordings``.

    Raises:
        UserError: an output differs by more than the tolerance, or a token differs.
    """
    model, context = original.model, original.context
    configuration = original.configuration or model.spec.configuration
    differences = Differences()
    num_frames = streaming_frames(model, configuration, context) if context.streaming else OFFLINE_FRAMES
    features = random_log_mel(model, num_frames)
    lens = torch.tensor([num_frames, num_frames * 2 // 3, num_frames // 4])
    if context.streaming:
        compare_streaming(model, configuration, context, exported.onnx, features, differences)
    else:
        compare_offline(model, configuration, exported.onnx, features, lens, differences)
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
    tokens: dict[str, int] = {}
    for what, (expected, found) in outputs.items():
        for method in SEARCHES:
            wanted = [hypothesis.tokens for hypothesis in search(original, expected, method)]
            if wanted != [hypothesis.tokens for hypothesis in search(exported, found, method)]:
                raise UserError(
                    f"{method}: onnxruntime finds other tokens than torch in {what}, though every output agrees; "
                    "nothing was exported; report this with the versions of both"
                )
            tokens[method] = tokens.get(method, 0) + sum(map(len, wanted))
    return ParityRecord(tolerance=TOLERANCE, heard=list(heard), outputs=records, tokens=tokens)


def _context(
    run_path: Path,
    model: AsrModel,
    name: str,
    streaming: bool,
    chunk: int | None,
    left: int | None,
    warn: Callable[[str], None],
) -> Context:
    """The context to export in; only one the configuration was trained for, or for streaming one like it."""
    trained = [parse_context(text) for text in model.spec.configurations[name].contexts]
    where = f"{run_path}: configuration {name}"
    if not streaming:
        if FULL not in trained:
            raise UserError(f"{where} was trained in {listed(trained)} only, not in full context; give --streaming")
        return FULL
    if not any(context.streaming for context in trained):
        raise UserError(
            f"{where} was trained in full context only, so it cannot stream: its convolutions and attention would miss "
            "the future they learnt to hear; train it with --set 'contexts.train=[full,\"chunk=16,left=64\"]'"
        )
    attends = any(model.spec.submodels[part].kind == "attention" for part in model.submodels_of(name))
    context = ContextChoice(chunk=chunk, left=left, streaming=True).among(trained, attends, where)
    if not was_trained(context, trained, attends):
        warn(f"{where} was never trained in context {context}, but in {listed(trained)}; expect more errors")
    return context


def _recordings(run: RunDir, warn: Callable[[str], None]) -> Batch | None:
    """A few short cuts of the first of the run's manifests that is still there."""
    for path in map(Path, run.lineage[-1].get("manifests") or {}):
        if path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file():
            try:
                cuts = list(islice((cut for cut in open_cuts(path) if cut.duration < MAX_SECONDS), MAX_CUTS))
                return next(evaluation_batches(cuts, MAX_CUTS * MAX_SECONDS), None)
            except Exception as error:  # audio that has moved raises whatever its reader does
                warn(f"{path}: its recordings are not heard in the parity check ({str(error).splitlines()[0]})")
    return None


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    return {
        "asrkit": __version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
