"""export of masked and integer layers: the very codes in the files, and the runtime that multiplies them."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.config import from_dict
from asrkit.data.features import fbank
from asrkit.data.manifests import make_cut, write_cuts
from asrkit.data.text.tokenizer import UNK_ID
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.recognizer import load_recognizer
from asrkit.decoding.search import METHODS, search
from asrkit.errors import UserError
from asrkit.export import parity, writer
from asrkit.export.directory import SUFFIXES, open_exported
from asrkit.export.integers import CONSTANT, Nodes, _pack, layer_alone, product
from asrkit.export.layers import QUANTIZED
from asrkit.export.readme import tail_seconds
from asrkit.export.runtime import run_graph
from asrkit.models import load_model
from asrkit.models.compression import LayerChoice, QuantizationConfig, compressed_layers, pruned_spec
from asrkit.models.registry import write_model
from asrkit.models.surgery import is_mask, rebuild
from asrkit.nn.compression import CompressedLinear, find_mask, size_in_bits
from asrkit.nn.compression_config import ActivationQuantization, Compression, Mask, WeightQuantization
from asrkit.reporting.wer import align, count
from asrkit.run_dir import LINEAGE, WEIGHTS, digests_of, open_run, read_yaml, write_yaml
from asrkit.stages.export import export
from asrkit.stages.quantize import quantize
from asrkit.training.checkpoint import save_weights
from helpers.commands import asrkit
from helpers.sherpa_client import client
from helpers.small_runs import TEXTS, noise, write_run

onnx = pytest.importorskip("onnx", reason="needs the extra `export`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `export`")


SPECIAL = (0, UNK_ID)

# Every combination a layer may have, but for those that are refused elsewhere.
WEIGHTS_OF: list[dict[str, Any] | None] = [
    None,
    *({"bits": bits, "scale": scale} for bits in (8, 4, 2) for scale in ("tensor", "channel")),
    {"bits": 4, "scale": "block", "block_size": 16},
    {"bits": 4, "scale": "block", "block_size": 48, "clip": "search", "bound": "edge"},
    {"bits": 2, "scale": "block", "block_size": 32, "symmetric": False},
    {"bits": 2, "symmetric": False},
    {"bits": 8, "scale_gradient": True},
]
INPUTS_OF: list[dict[str, Any] | None] = [
    None,
    {"bits": 8},
    {"bits": 4, "scale": "tensor", "rounding": "half_even"},
    {"bits": 8, "scale": "onnx", "rounding": "half_even"},
]
MASKS: list[dict[str, Any] | None] = [None, {"keep": 2, "group": 4}, {"sparsity": 0.67, "block": (8, 1)}]


def make_layer(inputs: int, outputs: int, how: dict[str, Any], seed: int) -> CompressedLinear:
    torch.manual_seed(seed)
    layer = CompressedLinear(inputs, outputs, from_dict(Compression, how, "test"))
    with torch.no_grad():
        layer.weight[0] = 0.0  # a row without a largest weight
    if layer.how.mask is not None:
        layer.mask.copy_(find_mask(torch.rand(outputs, inputs), layer.how.mask))
    return layer


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 70))
def test_packing_round_trips_over_all_codes(bits: int, count: int) -> None:
    values = (np.arange(count) % 2**bits).astype(np.uint8)
    packed = _pack(values, bits)
    assert packed.dtype == np.uint8 and len(packed) == -(-count * bits // 8)
    assert np.array_equal(digits(packed, bits)[:count], values)
    every = np.arange(2**bits, dtype=np.uint8)
    assert np.array_equal(digits(_pack(every, bits), bits)[: len(every)], every)


@pytest.mark.parametrize("inputs", [512, 768, 2304])
def test_wide_layers_with_unsigned_inputs_are_exact(inputs: int) -> None:
    """Sums beyond 2^24, from which the zero point is subtracted before anything is rounded."""
    how = {"weights": {"bits": 8}, "activations": {"bits": 8, "scale": "onnx", "rounding": "half_even"}}
    layer = CompressedLinear(inputs, 8, from_dict(Compression, how, "test"), bias=False)
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(0.5 + 0.5 * torch.rand(8, inputs))
        x = 0.7 + 0.3 * torch.rand(1, 40, inputs)  # 40 rows: where torch multiplies int8, it does here
        x[..., 0] = -1.0
        for rows in (x, x[:, :4]):
            assert torch.equal(run_graph(layer_alone("layer", layer), rows), layer(rows))


@settings(max_examples=80, deadline=None)
@given(
    weights=st.sampled_from(WEIGHTS_OF),
    activations=st.sampled_from(INPUTS_OF),
    mask=st.sampled_from(MASKS),
    outputs=st.sampled_from([8, 40]),
    odd=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_runtime_computes_what_a_layer_does(
    weights: dict[str, Any] | None, activations: Any, mask: Any, outputs: int, odd: bool, seed: int
) -> None:
    """Integers to the last bit; and the file holds the bytes that `asrkit info` counts."""
    blocks = weights is not None and weights.get("scale") == "block"
    if weights is None and (mask is None or activations is not None):
        return  # an ordinary layer, and one that is refused
    if weights is not None and not weights.get("symmetric", True) and (mask or activations):
        return  # refused
    inputs = 100 if odd and not blocks else 96  # 100 are no multiple of the runtime's blocks
    layer = make_layer(inputs, outputs, {"weights": weights, "activations": activations, "mask": mask}, seed)
    x = torch.randn(2, 5, inputs) * torch.logspace(-3, 2, 5).view(1, 5, 1)
    x[0, 0] = 0.0
    with torch.no_grad():
        expected = layer(x)
    found = run_graph(layer_alone("layer", layer), x)
    if activations is not None and layer.multiplies_integers:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()))
    nodes = Nodes("layer")
    product(nodes, layer, "x")
    stored = sum(array.nbytes for name, array in nodes.tensors.items() if not name.startswith(CONSTANT))
    counted = (size_in_bits(layer) - 32 * layer.bias.numel()) / 8
    unpadded = mask is not None or (activations is not None and layer.multiplies_integers)
    padding = 16 * outputs if inputs % 16 and not unpadded else 0
    assert counted <= stored <= counted + padding + 8  # a zero beside the kept weights, a byte begun


@pytest.mark.parametrize(
    ("how", "most"),
    [
        ({"weights": {"bits": 8}}, 1.0),
        ({"weights": {"bits": 8, "scale": "block"}}, 3.0),
        ({"weights": {"bits": 4}}, 0.0),
        ({"weights": {"bits": 4, "scale": "block", "block_size": 32}, "mask": {"keep": 2, "group": 4}}, 0.9),
        ({"weights": {"bits": 2}, "mask": {"keep": 2, "group": 4}}, 0.9),
        ({"weights": {"bits": 4}, "mask": {"keep": 4, "group": 8}}, 2.0),
        ({"weights": {"bits": 4}, "mask": {"sparsity": 0.5}}, 5.2),
        ({"weights": {"bits": 8}, "activations": {"bits": 8}}, 0.25),
        ({"weights": {"bits": 4}, "activations": {"bits": 8}}, 1.0),
        ({"weights": {"bits": 8}, "activations": {"bits": 8}, "mask": {"keep": 2, "group": 4}}, 1.4),
        ({"weights": {"bits": 8}, "mask": {"keep": 2, "group": 4}}, 2.2),
        ({"mask": {"keep": 2, "group": 4}}, 2.7),
        ({"mask": {"sparsity": 0.5}}, 5.8),
    ],
)
def test_what_the_runtime_unfolds_when_it_loads_a_file(how: dict[str, Any], most: float, tmp_path: Path) -> None:
    """The bytes of all constants that it computes, which it keeps until the last layer is done, over those of float32 weights;
    and nothing of it is left to compute in each run."""
    layer = make_layer(256, 512, how, 1)
    model = onnx.load_from_string(layer_alone("layer", layer))
    constant, unfolded = {tensor.name for tensor in model.graph.initializer}, []
    for node in model.graph.node:
        if set(node.input) <= constant:
            constant |= set(node.output)
            if not node.output[0].startswith(CONSTANT):  # those are shared by all layers
                unfolded += node.output
    # Unfolded once more, by themselves.
    parts = onnx.shape_inference.infer_shapes(model, data_prop=True)
    types = {info.name: info.type for info in parts.graph.value_info}
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_value_info(name, types[name]) for name in unfolded)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    sizes = (
        [array.nbytes for array in session.run(unfolded, {"x": np.zeros((1, 1, 256), np.float32)})] if unfolded else []
    )
    assert 0.8 * most <= sum(sizes) / (4 * layer.weight.numel()) <= most + 0.02

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(layer_alone("layer", layer), options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "loaded.onnx").graph
    constant = {tensor.name for tensor in loaded.initializer}
    assert loaded.node and not any(set(node.input) <= constant for node in loaded.node)


@pytest.mark.slow
def test_blocks_the_runtime_cannot_have(run: Path, tmp_path: Path) -> None:
    layer = make_layer(24, 8, {"weights": {"bits": 4, "scale": "block", "block_size": 12}}, 1)
    with pytest.raises(UserError, match="layer: has a scale for each 12 inputs.*--dequantize"):
        layer_alone("layer", layer)
    quantize(
        run, tmp_path / "blocks", QuantizationConfig(weights=WeightQuantization(bits=4, scale="block", block_size=8))
    )
    with pytest.raises(UserError, match="--dequantize"):
        export(tmp_path / "blocks", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    export(tmp_path / "blocks", tmp_path / "onnx", dequantize=True)


SPEC: dict[str, Any] = {
    "encoder": {"dim": 32, "num_layers": 2, "feedforward_dim": 48, "kernel_size": 5, "subsampling_channels": [4, 8]},
    "submodels": {
        "near": {"kind": "attention", "layers": [1], "dim": 32, "heads": 2},
        "thin": {"kind": "adapter", "layers": [0], "dim": 16},
    },
    "variants": {
        "backbone": {"submodels": [], "contexts": ["full", "chunk=4,left=0"]},
        "near": {"submodels": ["near"], "contexts": ["full", "chunk=4,left=8"]},
        "thin": {"submodels": ["thin"], "contexts": ["full"]},
    },
    "variant": "near",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model whose searches find a lot."""
    path = write_run(tmp_path_factory.mktemp("exp") / "run", SPEC)
    model = load_model(open_run(path))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    republish(path, model)
    return path


