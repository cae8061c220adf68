"""export on run directories of real, untrained models: what is in the files, and what sherpa-onnx makes of them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet
from torch.nn.functional import pad

from asrkit.config import from_dict
from asrkit.data.features import fbank
from asrkit.data.manifests import digest_of, make_cut, open_cuts, write_cuts
from asrkit.data.text.tokenizer import UNK_ID, Tokenizer
from asrkit.decoding.acoustic import EncoderOutput, TorchAcousticModel
from asrkit.decoding.choice import ContextChoice
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.recognizer import load_recognizer
from asrkit.decoding.search import METHODS, Method, search
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.models import AsrModel, ModelSpec, load_model
from asrkit.models.compression import QuantizationConfig
from asrkit.models.sizes import part_of
from asrkit.nn.compression_config import ActivationQuantization, WeightQuantization
from asrkit.nn.context import Context, visible
from asrkit.run_dir import LINEAGE, TOKENIZER, WEIGHTS, open_run, read_yaml, write_yaml
from asrkit.stages.evaluate import evaluate
from asrkit.stages.quantize import quantize
from asrkit.stages.transcribe import transcribe, transcribe_stream
from asrkit.training.checkpoint import save_weights
from asrkit.training.claim import known_inputs
from asrkit.training.run_writer import stage_entry
from helpers.commands import asrkit, finish, launched
from helpers.sherpa_client import client
from helpers.small_runs import TEXTS, noise, write_run

pytest.importorskip("onnx", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")

import onnx
from onnx import numpy_helper

from asrkit.export import writer
from asrkit.export.directory import (
    CTC,
    DECODER,
    ENCODER,
    FILES,
    JOINER,
    SUFFIXES,
    Exported,
    open_exported,
    save_exported,
)
from asrkit.export.graphs import StateLayout
from asrkit.export.layers import SILENT
from asrkit.export.parity import random_log_mel
from asrkit.export.readme import tail_seconds
from asrkit.stages.export import export

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
# `near` has chunks of its own, of another size than those the model streams in.
SPEC: dict[str, Any] = {
    "encoder": {
        "dim": 16,
        "num_layers": 2,
        "feedforward_dim": 16,
        "kernel_size": 5,
        "subsampling_channels": [2, 4],
        "norms": "per_mode",
    },
    "submodels": {
        "near": {"kind": "attention", "layers": [0, 1], "dim": 16, "heads": 2, "context": "chunk=6,left=5"},
        "wide": {"kind": "attention", "layers": [1], "dim": 8, "heads": 2, "position": "parallel"},
        "thin": {"kind": "adapter", "layers": [0], "dim": 4},
    },
    "variants": {
        "backbone": {"submodels": [], "contexts": ["full", "chunk=4,left=0"]},
        "near": {"submodels": ["near"], "contexts": ["chunk=16,left=64", "chunk=4,left=8"]},
        "wide": {"submodels": ["wide"], "contexts": ["full"]},
        "all": {"submodels": ["near", "wide", "thin"], "contexts": ["full", "chunk=4,left=9"]},
    },
    "variant": "near",
}
SECONDS = (2.3, 0.7, 3.1)
STREAM = Context(4, 9)
TAIL = tail_seconds(4)
SPECIAL = (0, UNK_ID)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every weight is its own, and every search finds a lot."""
    path = write_run(tmp_path_factory.mktemp("exp") / "run", SPEC)
    model = load_model(open_run(path))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.ctc_head.weight.mul_(3.0)
        features = random_log_mel(model, 200)
        usual = model.encode(features, torch.tensor([200] * len(features)), "all")[0].mean(dim=(0, 1))
        model.ctc_head.bias.copy_(-(model.ctc_head.weight @ usual))
    save_weights(path / WEIGHTS, model)
    entry = read_yaml(path / LINEAGE)[-1] | {"weights_sha256": sha256_of(path / WEIGHTS)}
    write_yaml(path / LINEAGE, [entry])
    return path


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Recordings of unequal lengths, as 16-bit files."""
    folder, random = tmp_path_factory.mktemp("audio"), np.random.default_rng(11)
    paths = [folder / f"{number}.wav" for number in range(len(SECONDS))]
    for path, seconds in zip(paths, SECONDS, strict=True):
        soundfile.write(path, noise(random, round(seconds * 16000)), 16000)
    return paths


@pytest.fixture(scope="module")
def offline(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "offline"
    export(run, out, variant="all")
    return out


@pytest.fixture(scope="module")
def streaming(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "streaming"
    export(run, out, variant="all", streaming=True)
    return out


@pytest.fixture(scope="module")
def manifest(audio: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "test.jsonl.gz"
    cuts = [
        make_cut(
            f"cut-{number}", file, sampling_rate=16000, num_samples=soundfile.info(file).frames, text=TEXTS[number]
        )
        for number, file in enumerate(audio)
    ]
    write_cuts(path, cuts)
    return path


def initializers(path: Path) -> dict[str, torch.Tensor]:
    """The tensors stored in an ONNX file."""
    stored = onnx.load(path).graph.initializer
    return {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in stored}


# What is written


@pytest.mark.slow
def test_the_directory_is_complete_and_knows_itself(run: Path, offline: Path, streaming: Path) -> None:
    names = [
        *(f"{file}.onnx" for file in FILES),
        ".gitattributes",
        "README.md",
        "bpe.vocab",
        "export.yaml",
        "tokenizer.model",
        "tokens.txt",
    ]
    for path in (offline, streaming):
        assert sorted(file.name for file in path.iterdir()) == sorted(names)
        exported = open_exported(path)
        assert exported.variant == "all" and exported.submodels == ["near", "wide", "thin"]
        assert exported.run.weights_sha256 == sha256_of(run / WEIGHTS)
        assert exported.run.lineage == open_run(run).lineage
        for name, record in exported.files.items():
            assert record.bytes == (path / name).stat().st_size
            assert record.sha256 in (path / "README.md").read_text()
        assert set(exported.files) == set(names) - {".gitattributes", "README.md", "export.yaml"}
        assert all(0 <= record.mean <= record.max < 1e-3 for record in exported.parity.outputs.values())
        assert min(one.tokens for one in exported.parity.tokens.values()) > 10, "the check hears nothing"
        assert not any(one.differing for one in exported.parity.tokens.values())
        assert not list(path.parent.glob(".tmp-*"))
    assert open_exported(offline).context == "full" and open_exported(streaming).context == str(STREAM)
    assert (offline / "tokens.txt").read_text() == (run / "tokens.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["offline", "streaming"])
@pytest.mark.parametrize("variant", ["backbone", "all"])
def test_the_files_hold_the_active_weights_and_no_others(
    run: Path, offline: Path, streaming: Path, tmp_path: Path, form: str, variant: str
) -> None:
    path = offline if form == "offline" else streaming
    if variant == "backbone":
        path = tmp_path / "onnx"
        export(run, path, variant=variant, streaming=form == "streaming")
    weights = open_run(run).weights()
    found = {file: initializers(path / f"{file}.onnx") for file in FILES}
    for file, tensors in found.items():
        for name, tensor in tensors.items():
            expected = weights[name].clone()  # every stored tensor is one of the model's, by name
            if name in ("joiner.out.bias", "ctc_head.bias"):
                expected[UNK_ID] = SILENT
            same = tensor.shape == expected.shape and torch.equal(tensor, expected)
            assert same or torch.equal(tensor, expected.T), f"{file}: {name}"
    everything = {name for tensors in found.values() for name in tensors}
    active = {name.split(".")[2] for name in everything if name.startswith("encoder.submodels.")}
    assert active == ({"near", "wide", "thin"} if variant == "all" else set())
    assert not any(name.startswith("simple_") for name in everything)
    assert "joiner.encoder_projection.weight" in found[ENCODER] and "ctc_head.weight" in found[CTC]
    assert not any(name.startswith("encoder.") for file in (DECODER, JOINER) for name in found[file])
    exported = open_exported(path)
    counted = exported.files["encoder.onnx"].tensors
    assert counted is not None
    assert sum(counted.values()) == 4 * sum(tensor.numel() for tensor in found[ENCODER].values())
    # The account of `asrkit info` is what the files hold, but for the norms of the other mode.
    for name, part in exported.parts.items():
        mine = {tensor: len(weights[tensor].flatten()) for tensor in weights if part_of(tensor) == name}
        absent = sum(4 * size for tensor, size in mine.items() if tensor not in everything)
        assert part.stored == part.counted - absent == part.float32 - absent > 0
        assert all("norm" in tensor for tensor in mine if tensor not in everything), name


@pytest.mark.slow
def test_one_of_several_submodels(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "onnx", variant="wide")
    names = initializers(tmp_path / "onnx" / f"{ENCODER}.onnx")
    assert any(name.startswith("encoder.submodels.wide.") for name in names)
    assert not any(name.startswith(("encoder.submodels.near.", "encoder.submodels.thin.")) for name in names)


def test_metadata_is_what_the_runtime_reads(offline: Path, streaming: Path) -> None:
    def metadata(path: Path) -> dict[str, str]:
        return {entry.key: entry.value for entry in onnx.load(path).metadata_props}

    assert metadata(offline / f"{ENCODER}.onnx")["model_type"] == "zipformer2"
    assert metadata(offline / f"{DECODER}.onnx")["context_size"] == "2"
    assert metadata(offline / f"{DECODER}.onnx")["vocab_size"] == str(open_exported(offline).vocab_size)
    size = str(open_exported(streaming).state_size)
    found = metadata(streaming / f"{ENCODER}.onnx")
    assert (found["model_type"], found["T"], found["decode_chunk_len"], found["d_model"]) == ("lstm", "19", "16", size)
    found = metadata(streaming / f"{CTC}.onnx")
    assert (found["model_type"], found["T"], found["query_head_dims"]) == ("zipformer2", "19", size)
    assert "all" in found["comment"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "context"),
    [("backbone", Context(4, 0)), ("near", Context(1, 0)), ("all", Context(7, 3))],
    ids=str,
)
def test_any_chunk_and_left_context(run: Path, tmp_path: Path, variant: str, context: Context) -> None:
    """The export checks itself chunk by chunk against the torch loop; here, that it does so in every geometry."""
    warnings: list[str] = []
    exported = export(
        run, tmp_path / "onnx", variant=variant, streaming=True, chunk=context.chunk, left=context.left,
        warn=warnings.append,
    )  # fmt: skip
    assert exported.parsed_context == context
    assert "encoder: next_h" in exported.parity.outputs and "ctc: next_key" in exported.parity.outputs
    assert sum("never trained in context" in line for line in warnings) == (variant != "backbone")


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(0, 3000),
    left=st.integers(0, 20),
    chunk=st.integers(1, 9),
    own=st.tuples(st.integers(1, 12), st.integers(0, 12)),
)
def test_the_frame_counter_turns_round_without_a_mask_noticing(
    frames: int, left: int, chunk: int, own: tuple[int, int]
) -> None:
    near = {**SPEC["submodels"]["near"], "context": str(Context(*own))}
    shape = {"vocab_size": 4, "predictor": {"dim": 8}, "joiner_dim": 8}
    spec = {**SPEC, **shape, "submodels": {**SPEC["submodels"], "near": near}}
    model = AsrModel(from_dict(ModelSpec, spec, "test"))
    layout = StateLayout(model, ("near",), left)
    caches = model.encoder.initial_caches(1, left, ("near",)).map(torch.clone)
    caches = type(caches)(caches.frames + frames, caches.conv, caches.keys, caches.values)
    state = layout.pack(caches)
    assert state.shape == (1, layout.size) and float(state[0, 0]) < left + own[0]
    again = layout.unpack(state).frames

    def masks(begin: torch.Tensor) -> torch.Tensor:
        queries = begin.unsqueeze(1) + torch.arange(chunk)
        keys = begin.unsqueeze(1) + torch.arange(-left, chunk)
        return visible(queries, keys, Context(*own)) & (keys >= 0).unsqueeze(1)

    assert torch.equal(masks(torch.tensor([frames])), masks(again))


# What it computes: the runtime itself


def samples_of(path: Path, tail: float = 0.0) -> torch.Tensor:
    samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    return pad(samples, (0, int(tail * 16000)))


def features_of(audio: list[Path], tail: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    features = [fbank(samples_of(path, tail)) for path in audio]
    longest = max(map(len, features))
    padded = torch.stack([pad(one, (0, 0, 0, longest - len(one)), value=-23.0259) for one in features])
    return padded, torch.tensor([len(one) for one in features])


def seconds_of(hypothesis: Hypothesis) -> list[float]:
    return [round(frame * 0.04, 2) for frame in hypothesis.frames]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sherpa_offline_finds_our_tokens(run: Path, offline: Path, audio: list[Path], method: Method) -> None:
    model = TorchAcousticModel(load_model(open_run(run)), "all")
    expected = search(model, model.encode(*features_of(audio)), method, special_ids=SPECIAL)
    found = client(offline, audio, method)
    assert all(len(hypothesis.tokens) > 3 for hypothesis in expected)
    assert [tokens for tokens, _ in found] == [hypothesis.tokens for hypothesis in expected]
    assert [[round(second, 2) for second in seconds] for _, seconds in found] == list(map(seconds_of, expected))


@pytest.mark.parametrize("method", METHODS)
def test_sherpa_streaming_finds_our_tokens(run: Path, streaming: Path, audio: list[Path], method: Method) -> None:
    """The runtime decodes chunks that are more than filled; with the tail padding these hold all of the recording."""
    model = TorchAcousticModel(load_model(open_run(run)), "all", STREAM)
    assert STREAM.chunk is not None
    expected = []
    for path in audio:
        features, caches, parts, begin = fbank(samples_of(path, TAIL)), model.start(1), [], 0
        while begin + 4 * STREAM.chunk + 3 < len(features):
            encoded, caches = model.step(features[None, begin : begin + 4 * STREAM.chunk + 3], caches)
            parts.append(encoded)
            begin += 4 * STREAM.chunk
        assert begin >= len(fbank(samples_of(path))) - 3, "the tail padding does not push the last words out"
        expected += search(model, together(parts), method, special_ids=SPECIAL)
    found = client(streaming, audio, method)
    assert all(len(hypothesis.tokens) > 3 for hypothesis in expected)
    assert [tokens for tokens, _ in found] == [hypothesis.tokens for hypothesis in expected]
    assert [[round(second, 2) for second in seconds] for _, seconds in found] == list(map(seconds_of, expected))


def together(parts: list[EncoderOutput]) -> EncoderOutput:
    """The chunks of one stream as one output."""
    log_probs = torch.cat([part.ctc_log_probs for part in parts if part.ctc_log_probs is not None], dim=1)
    joiner_in = torch.cat([part.joiner_in for part in parts], dim=1)
    return EncoderOutput(joiner_in, torch.tensor([joiner_in.shape[1]]), log_probs)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["offline", "streaming"])
def test_special_pieces_of_a_foreign_tokenizer_are_never_heard(
    run: Path, audio: list[Path], tmp_path: Path, streams: bool
) -> None:
    """icefall has <sos/eos> at 1 and <unk> at 2. A model that finds both likely emits neither, in torch and in the client."""
    copy, out = tmp_path / "run", tmp_path / "onnx"
    shutil.copytree(run, copy)
    with open(copy / TOKENIZER, "wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(TEXTS), model_writer=file, model_type="char", vocab_size=Tokenizer.load(run / TOKENIZER).vocab_size,
            user_defined_symbols=["<blk>", "<sos/eos>"], unk_id=2, bos_id=-1, eos_id=-1, minloglevel=2,
        )  # fmt: skip
    tokenizer, model = Tokenizer.load(copy / TOKENIZER), load_model(open_run(run))
    assert tokenizer.special_ids == {0, 1, 2} and tokenizer.vocab_size == model.vocab_size
    with torch.no_grad():
        for layer in (model.joiner.out, model.ctc_head):
            layer.bias[[1, 2]] += 15.0
    save_weights(copy / WEIGHTS, model)
    entry = read_yaml(copy / LINEAGE)[-1]
    entry |= {"weights_sha256": sha256_of(copy / WEIGHTS), "tokenizer_sha256": sha256_of(copy / TOKENIZER)}
    write_yaml(copy / LINEAGE, [entry])
    export(copy, out, variant="all", streaming=streams)
    context = STREAM if streams else Context()
    recognizer = load_recognizer(copy, variant="all", context=context)
    for method in METHODS:
        features, lens = features_of(audio)
        encoded = recognizer.model.encode(features, lens)
        freely = search(recognizer.model, encoded, method)
        assert {1, 2} & {token for hypothesis in freely for token in hypothesis.tokens}
        expected = search(recognizer.model, encoded, method, special_ids=tokenizer.special_ids)
        assert not {0, 1, 2} & {token for hypothesis in expected for token in hypothesis.tokens}
        found = [tokens for tokens, _ in client(out, audio, method)]
        assert not {0, 1, 2} & {token for tokens in found for token in tokens} and all(found)
        if not streams:
            assert found == [hypothesis.tokens for hypothesis in expected]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sherpa_endpoints(streaming: Path, audio: list[Path], method: Method) -> None:
    assert client(streaming, audio, method, endpoint=True) > 2


def test_sherpa_takes_a_recording_too_short_for_a_frame(offline: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "tiny.wav", np.full(100, 0.1), 16000)
    for method in ("greedy", "ctc"):
        assert client(offline, [tmp_path / "tiny.wav"], method) == [[[], []]]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["offline", "streaming"])
def test_the_readme_of_an_export_runs(
    run: Path, offline: Path, streaming: Path, audio: list[Path], tmp_path: Path, form: str
) -> None:
    pytest.importorskip("sherpa_onnx", reason="needs sherpa-onnx, which runs what is exported")
    path = offline if form == "offline" else streaming
    transducer, ctc, _ = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.S)
    maker = re.search(r"recognizer = .*?\n\)\n", transducer, re.S)
    assert maker is not None
    tokenizer = Tokenizer.load(run / TOKENIZER)
    for method, code in (("greedy", transducer), ("ctc", transducer.replace(maker[0], ctc))):
        code = code.replace('"a.wav"', repr(str(audio[0])))
        done = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ((tokens, _),) = client(path, audio[:1], method)  # type: ignore[arg-type]
        assert done.stdout.strip() == "".join(map(tokenizer.id_to_piece, tokens)).replace("\u2581", " ").strip() != ""


def favor(model: AsrModel, after: dict[tuple[int, int], dict[int, float]]) -> None:
    """Give the joiner these logits after these contexts, and all other tokens -8, whatever the encoder says."""
    with torch.no_grad():
        model.joiner.encoder_projection.weight.zero_()
        contexts = torch.tensor(list(after))
        encoded = model.joiner.project_encoder(torch.zeros(1, model.spec.encoder.dim))
        hidden = torch.tanh(encoded + model.joiner.project_predictor(model.predictor(contexts)))
        logits = torch.full((len(after), model.vocab_size), -8.0)
        for row, favored in zip(logits, after.values(), strict=True):
            for token, value in favored.items():
                row[token] = value
        model.joiner.out.weight.copy_((torch.linalg.pinv(hidden) @ logits).T)
        model.joiner.out.bias.zero_()


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["offline", "streaming"])
def test_hotwords_by_the_readme(run: Path, audio: list[Path], tmp_path: Path, streams: bool) -> None:
    """A model that slightly prefers `ten` to `two` says `two` where that is a hotword."""
    pytest.importorskip("sherpa_onnx", reason="needs sherpa-onnx, which runs what is exported")
    copy, out = tmp_path / "run", tmp_path / "onnx"
    shutil.copytree(run, copy)
    model, tokenizer = load_model(open_run(copy)), Tokenizer.load(copy / TOKENIZER)
    start, t, e, n, w, o = (tokenizer.piece_to_id(piece) for piece in "\u2581tenwo")
    favor(
        model,
        {
            (-1, 0): {start: 5.0}, (0, start): {t: 5.0}, (start, t): {e: 1.0, w: 0.0}, (t, e): {n: 5.0}, (t, w): {o: 5.0},
            (e, n): {0: 5.0}, (w, o): {0: 5.0},
        },
    )  # fmt: skip
    save_weights(copy / WEIGHTS, model)
    write_yaml(copy / LINEAGE, [read_yaml(copy / LINEAGE)[-1] | {"weights_sha256": sha256_of(copy / WEIGHTS)}])
    export(copy, out, variant="all", streaming=streams)
    example, _, recognizer = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    maker = re.search(r"recognizer = .*?\n\)\n", example, re.S)
    assert maker is not None
    (out / "hotwords.txt").write_text("two\n")
    for code, text in ((example, "ten"), (example.replace(maker[0], recognizer), "two")):
        code = code.replace('"a.wav"', repr(str(audio[0])))
        done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == text


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["offline", "streaming"])
def test_the_readme_of_torchscript_tells_its_inputs(run: Path, tmp_path: Path, streams: bool) -> None:
    """Tensors of the very shapes it names go in, and those it names come out."""
    exported = export(run, tmp_path / "script", variant="all", streaming=streams, format="torchscript")
    readme = (tmp_path / "script" / "README.md").read_text()
    assert "any rate" not in readme and "Input: log-mel energies" in readme
    sizes = {"N": 2, "T": 95, "T'": 23, "V": exported.vocab_size}
    rows = re.findall(r"^\| `(\w+\.pt)` \| (.*) \| (.*) \|$", readme, re.M)
    assert {file for file, *_ in rows} == {f"{file}.pt" for file in FILES}

    def shapes(cell: str) -> list[tuple[list[int], bool]]:
        found = re.findall(r"`\w+` \(([^)]*)\)( int64)?", cell)
        return [([sizes.get(size) or int(size) for size in shape.split(", ")], bool(whole)) for shape, whole in found]

    for file, takes, gives in rows:
        script = torch.jit.load(str(tmp_path / "script" / file))  # type: ignore[no-untyped-call]
        inputs = [torch.zeros(shape, dtype=torch.int64 if whole else torch.float32) for shape, whole in shapes(takes)]
        if "x_lens" in takes:
            inputs[1] += 95
        outputs = script(*inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        assert [(list(out.shape), out.dtype == torch.int64) for out in outputs] == shapes(gives)


@pytest.mark.slow
def test_the_readme_names_the_client_that_two_bits_need(run: Path, tmp_path: Path) -> None:
    cases: list[tuple[ActivationQuantization | None, bool, bool]] = [
        (None, False, True), (None, True, False), (ActivationQuantization(bits=8), False, False),
    ]  # fmt: skip
    for number, (inputs, dequantize, named) in enumerate(cases):
        how = QuantizationConfig(weights=WeightQuantization(bits=2), activations=inputs)
        quantize(run, tmp_path / f"run-{number}", how)
        out = tmp_path / f"onnx-{number}"
        export(tmp_path / f"run-{number}", out, variant="wide", dequantize=dequantize)
        readme = (out / "README.md").read_text()
        assert ("need sherpa-onnx 1.13.4 or newer; for older versions, export with `--dequantize`" in readme) is named


# What it computes: our own commands


@pytest.mark.slow
def test_exported_and_original_evaluate_alike(
    run: Path, offline: Path, streaming: Path, manifest: Path, tmp_path: Path
) -> None:
    for path, context in ((offline, None), (streaming, ContextChoice(chunk=4))):
        run_results = evaluate(
            run, manifest, methods=METHODS, variant="all", context=context, out=tmp_path / f"run-{path.name}"
        )
        theirs = evaluate(path, manifest, methods=METHODS, out=tmp_path / path.name)
        for expected, found in zip(run_results, theirs, strict=True):
            assert [u.hyp for u in found.utterances] == [u.hyp for u in expected.utterances]
            assert found.result["variant"] == "all" and found.result["context"] == expected.result["context"]
            assert found.result["weights_sha256"] == sha256_of(path / "export.yaml")
        (alone,) = evaluate(path, manifest, methods=["ctc"], out=tmp_path / f"ctc-{path.name}", max_duration=1.0)
        assert [u.hyp for u in alone.utterances] == [u.hyp for u in run_results[METHODS.index("ctc")].utterances]


@pytest.mark.slow
def test_exported_and_original_transcribe_alike(
    run: Path, offline: Path, streaming: Path, audio: list[Path], tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "tiny.wav", np.full(5, 0.1), 16000)
    soundfile.write(tmp_path / "other.ogg", noise(np.random.default_rng(1), 44100), 44100)
    files = [*audio, tmp_path / "tiny.wav", tmp_path / "other.ogg"]
    full = partial(transcribe, variant="all", context=ContextChoice(full=True))
    assert [t.text for t in transcribe(offline, files)] == [t.text for t in full(run, files)]
    chunks = partial(transcribe, variant="all", context=ContextChoice(chunk=4))
    assert [t.text for t in transcribe(streaming, files)] == [t.text for t in chunks(run, files)]
    live = partial(transcribe_stream, paced=False)
    for method in METHODS:
        expected = list(live(run, audio, method=method, variant="all", context=ContextChoice(chunk=4)))
        assert list(live(streaming, audio, method=method)) == expected
        assert any(getattr(heard, "text", "") for _, heard in expected)


def test_what_an_export_is_not(offline: Path, streaming: Path, audio: list[Path], tmp_path: Path) -> None:
    for path, choice, says in (
        (offline, {"variant": "backbone"}, "has variant all only, not backbone"),
        (offline, {"context": Context(4, 9)}, "was exported in context full, not chunk=4,left=9"),
        (streaming, {"context": ContextChoice(full=True)}, "was exported in context chunk=4,left=9, not full"),
        (streaming, {"context": ContextChoice(chunk=16)}, "was exported in context chunk=4,left=9, not chunk=16"),
        (offline, {"device": "cuda"}, "run on the CPU"),
    ):
        with pytest.raises(UserError, match=says):
            load_recognizer(path, **choice)
    with pytest.raises(UserError, match="is for whole recordings; drop --stream, or export the run with --streaming"):
        list(transcribe_stream(offline, audio))


def forge(path: Path, *names: str, **changes: Any) -> None:
    """Give files of an export, and export.yaml with ``changes``, digests that fit."""
    content = {**read_yaml(path / "export.yaml"), **changes}
    for name in names:
        content["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    save_exported(path, from_dict(Exported, content, "test"))


def test_every_file_and_every_value_is_under_a_digest(offline: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in sorted({file.name for file in offline.iterdir()} - {"README.md", ".gitattributes"}):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(offline, copy)
        content = bytearray((copy / name).read_bytes())
        if name == "export.yaml":
            place = content.index(b"state_size: 0") + len(b"state_size: ")
            content[place] = ord("7")
        else:
            content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .*digest") as refused:
            load_recognizer(copy)
        assert len(refused.value.lines) == 1
    shutil.rmtree(copy)
    shutil.copytree(offline, copy)
    forge(copy, files={})
    with pytest.raises(UserError, match=r"export\.yaml: lists no encoder\.onnx; restore it or export again"):
        load_recognizer(copy)
    forge(copy, files={**read_yaml(offline / "export.yaml")["files"], "../up": {"bytes": 1, "sha256": "0"}})
    with pytest.raises(UserError, match=r"'\.\./up' is not the name of a file in this directory"):
        load_recognizer(copy)


def test_an_onnx_file_that_reaches_out_is_refused(offline: Path, tmp_path: Path) -> None:
    """A file whose digest fits may still come from a stranger."""
    (tmp_path / "secret").write_bytes(bytes(10000))
    for number, (name, says) in enumerate(
        (("data", "keeps joiner.out.bias in another file"), ("code", "operator my.lib.Run"))
    ):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(offline, copy)
        model = onnx.load(copy / "joiner.onnx")
        if name == "data":
            (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "joiner.out.bias"]
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="../secret")
        else:
            model.graph.node.add(op_type="Run", domain="my.lib")
        (copy / "joiner.onnx").write_bytes(model.SerializeToString())
        forge(copy, "joiner.onnx")
        with pytest.raises(UserError, match=f"joiner.onnx: .*{says}"):
            load_recognizer(copy)


@pytest.mark.slow
def test_a_script_that_does_more_than_compute_is_refused(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "script", variant="wide", format="torchscript")

    class Saves(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            torch.save(a, "written")
            return a + b

    class RunsAtOnce(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

        @torch.jit.export
        def __getstate__(self) -> bool:
            return self.training

        @torch.jit.export
        def __setstate__(self, state: bool) -> None:
            self.training = state

    @torch.jit.interface
    class OfOne(torch.nn.Module):
        def forward(self, a: torch.Tensor) -> torch.Tensor:  # type: ignore[empty-body]
            pass

    class Hidden(torch.nn.Module):
        def forward(self, a: torch.Tensor) -> torch.Tensor:
            torch.save(a, "written")
            return a

    class Calls(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Hidden()

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.inner.forward(a) + b

    Calls.__annotations__ = {"inner": OfOne}
    for module, says in (
        (Saves(), r"joiner.pt: has the operators .*aten::save"),
        (Calls(), r"joiner.pt: has the operators .*prim::CallMethod"),  # its body is not in the graph
        (RunsAtOnce(), "joiner.pt: runs code while"),
    ):
        torch.jit.script(module).save(str(tmp_path / "script" / "joiner.pt"))
        forge(tmp_path / "script", "joiner.pt")
        with pytest.raises(UserError, match=says):
            load_recognizer(tmp_path / "script")
    # The last of them as archives that torch reads in the same way, and others do not.
    with zipfile.ZipFile(tmp_path / "script" / "joiner.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for renamed, kept, says in (
        (lambda name: name.replace("/code/", "/Code/"), False, "runs code while"),
        (lambda name: name.replace(".py", ".PY"), False, "runs code while"),
        (lambda name: name.replace("/code/", "/Code/"), True, "two entries of one name"),
    ):
        with zipfile.ZipFile(tmp_path / "script" / "joiner.pt", "w") as archive:
            for name, content in entries.items():
                archive.writestr(renamed(name), content)
                if kept and renamed(name) != name:
                    archive.writestr(name, b"")
        forge(tmp_path / "script", "joiner.pt")
        with pytest.raises(UserError, match=f"joiner.pt: .*{says}"):
            load_recognizer(tmp_path / "script")
    with zipfile.ZipFile(tmp_path / "script" / "joiner.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("joiner/data/0", bytes(1 << 27))
    forge(tmp_path / "script", "joiner.pt")
    with pytest.raises(UserError, match="joiner.pt: unpacks to far more than its size"):
        load_recognizer(tmp_path / "script")


def test_files_that_do_not_fit_export_yaml_are_refused_in_one_line(
    streaming: Path, audio: list[Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(streaming, copy)
    forge(copy, state_size=5)
    ((_, error),) = transcribe_stream(copy, audio[:1], paced=False)
    assert isinstance(error, UserError) and ".onnx: does not fit export.yaml" in str(error)


def test_a_damaged_export_is_refused(offline: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(offline, copy)
    encoder = bytearray((copy / f"{ENCODER}.onnx").read_bytes())
    encoder[len(encoder) // 2] ^= 1
    (copy / f"{ENCODER}.onnx").write_bytes(encoder)
    (copy / f"{CTC}.onnx").unlink()
    with pytest.raises(UserError) as refused:
        load_recognizer(copy)
    assert len(refused.value.lines) == 2
    assert "encoder.onnx: digest" in str(refused.value) and "ctc.onnx: is missing" in str(refused.value)
    (copy / "export.yaml").write_text("variant: all\nsurprise: 1\n")
    with pytest.raises(UserError, match="surprise: unknown key"):
        load_recognizer(copy)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_what_is_timed_loads_nothing(
    run: Path, audio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any
) -> None:
    """Every file a search needs is open once the recognizer is, and no other; TorchScript is not optimized in between."""
    out = tmp_path / "onnx"
    export(run, out, variant="wide", format=format)
    features, lens = features_of(audio)
    expected = load_recognizer(out).model.encode(features, lens)
    optimized = []
    load = torch.jit.load

    def watched(*where: Any, **options: Any) -> Callable[..., Any]:
        script = load(*where, **options)

        def run(*tensors: torch.Tensor) -> Any:
            optimized.append(torch._C._get_graph_executor_optimize())
            return script(*tensors)

        run.inlined_graph = script.inlined_graph  # type: ignore[attr-defined]
        return run

    monkeypatch.setattr("torch.jit.load", watched)
    searches: list[Sequence[Method]] = [["greedy"], ["ctc"], METHODS]
    for methods in searches:
        recognizer = load_recognizer(out, methods=methods)
        hidden = out.rename(tmp_path / "hidden")
        encoded = recognizer.model.encode(features, lens)
        for method in methods:
            assert search(recognizer.model, encoded, method) == search(recognizer.model, expected, method)
        hidden.rename(out)
    assert not any(optimized) and bool(optimized) == (format == "torchscript")
    for file in FILES:
        name = f"{file}{SUFFIXES[format]}"
        (out / name).write_bytes(b"no model")
        forge(out, name)
    for methods, first in zip(searches, (ENCODER, CTC, ENCODER), strict=True):
        with pytest.raises(UserError, match=f"{first}{SUFFIXES[format]}: .* cannot load it"):
            load_recognizer(out, methods=methods)


# What is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "far"}, "no variant far; there are backbone, near, wide, all"),
        (
            {"variant": "wide", "streaming": True},
            "trained in full context only, so it cannot stream.*contexts.train=",
        ),
        ({"variant": "near"}, "trained in chunk=16,left=64; chunk=4,left=8 only, not in full.*--streaming"),
        ({"variant": "all", "chunk": 4}, "give --streaming too"),
        ({"variant": "near", "streaming": True, "chunk": 5}, "not in chunks of 5.*--left"),
        (
            {"variant": "wide", "quantize": "dynamic", "format": "torchscript"},
            "^--quantize dynamic.*drop --format",
        ),
        (
            {"variant": "wide", "quantize": "dynamic", "dequantize": True},
            "^--quantize dynamic.*drop --dequantize",
        ),
        (
            {"variant": "wide", "dequantize": True},
            "^--dequantize: variant wide of .* is float32 without masks",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_what_cannot_be_exported_is_refused_with_the_reason(
    run: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as refused:
        export(run, tmp_path / "onnx", **options)
    assert len(refused.value.lines) == 1 and not any(tmp_path.iterdir())


def test_a_large_state_is_told_before_the_work(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(writer, "write_onnx", lambda *_: (_ for _ in ()).throw(UserError("that will do")))
    for left in (40000, 9):
        with pytest.raises(UserError, match="that will do"):
            export(run, tmp_path / "onnx", variant="all", streaming=True, chunk=4, left=left, warn=warnings.append)
    (line,) = [line for line in warnings if "a stream's state has" in line]
    model = load_model(open_run(run))
    assert f"{StateLayout(model, model.submodels_of('all'), 40000).size:,} numbers" in line and "smaller --left" in line


def test_no_run_directory(tmp_path: Path, offline: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        export(tmp_path / "nowhere", tmp_path / "onnx")
    with pytest.raises(UserError, match="is an exported model, not a run directory"):
        export(offline, tmp_path / "onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_an_output_that_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "full"):
        with pytest.raises(UserError, match="choose another --out"):
            export(run, out, variant="wide")
    with pytest.raises(UserError, match="cannot write"):
        export(run, tmp_path / "file" / "below", variant="wide")
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty", variant="wide")
    assert open_exported(tmp_path / "empty").variant == "wide"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


@pytest.mark.slow
def test_the_directory_and_its_pack_are_both_there_or_neither(
    run: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    words = ["export", "--from", run, "--variant", "wide", "--report", manifest]
    asrkit(*words, "--out", ".", "--pack", "../x.tar")
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert set(archive.getnames()) == {"empty", *(f"empty/{file.name}" for file in (tmp_path / "empty").iterdir())}
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as full_disk:
        full_disk.setattr(tarfile, "open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(UserError, match=r"y\.tar: cannot write \(No space left\)"):
            export(run, tmp_path / "onnx", variant="wide", pack=tmp_path / "y.tar")
    monkeypatch.setattr(writer, "write_onnx", lambda *_: pytest.fail("begun before it was known to be in vain"))
    for pack, says in ((Path("/proc/x.tar"), "cannot write"), (tmp_path / "onnx", "lies in --out")):
        with pytest.raises(UserError, match=f"{pack}: {says}"):
            export(run, tmp_path / "onnx", variant="wide", pack=pack)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_kill_between_the_directory_and_its_pack(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command completes the pair, another is refused, and at no instant is there a tar without its directory."""
    code = (
        "import os, sys\n"
        "replace = os.replace\n"
        "def killed(source, target):\n"
        "    if str(target).endswith('x.tar'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    replace(source, target)\n"
        "os.replace = killed\n"
        "from asrkit.cli import main; main()"
    )
    out, pack = tmp_path / "onnx", tmp_path / "x.tar"
    words = ["export", "--from", str(run), "--variant", "wide", "--out", str(out), "--pack", str(pack)]
    launched([sys.executable, "-c", code], *words, code=-9)
    assert open_exported(out).variant == "wide" and not pack.exists()
    before = (out / "export.yaml").read_bytes()
    with pytest.raises(UserError, match="exists and is not empty"):
        export(run, out, variant="backbone", pack=pack)
    monkeypatch.setattr(writer, "write_onnx", lambda *_: pytest.fail("the directory was complete"))
    files = {file.name for file in out.iterdir()}
    (out / "evaluation").mkdir()
    (out / "evaluation" / "utterances.jsonl").write_text("what nobody wants to publish")
    assert export(run, out, variant="wide", pack=pack) == open_exported(out)
    assert (out / "export.yaml").read_bytes() == before
    with tarfile.open(pack) as archive:
        assert set(archive.getnames()) == {"onnx", *(f"onnx/{file}" for file in files)}
    with pytest.raises(UserError, match="exists; choose another --pack"):
        export(run, out, variant="wide", pack=pack)