def republish(path: Path, model: Any) -> None:
    write_model(path, model.spec)
    save_weights(path / WEIGHTS, model)
    write_yaml(path / LINEAGE, [read_yaml(path / LINEAGE)[-1] | digests_of(path)])


def sparse(path: Path, out: Path) -> Path:
    """A run directory of the same model, 2:4."""
    shutil.copytree(path, out)
    model = load_model(open_run(path))
    masked = rebuild(pruned_spec(model, Mask(keep=2, group=4), LayerChoice(indivisible="skip")), model, new=is_mask)
    for layer in compressed_layers(masked).values():
        layer.mask.copy_(find_mask(layer.weight.detach().abs(), Mask(keep=2, group=4)))
    republish(out, masked)
    return out


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("audio"), np.random.default_rng(3)
    paths = [folder / f"{number}.wav" for number in range(3)]
    for path, seconds in zip(paths, (1.9, 0.8, 2.6), strict=True):
        soundfile.write(path, noise(random, round(seconds * 16000)), 16000)
    return paths


KINDS: dict[str, QuantizationConfig] = {
    "int4": QuantizationConfig(weights=WeightQuantization(bits=4)),
    "int2": QuantizationConfig(
        weights=WeightQuantization(bits=2, scale="block", block_size=16, symmetric=False),
        layers=LayerChoice(indivisible="skip"),
    ),
    "int8-inputs": QuantizationConfig(weights=WeightQuantization(bits=8), activations=ActivationQuantization()),
    "everything": QuantizationConfig(
        weights=WeightQuantization(bits=4), layers=LayerChoice(only=["encoder", "submodels", "joiner", "ctc_head"])
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "sparse", "sparse-int4"])
@pytest.mark.parametrize("streaming", [False, True], ids=["offline", "streaming"])
def test_sherpa_runs_integers_and_masks(
    run: Path, audio: list[Path], tmp_path: Path, kind: str, streaming: bool
) -> None:
    source = run
    if kind.startswith("sparse"):
        source = sparse(run, tmp_path / "sparse")
    if kind != "sparse":
        quantize(source, tmp_path / "model", KINDS[kind.removeprefix("sparse-")])
        source = tmp_path / "model"
    exported = export(source, tmp_path / "onnx", streaming=streaming)
    model = load_model(open_run(source))

    # The integers and masks of the files are those of the model.
    content = onnx.load(tmp_path / "onnx" / "encoder.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in content.initializer}
    layers = {path: layer for path, layer in compressed_layers(model).items() if f"{path}.bias" in stored}
    assert any(path.startswith("encoder.submodels.near") for path in layers)
    assert not any(path.startswith("encoder.submodels.thin") for path in stored)
    for path, layer in layers.items():
        if layer.how.weights is not None:
            codes = layer.codes()
            assert np.array_equal(stored[f"{path}.scale"].reshape(-1), codes.scale.detach().reshape(-1))
            wanted = codes.codes.detach().numpy().astype(int) + 2 ** (layer.how.weights.bits - 1)
            kept = wanted if layer.how.mask is None else wanted[layer.mask.numpy()]
            found = digits(stored[f"{path}.codes"], layer.how.weights.bits)
            if layer.how.mask is not None:
                found = found[: kept.size]
            elif found.size != kept.size:  # rows filled up to whole blocks
                found = found.reshape(len(wanted), -1)[:, : wanted.shape[1]]
            assert np.array_equal(found.reshape(-1), kept.reshape(-1)), path
        if layer.how.mask is not None:
            assert np.array_equal(digits(stored[f"{path}.mask"], 1)[: layer.mask.numel()], layer.mask.flatten())

    # Sizes are those of the account, but for a byte here and there: to 1 % where layers are not tiny.
    assert set(exported.parts) == {"backbone", "submodel near", "joiner", "predictor", "ctc_head"}
    for part, record in exported.parts.items():
        assert abs(record.stored - record.counted) <= max(0.01 * record.counted, 16 * len(layers)), part
    assert exported.parts["backbone"].stored < 0.8 * exported.parts["backbone"].float32

    # sherpa-onnx finds the tokens that our own searches find in the exported model and in torch.
    context = exported.parsed_context
    tail = 0.0 if context.chunk is None else tail_seconds(context.chunk)
    samples = [torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in audio]
    features = [fbank(torch.nn.functional.pad(one, (0, int(16000 * tail)))) for one in samples]
    for method in METHODS:
        heard = [tokens for tokens, _ in client(tmp_path / "onnx", audio, method)]
        for one in (load_recognizer(tmp_path / "onnx").model, TorchAcousticModel(model, context=context)):
            encoded = [whole_chunks(one, mine) for mine in features] if context.streaming else [together(one, features)]
            torch_tokens = [
                hypothesis.tokens
                for output in encoded
                for hypothesis in search(one, output, method, special_ids=SPECIAL)
            ]
            if kind == "int8-inputs":  # features that differ by 1e-6 round to other codes now and then
                assert errors(torch_tokens, heard) <= 0.1 * sum(map(len, torch_tokens))
            else:
                assert heard == torch_tokens
        assert sum(map(len, heard)) > 3


def together(model: Any, features: list[torch.Tensor]) -> Any:
    """Recordings in one padded batch."""
    longest = max(map(len, features))
    padded = [torch.nn.functional.pad(one, (0, 0, 0, longest - len(one)), value=-23.0259) for one in features]
    return model.encode(torch.stack(padded), torch.tensor([len(one) for one in features]))


def whole_chunks(model: Any, features: torch.Tensor) -> Any:
    """The chunks that the client computes: those with more than they need."""
    window = 4 * model.context.chunk + 3
    count = (len(features) - 1 - window) // (4 * model.context.chunk) + 1
    frames = (count - 1) * 4 * model.context.chunk + window
    return model.encode(features[None, :frames], torch.tensor([frames]))


def errors(expected: list[list[int]], found: list[list[int]]) -> int:
    pairs = zip(expected, found, strict=True)
    return sum(count(align(list(map(str, one)), list(map(str, other)))).errors for one, other in pairs)


def digits(packed: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of few bits, the lowest first."""
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)
    return ((packed.reshape(-1, 1) >> shifts) & (2**bits - 1)).reshape(-1).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(QUANTIZED))
def test_quantize_while_exporting(run: Path, tmp_path: Path, kind: str) -> None:
    exported = export(run, tmp_path / "onnx", variant="near", quantize=kind)
    assert exported.quantize == kind and "without training" in exported.compression
    plain = exported.parts["backbone"]
    assert plain.stored == plain.counted < 0.6 * plain.float32
    if kind == "dynamic":
        operators = {node.op_type for node in onnx.load(tmp_path / "onnx" / "encoder.onnx").graph.node}
        assert {"DynamicQuantizeLinear", "MatMulInteger"} <= operators and "MatMulNBits" not in operators
    with pytest.raises(UserError, match="quantized already"):
        quantize(run, tmp_path / "int8", QuantizationConfig())
        export(tmp_path / "int8", tmp_path / "again", quantize=kind)
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_dequantized(run: Path, tmp_path: Path) -> None:
    """The float32 numbers that the integers stand for, without an operator that old runtimes lack."""
    quantize(run, tmp_path / "int2", KINDS["int2"])
    exported = export(tmp_path / "int2", tmp_path / "onnx", dequantize=True)
    content = onnx.load(tmp_path / "onnx" / "encoder.onnx").graph
    assert not any(node.domain for node in content.node)
    stored = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in content.initializer
    }
    layers = compressed_layers(load_model(open_run(tmp_path / "int2")))
    there = [path for path in layers if f"{path}.weight" in stored]
    assert any("blocks" in path for path in there)
    for path in there:
        weights = layers[path].codes().weights()
        assert torch.equal(stored[f"{path}.weight"], weights) or torch.equal(stored[f"{path}.weight"], weights.T)
    assert exported.parts["backbone"].stored == exported.parts["backbone"].float32


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tensor"), [("int8-inputs", "codes"), ("int4", "scale"), ("sparse", "mask")])
def test_a_file_that_holds_something_else_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tensor: str
) -> None:
    """One bit of one number of one file, which no output would show."""
    source = sparse(run, tmp_path / "model") if kind == "sparse" else tmp_path / "model"
    if kind != "sparse":
        quantize(run, source, KINDS[kind])
    original = writer.write_onnx
    name = f"encoder.blocks.0.conv.gate.{tensor}"

    def write(graph: Any, path: Path, *others: Any) -> dict[str, int]:
        counted = original(graph, path, *others)
        if path.name == "ctc.onnx":
            model = onnx.load(path)
            (found,) = (one for one in model.graph.initializer if one.name == name)
            found.raw_data = bytes([found.raw_data[0] ^ 1]) + found.raw_data[1:]
            onnx.save(model, path)
        return counted

    monkeypatch.setattr(writer, "write_onnx", write)
    with pytest.raises(UserError, match=f"ctc.onnx: {name} is not what was trained"):
        export(source, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
def test_a_layer_that_computes_something_else_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(run, tmp_path / "int8", KINDS["int8-inputs"])

    def spoilt(path: str, layer: CompressedLinear) -> bytes:
        model = onnx.load_from_string(layer_alone(path, layer))
        (codes,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{path}.codes")
        codes.raw_data = codes.raw_data[:3] + bytes([codes.raw_data[3] ^ 1]) + codes.raw_data[4:]
        return bytes(model.SerializeToString())

    monkeypatch.setattr(parity, "layer_alone", spoilt)
    with pytest.raises(UserError, match="encoder.blocks.0.conv.gate: computes something else"):
        export(tmp_path / "int8", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
def test_names_and_weights_that_mislead(tmp_path: Path) -> None:
    """A sub-model called model, and layers of equal weights, which the tracer would make one."""
    spec = {**SPEC, "submodels": {"model": SPEC["submodels"]["near"]}}
    spec |= {"variants": {"all": {"submodels": ["model"], "contexts": ["full"]}}, "variant": "all"}
    path = write_run(tmp_path / "run", spec)
    model = load_model(open_run(path))
    with torch.no_grad():
        for layer in cast(Any, model.encoder.submodels["model"]).layers.values():
            for linear in (layer.query, layer.key):
                linear.weight.zero_()
    republish(path, model)
    exported = export(path, tmp_path / "onnx", quantize="int8")
    names = {tensor.name for tensor in onnx.load(tmp_path / "onnx" / "encoder.onnx").graph.initializer}
    assert {f"encoder.submodels.model.layers.1.{one}.codes" for one in ("query", "key", "value", "out")} <= names
    assert exported.parts["submodel model"].stored < 0.5 * exported.parts["submodel model"].float32


@pytest.mark.slow
def test_layers_that_stay_float_are_told(run: Path, tmp_path: Path) -> None:
    told: list[str] = []
    export(run, tmp_path / "onnx", variant="near", quantize="int4", warn=told.append)
    assert "layers stay float, because their number of inputs is not a multiple of 32" in told[0]
    quantize(run, tmp_path / "inputs", KINDS["int8-inputs"])
    with pytest.raises(UserError, match="integer inputs.*drop --format and --dequantize"):
        export(tmp_path / "inputs", tmp_path / "again", dequantize=True)


@pytest.mark.slow
def test_a_runtime_without_the_operator(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(run, tmp_path / "int2", KINDS["int2"])
    original = onnxruntime.InferenceSession

    def old(content: Any, *others: Any, **named: Any) -> Any:
        if isinstance(content, bytes):
            raise RuntimeError("matmul_nbits.cc: nbits_ == 4 was false. Only 4b quantization is supported")
        return original(content, *others, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", old)
    with pytest.raises(UserError, match="multiplies no integer weights of these bits.*--dequantize"):
        export(tmp_path / "int2", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    export(tmp_path / "int2", tmp_path / "onnx", dequantize=True)


# What else an export can be


@pytest.mark.slow
def test_torchscript(run: Path, audio: list[Path], tmp_path: Path) -> None:
    quantize(run, tmp_path / "int4", KINDS["int4"])
    for streaming in (False, True):
        out = tmp_path / f"script-{streaming}"
        exported = export(tmp_path / "int4", out, format="torchscript", streaming=streaming)
        assert exported.format == "torchscript" and exported.opset is None and not exported.parts
        assert (out / "encoder.pt").is_file() and not (out / "encoder.onnx").exists()
        found = load_recognizer(out)
        model = TorchAcousticModel(load_model(open_run(tmp_path / "int4")), context=found.context)
        features = fbank(torch.from_numpy(soundfile.read(audio[0], dtype="float32")[0])).unsqueeze(0)
        lens = torch.tensor([features.shape[1]])
        for method in METHODS:
            (expected,) = search(model, model.encode(features, lens), method, special_ids=SPECIAL)
            (heard,) = search(found.model, found.model.encode(features, lens), method, special_ids=SPECIAL)
            assert heard.tokens == expected.tokens and expected.tokens
    unused = torch.jit.load(str(tmp_path / "script-False" / "joiner.pt"))  # type: ignore[no-untyped-call]
    assert (tmp_path / "script-False" / "joiner.pt").stat().st_size < 40_000 and unused is not None
    quantize(run, tmp_path / "inputs", KINDS["int8-inputs"])
    with pytest.raises(UserError, match="integer inputs.*drop --format and --dequantize"):
        export(tmp_path / "inputs", tmp_path / "onnx", format="torchscript")


@pytest.mark.slow
def test_report_and_pack(run: Path, audio: list[Path], tmp_path: Path) -> None:
    manifest = tmp_path / "test.jsonl.gz"
    cuts = [
        make_cut(f"cut-{k}", path, sampling_rate=16000, num_samples=soundfile.info(path).frames, text=TEXTS[k])
        for k, path in enumerate(audio)
    ]
    write_cuts(manifest, cuts)
    quantize(run, tmp_path / "int4", KINDS["int4"])
    out, pack = tmp_path / "onnx", tmp_path / "model.tar"
    arguments = ["export", "--from", str(tmp_path / "int4"), "--out", str(out), "--report", str(manifest)]
    printed = asrkit(*arguments, "--pack", pack, "--license", "cc-by-4.0", "--streaming")
    measured = json.loads((out / "report.json").read_text())
    assert list(measured["systems"]) == ["exported", "float", "backbone alone", "submodel near alone"]
    for name, found in measured["systems"].items():
        assert found["greedy"]["words"] == sum(len(text.split()) for text in TEXTS[:3])
        assert found["greedy"]["wer"] == found["greedy"]["errors"] / found["greedy"]["words"]
        assert name in printed
    speed = measured["speed"]
    assert (
        speed["real_time_factor"] > 0 and speed["peak_memory_mb"] >= 0
    )  # this model is smaller than what torch took before
    assert 0 < speed["piece_ms"]["median"] <= speed["piece_ms"]["99th"]

    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sherpa-onnx\n") and "license: cc-by-4.0" in card.split("---")[1]
    assert "| submodel near alone |" in card and "a chunk (median)" in card
    with tarfile.open(pack) as archive:
        assert {name.removeprefix("onnx/") for name in archive.getnames()} == {"onnx", *(f.name for f in out.iterdir())}
        inside = archive.extractfile("onnx/encoder.onnx")
        assert inside is not None and inside.read() == (out / "encoder.onnx").read_bytes()
    assert open_exported(out).license == "cc-by-4.0"

    assert f"{pack}: exists" in asrkit(*arguments[:4], tmp_path / "other", "--pack", str(pack), code=1)
    assert not (tmp_path / "other").exists()
    assert "lies in --out" in asrkit(
        *arguments[:4], tmp_path / "other", "--pack", str(tmp_path / "other" / "m.tar"), code=1
    )
    assert not (tmp_path / "other").exists()
    assert "none.jsonl.gz" in asrkit(
        *arguments[:4], tmp_path / "other", "--report", str(tmp_path / "none.jsonl.gz"), code=1
    )
    assert not (tmp_path / "other").exists()


def test_the_presets_are_offered_by_the_command() -> None:
    from asrkit.cli.export import Format, Quantize

    assert [one.value for one in Quantize] == list(QUANTIZED)
    assert [one.value for one in Format] == list(SUFFIXES)


@pytest.mark.slow
def test_a_variant_is_exported_with_what_is_on_in_it(run: Path, tmp_path: Path) -> None:
    """Of one set of weights: dense as float32, sparse with its masks and integers, whichever is the default."""
    source = sparse(run, tmp_path / "sparse")
    quantize(source, tmp_path / "super", KINDS["int4"])
    model = load_model(open_run(tmp_path / "super"))
    near = model.spec.variants["near"]
    variants = {"dense": replace(near, masks=False, integers=False), "sparse": near}
    shutil.copytree(tmp_path / "super", tmp_path / "other")
    republish(tmp_path / "super", rebuild(replace(model.spec, variants=variants, variant="sparse"), model))
    republish(tmp_path / "other", rebuild(replace(model.spec, variants=variants, variant="dense"), model))
    for origin in ("super", "other"):
        for variant in variants:
            exported = export(tmp_path / origin, tmp_path / f"{origin}-{variant}", variant=variant, streaming=True)
            assert (exported.compression == "float32") == (variant == "dense")
    for variant in variants:
        files = [(tmp_path / f"{origin}-{variant}" / "encoder.onnx").read_bytes() for origin in ("super", "other")]
        assert files[0] == files[1]
    stored = {
        variant: {t.name: t for t in onnx.load(tmp_path / f"super-{variant}" / "encoder.onnx").graph.initializer}
        for variant in variants
    }
    assert any(name.endswith(".codes") for name in stored["sparse"]) and not any(
        name.endswith((".codes", ".mask", ".scale")) for name in stored["dense"]
    )
    weight = onnx.numpy_helper.to_array(stored["dense"]["encoder.blocks.0.conv.out.weight"])
    assert np.array_equal(weight.T, model.get_parameter("encoder.blocks.0.conv.out.weight").detach().numpy())
    with pytest.raises(UserError, match="variant dense of .* is float32 without masks"):
        export(tmp_path / "super", tmp_path / "x", variant="dense", streaming=True, dequantize=True)
    # A dense variant can be rounded at export, as any float model.
    rounded = export(tmp_path / "super", tmp_path / "int8", variant="dense", streaming=True, quantize="int8")
    assert "weights of 8 bits, rounded without training" in rounded.compression