@pytest.mark.slow
def test_a_report_on_recordings_in_which_nobody_speaks(run: Path, audio: list[Path], tmp_path: Path) -> None:
    cut = make_cut("quiet", audio[1], sampling_rate=16000, num_samples=soundfile.info(audio[1]).frames, text="")
    write_cuts(tmp_path / "quiet.jsonl.gz", [cut])
    words = (
        "export",
        "--from",
        run,
        "--variant",
        "wide",
        "--out",
        tmp_path / "onnx",
        "--report",
        tmp_path / "quiet.jsonl.gz",
    )
    code, out, _ = finish(*words)
    assert code == 0 and "WER - % greedy, - % beam  exported" in out
    assert "| exported | - | - |" in (tmp_path / "onnx" / "README.md").read_text()


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_packages_that_are_missing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'asrkit\[export\]'"):
        export(run, tmp_path / "onnx", variant="wide")


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """Files of more than 20 kB cannot be written in the process, which fails much as a full disk does."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from asrkit.cli import main; main()"
    )
    words = ["export", "--from", str(run), "--variant", "wide", "--out", str(tmp_path / "onnx")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "onnx") in line and "cannot write (File too large)" in line
    assert not any(tmp_path.iterdir())


def spoil(file: str, weight: str, by: float) -> Callable[..., dict[str, int]]:
    """A ``write_onnx`` that changes one number of one file."""
    original = writer.write_onnx

    def write(graph: Any, path: Path, *others: Any) -> dict[str, int]:
        count = original(graph, path, *others)
        if graph.file == file:
            model = onnx.load(path)
            (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == weight]
            values = numpy_helper.to_array(tensor).copy()
            values.flat[0] += by
            tensor.CopyFrom(numpy_helper.from_array(values, weight))
            onnx.save(model, path)
        return count

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "weight", "output", "streams", "by"),
    [
        (JOINER, "joiner.out.bias", "joiner: logit", False, 0.05),
        (CTC, "ctc_head.bias", "ctc: log_probs", False, np.nan),
        (ENCODER, "encoder.submodels.near.layers.1.value.bias", "encoder: next_h", True, 0.05),
    ],
)
def test_an_export_that_differs_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, weight: str, output: str, streams: bool,
    by: float,
) -> None:  # fmt: skip
    monkeypatch.setattr(writer, "write_onnx", spoil(file, weight, by))
    with pytest.raises(UserError) as refused:
        export(run, tmp_path / "onnx", variant="all", streaming=streams)
    assert any(
        line.startswith(f"{output}: the exported file differs from torch by up to") for line in refused.value.lines
    )
    assert all(line.startswith(file) for line in refused.value.lines), "another file is blamed"
    assert not any(tmp_path.iterdir())


# What is documented


@pytest.mark.slow
def test_the_documented_commands_run(
    run: Path, audio: list[Path], manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "near").symlink_to(run)
    (tmp_path / "a.wav").symlink_to(audio[0])
    (tmp_path / "test.jsonl.gz").symlink_to(manifest)
    monkeypatch.chdir(tmp_path)
    quantize(tmp_path / "exp" / "near", tmp_path / "exp" / "sparse-int4", QuantizationConfig())
    blocks = re.findall(r"^```sh\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    lines = [shlex.split(line, comments=True) for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if line and line[0] == "asrkit"]
    assert {line[1] for line in commands} == {"export", "transcribe", "evaluate"}
    printed = [asrkit(*line[1:]) for line in commands]
    for name in ("onnx", "onnx-streaming", "onnx-int4", "onnx-dynamic"):
        assert yaml.safe_load((tmp_path / "exp" / name / "export.yaml").read_text())["format"] == "onnx"
    assert any("final" in text for text in printed)


@pytest.mark.slow
def test_a_recording_of_the_run_is_heard(run: Path, manifest: Path, tmp_path: Path) -> None:
    """The check listens to the run's own recordings where they still are, and says so where they are not."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shar, broken = tmp_path / "shar", tmp_path / "moved.jsonl.gz"
    shar.mkdir()
    CutSet.from_cuts(open_cuts(manifest)).to_shar(shar, fields={"recording": "wav"})
    assert stage_entry("s", "0", known_inputs({"manifest": shar}), "")["manifests"] == {
        str(shar): digest_of(shar, sound=False)
    }
    cut = make_cut("lost", tmp_path / "lost.wav", sampling_rate=16000, num_samples=16000, text="one")
    write_cuts(broken, [cut])
    gone = tmp_path / "gone.jsonl.gz"
    first = open_run(run).lineage[-1]
    cases: list[tuple[list[list[Path]], str]] = [
        ([[gone, manifest]], ""),
        ([[broken, shar]], ""),
        ([[manifest], []], ""),  # the last stage had no manifests
        ([[gone]], "none of the manifests in its lineage is here"),
        ([[gone, broken]], f"{broken}: "),
    ]
    for number, (stages, reason) in enumerate(cases):
        write_yaml(copy / LINEAGE, [first | {"manifests": {str(path): "0" for path in paths}} for paths in stages])
        words = ("export", "--from", copy, "--out", tmp_path / f"onnx-{number}", "--variant", "wide")
        code, out, err = finish(*words)
        assert code == 0 and f"checked on: random log-mel{'' if reason else '; cut-2, cut-0, cut-1'}\n" in out
        assert err.count("\n") == bool(reason) and reason in err
