"""asrkit submodel: runs with sub-models taken out, put in and combined, on real run directories of untrained models."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from asrkit.cli.submodel import _ranges
from asrkit.config import digest, from_dict, to_dict
from asrkit.data.text.tokenizer import train_tokenizer
from asrkit.decoding.recognizer import load_recognizer
from asrkit.disk import atomic_directory, atomic_write, sha256_of, special
from asrkit.errors import UserError
from asrkit.models import AsrModel, ModelSpec, load_model
from asrkit.models.digests import backbone_digest, tensors_digest
from asrkit.models.registry import write_model
from asrkit.models.submodel_file import read_submodel
from asrkit.nn.context import FULL, Context
from asrkit.run_dir import (
    CONFIG,
    LINEAGE,
    MODEL,
    TOKENIZER,
    TOKENS,
    WEIGHTS,
    digests_of,
    open_run,
    read_yaml,
    write_yaml,
)
from asrkit.stages.info import describe_run
from asrkit.stages.submodel import (
    attach_submodel,
    combine_submodels,
    extract_submodel,
    remove_submodel,
)
from asrkit.stages.submodel_list import describe_submodels
from asrkit.training.checkpoint import save_weights
from asrkit.training.run_writer import DONE, write_untrained_run
from helpers.commands import finish

SUBMODELS = {
    "attention": {"kind": "attention", "layers": [0, 1, 2], "dim": 16, "heads": 2},
    "near": {"kind": "attention", "layers": [0, 2], "dim": 8, "heads": 2, "context": "chunk=4,left=8"},
    "bottle": {"kind": "adapter", "layers": [1], "dim": 4, "position": "parallel"},
}
VARIANTS = {
    "backbone": {"contexts": ["full", "chunk=4,left=8"]},
    "attention": {"submodels": ["attention"], "contexts": ["full", "chunk=4,left=8"]},
    "near": {"submodels": ["near"], "contexts": ["chunk=4,left=8", "chunk=8,left=8"]},
    "near-late": {"submodels": ["near"], "contexts": ["chunk=8,left=8"]},
    "all": {"submodels": ["near", "attention"], "contexts": ["chunk=4,left=8"]},
}


def make_run(path: Path, seed: int = 0, submodels: dict[str, Any] | None = None, **spec: Any) -> Path:
    """A run directory as training leaves one, of random weights (zeros nowhere)."""
    tokenizer = train_tokenizer(["the cat sat on the mat", "one two three"], "char", 100, path / TOKENIZER)
    content = {
        "vocab_size": tokenizer.vocab_size,
        "encoder": {
            "dim": 16,
            "num_layers": 3,
            "feedforward_dim": 16,
            "kernel_size": 3,
            "subsampling_channels": [2, 2],
        },
        "predictor": {"dim": 8},
        "joiner_dim": 16,
        "submodels": SUBMODELS if submodels is None else submodels,
        **spec,
    }
    torch.manual_seed(seed)
    model = AsrModel(from_dict(ModelSpec, content, "test"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    write_yaml(path / CONFIG, {"stage": "train-backbone"})
    write_model(path, model.spec)
    save_weights(path / WEIGHTS, model)
    entry = {
        "stage": "train-backbone",
        "command": f"asrkit train-backbone --seed {seed}",
        "created": "",
        "seconds": 1.5,
    }
    write_yaml(path / LINEAGE, [entry | digests_of(path)])
    return path


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three sub-models and five variants, ``near`` the default."""
    path = tmp_path_factory.mktemp("exp") / "near"
    return make_run(path, variants=VARIANTS, variant="near")


@pytest.fixture(scope="module")
def backbone(near: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without any sub-model."""
    folder, path = tmp_path_factory.mktemp("bare"), near
    for name in SUBMODELS:
        path = remove_submodel(path, name, folder / f"without-{name}").out
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def encoded(run: Path, variant: str) -> list[Tensor]:
    """What a variant makes of noise, in full context and in streaming."""
    model = load_model(open_run(run))
    features = torch.randn(2, 83, 80, generator=torch.Generator().manual_seed(1))
    lens = torch.tensor([83, 60])
    with torch.no_grad():
        return [model.encode(features, lens, variant, context)[0] for context in (FULL, Context(4, 8))]


def assert_same_outputs(one: Path, other: Path, variant: str, renamed: str | None = None) -> None:
    pairs = zip(encoded(one, variant), encoded(other, renamed or variant), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs), variant


def assert_complete(run: Path, parent: Path, stage: str) -> dict[str, Any]:
    """Every other command takes it, and its lineage goes on from its parent's; returns the last entry."""
    assert sorted(path.name for path in run.iterdir()) == sorted(
        [CONFIG, MODEL, WEIGHTS, TOKENIZER, TOKENS, LINEAGE, DONE]
    )
    opened = open_run(run)
    *before, entry = opened.lineage
    assert before == open_run(parent).lineage and entry["stage"] == opened.config["stage"] == stage
    assert opened.config["from"] == str(parent)
    assert opened.config["from_weights_sha256"] == sha256_of(parent / WEIGHTS)
    for key in ("command", "created", "config_sha256", "seconds", "metrics", "manifests", "versions"):
        assert key in entry, key
    for name in (TOKENIZER, TOKENS):
        assert (run / name).read_bytes() == (parent / name).read_bytes()
    assert describe_run(run)["stages"][-1] == entry
    assert load_recognizer(run).tokenizer.vocab_size == load_recognizer(parent).tokenizer.vocab_size
    return entry


def refused(*words: object, saying: str, out: Path | None = None) -> None:
    """Exactly one line that says it, exit code 1, and nothing written."""
    folder = None if out is None else out.parent
    before = {} if folder is None else contents(folder)
    code, printed, err = finish("submodel", *words)
    assert code == 1 and printed == ""
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and saying in err, err
    if folder is not None:
        assert contents(folder) == before


def test_list(near: Path, backbone: Path) -> None:
    code, out, _ = finish("submodel", "list", near)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["name", "kind", "layers", "position", "dim", "context", "parameters", "variants"] in rows
    attention = 3 * (2 * 16 + 4 * (16 * 16 + 16))
    assert ["attention", "attention", "0-2", "serial", "16", "full", f"{attention:,}", "attention,", "all"] in rows
    adapter = 2 * 16 + 16 * 4 + 4 + 4 * 16 + 16
    assert ["bottle", "adapter", "1", "parallel", "4", "-", str(adapter), "none"] in rows
    assert any(row[:6] == ["near", "attention", "0,2", "serial", "8", "chunk=4,left=8"] for row in rows)
    assert "default variant: near" in out
    code, out, _ = finish("submodel", "list", near, "--json")
    description = json.loads(out)
    assert description == describe_submodels(near)
    assert sum(part["parameters"] for part in description["submodels"]) == sum(
        parameter.numel() for parameter in load_model(open_run(near)).encoder.submodels.parameters()
    )
    assert list(description["variants"]) == list(VARIANTS)
    code, out, _ = finish("submodel", "list", backbone)
    assert code == 0 and "no sub-models" in out and "default variant: backbone" in out


@given(st.sets(st.integers(0, 20), min_size=1))
def test_layers_are_written_as_ranges(layers: set[int]) -> None:
    text = _ranges(sorted(layers))
    parts = [[int(number) for number in part.split("-")] for part in text.split(",")]
    assert [layer for part in parts for layer in range(part[0], part[-1] + 1)] == sorted(layers)
    assert all(later[0] > part[-1] + 1 for part, later in pairwise(parts))


def test_remove(near: Path, tmp_path: Path) -> None:
    code, out, _ = finish("submodel", "remove", "--from", near, "--name", "attention", "--out", tmp_path / "x")
    assert code == 0 and "removed sub-model attention and what used it: attention, all" in out
    assert "default" not in out  # near stays it
    entry = assert_complete(tmp_path / "x", near, "submodel remove")
    assert entry["command"] == f"asrkit submodel remove --from {near} --name attention --out {tmp_path / 'x'}"
    model, before = load_model(open_run(tmp_path / "x")), load_model(open_run(near))
    assert model.spec.variant == "near" and list(model.spec.variants) == ["backbone", "near", "near-late"]
    kept = {key: t for key, t in before.state_dict().items() if ".submodels.attention." not in key}
    assert model.state_dict().keys() == kept.keys() < before.state_dict().keys()
    assert all(torch.equal(tensor, kept[key]) for key, tensor in model.state_dict().items())
    for variant in ("backbone", "near"):
        assert_same_outputs(near, tmp_path / "x", variant)


def test_remove_the_default(near: Path, tmp_path: Path) -> None:
    code, out, _ = finish("submodel", "remove", "--from", near, "--name", "near", "--out", tmp_path / "x")
    assert code == 0 and "near, near-late, all" in out and "was near and is now backbone" in out
    assert_complete(tmp_path / "x", near, "submodel remove")
    spec = load_model(open_run(tmp_path / "x")).spec
    assert spec.variant == "backbone" and spec.variants["backbone"].contexts == ["full", "chunk=4,left=8"]


def test_remove_leaves_backbone_where_there_was_none(tmp_path: Path) -> None:
    variants = {"attention": {"submodels": ["attention"]}}
    run = make_run(tmp_path / "run", variants=variants, variant="attention")
    remove_submodel(run, "attention", tmp_path / "x")
    spec = load_model(open_run(tmp_path / "x")).spec
    assert list(spec.variants) == ["backbone"] and spec.variant == "backbone"


def test_remove_says_which_submodels_are_left_idle(tmp_path: Path) -> None:
    variants = {"backbone": {}, "all": {"submodels": ["near", "attention"]}}
    run = make_run(tmp_path / "run", variants=variants)
    notes = remove_submodel(run, "attention", tmp_path / "x").notes
    assert any("near is in no variant" in note for note in notes)


def test_there_and_back(near: Path, backbone: Path, tmp_path: Path) -> None:
    """Extracted and attached to the bare backbone, a sub-model gives what it gave."""
    file = tmp_path / "near.safetensors"
    code, out, _ = finish("submodel", "extract", "--from", near, "--name", "near", "--out", file)
    assert code == 0 and "variants near, near-late" in out and str(file) in out
    with safe_open(file, framework="pt") as opened:
        content = json.loads(opened.metadata()["content"])
    assert "layers.2.value.bias" in read_submodel(file).tensors
    assert content["backbone_sha256"] == backbone_digest(load_model(open_run(backbone)).state_dict())
    assert content["spec"] == to_dict(load_model(open_run(near)).spec.submodels["near"])
    assert content["variants"]["near"]["contexts"] == ["chunk=4,left=8", "chunk=8,left=8"]
    assert content["lineage"] == open_run(near).lineage

    code, out, err = finish("submodel", "attach", "--from", backbone, "--file", file, "--out", tmp_path / "y")
    assert code == 0 and err == "" and "default variant is still backbone" in out
    entry = assert_complete(tmp_path / "y", backbone, "submodel attach")
    assert entry["manifests"] == {str(file): sha256_of(file)} and entry["submodel_lineage"] == open_run(near).lineage
    spec = load_model(open_run(tmp_path / "y")).spec
    assert list(spec.variants) == ["backbone", "near", "near-late"] and spec.variant == "backbone"
    for variant in spec.variants:
        assert_same_outputs(near, tmp_path / "y", variant)
    assert not torch.equal(encoded(tmp_path / "y", "near")[0], encoded(tmp_path / "y", "backbone")[0])

    # Back once more: the very same file but for what happened since.
    extract_submodel(tmp_path / "y", "near", tmp_path / "again.safetensors")
    first, again = read_submodel(file), read_submodel(tmp_path / "again.safetensors")
    assert tensors_digest(first.tensors.items()) == tensors_digest(again.tensors.items())
    assert (first.spec, first.variants, first.backbone_sha256) == (
        again.spec,
        again.variants,
        again.backbone_sha256,
    )
    assert [entry["stage"] for entry in again.lineage][-1] == "submodel attach"


def test_attach_under_another_name(near: Path, tmp_path: Path) -> None:
    """Beside itself: all its variants get names of their own."""
    extract_submodel(near, "near", tmp_path / "near.safetensors")
    attach_submodel(near, tmp_path / "near.safetensors", tmp_path / "y", name="twin")
    spec = load_model(open_run(tmp_path / "y")).spec
    assert list(spec.submodels) == [*SUBMODELS, "twin"] and spec.submodels["twin"] == spec.submodels["near"]
    assert list(spec.variants) == [*VARIANTS, "twin", "twin-near-late"] and spec.variant == "near"
    assert spec.variants["twin-near-late"].contexts == ["chunk=8,left=8"]
    assert_same_outputs(near, tmp_path / "y", "near", "twin")
    assert_same_outputs(near, tmp_path / "y", "all")


def test_attach_what_was_never_alone(near: Path, backbone: Path, tmp_path: Path) -> None:
    notes = extract_submodel(near, "bottle", tmp_path / "bottle.safetensors").notes
    assert any("in no variant by itself" in note for note in notes)
    notes = attach_submodel(backbone, tmp_path / "bottle.safetensors", tmp_path / "y").notes
    assert any("asrkit submodel combine" in note for note in notes)
    combine_submodels(tmp_path / "y", "bottle", ["bottle"], tmp_path / "z", contexts=["full"])
    combine_submodels(near, "bottle", ["bottle"], tmp_path / "before", contexts=["full"])
    assert_same_outputs(tmp_path / "before", tmp_path / "z", "bottle")


def test_attach_warns_of_another_decoder(near: Path, backbone: Path, tmp_path: Path) -> None:
    """The encoder is the same, what reads its frames is not."""
    other = tmp_path / "other"
    run, model = open_run(backbone), load_model(open_run(backbone))
    with torch.no_grad():
        model.joiner.out.bias.add_(1.0)
    write_untrained_run(other, run, "test", {}, model)
    extract_submodel(near, "near", tmp_path / "near.safetensors")
    words = ("submodel", "attach", "--from", other, "--file", tmp_path / "near.safetensors", "--out", tmp_path / "y")
    code, _, err = finish(*words)
    assert code == 0 and err.startswith("warning: ") and "predictor, joiner or CTC head" in err
    assert_same_outputs(near, tmp_path / "y", "near")


def test_combine(near: Path, tmp_path: Path) -> None:
    words = (
        "submodel",
        "combine",
        "--from",
        near,
        "--variant",
        "both",
        "--submodel",
        "bottle",
        "--submodel",
        "near",
    )
    code, out, err = finish(*words, "--context", "left=8, chunk=4", "--context", "full", "--out", tmp_path / "z")
    assert code == 0 and "variant both: bottle, near; contexts chunk=4,left=8; full" in out
    assert "default variant is still near" in out
    assert [line for line in err.splitlines() if "near was never trained in context full" in line]
    assert [
        line for line in err.splitlines() if "bottle was never trained in context chunk=4,left=8, but in none" in line
    ]
    assert_complete(tmp_path / "z", near, "submodel combine")
    assert sha256_of(tmp_path / "z" / WEIGHTS) == sha256_of(near / WEIGHTS)
    recognizer = load_recognizer(tmp_path / "z", variant="both")
    assert recognizer.context == Context(4, 8)
    model = load_model(open_run(tmp_path / "z"))
    features, lens = torch.randn(1, 43, 80), torch.tensor([43])
    with torch.no_grad():
        both, _ = model.encode(features, lens, "both")
        expected, _ = model.encoder(features, lens, ["bottle", "near"])
        assert torch.equal(both, expected) and not torch.equal(both, model.encode(features, lens, "near")[0])
    for variant in VARIANTS:
        assert_same_outputs(near, tmp_path / "z", variant)


def test_combine_takes_the_contexts_all_were_trained_in(near: Path, tmp_path: Path) -> None:
    words = ("combine", "--from", near, "--variant", "both", "--submodel")
    code, _, err = finish("submodel", *words, "attention", "--submodel", "near", "--out", tmp_path / "z")
    assert code == 0 and err == ""
    assert load_model(open_run(tmp_path / "z")).spec.variants["both"].contexts == ["chunk=4,left=8"]
    out = tmp_path / "none" / "z"
    refused(*words, "bottle", "--submodel", "near", "--out", out, saying="bottle in none; near in", out=out)


@pytest.mark.slow
def test_refusals(near: Path, backbone: Path, tmp_path: Path) -> None:
    """Each in one line with what to do, and nothing is written."""
    out = tmp_path / "out"
    file = tmp_path / "files" / "near.safetensors"
    extract_submodel(near, "near", file)
    stranger = make_run(tmp_path / "stranger", seed=5, submodels={})
    mine = backbone_digest(load_model(open_run(near)).state_dict())
    other = backbone_digest(load_model(open_run(stranger)).state_dict())
    there = "it has attention, near, bottle"

    def case(*words: object, saying: str) -> None:
        refused(*words, saying=saying, out=out)

    case(
        "remove",
        "--from",
        near,
        "--name",
        "far",
        "--out",
        out,
        saying=f"--name far: {near} has no such sub-model; {there}",
    )
    case("remove", "--from", backbone, "--name", "far", "--out", out, saying="it has none")
    case("extract", "--from", near, "--name", "far", "--out", out, saying=there)
    case("extract", "--from", near, "--name", "near", "--out", file, saying=f"{file}: exists already")
    attach = ("attach", "--out", out, "--from")
    case(*attach, near, "--file", file, "--name", "bottle", saying="has a sub-model bottle already")
    case(*attach, near, "--file", file, "--name", "all", saying="has a variant all already")
    case(*attach, near, "--file", file, "--name", "2nd", saying="a letter first")
    case(*attach, backbone, "--file", tmp_path / "nothing", saying="no such file")
    case(*attach, stranger, "--file", file, saying=f"backbone {mine[:12]}, but {stranger} has backbone {other[:12]}")
    combine = ("combine", "--from", near, "--out", out, "--variant")
    case(*combine, "all", "--submodel", "near", saying="has a variant all already")
    case(*combine, "both", "--submodel", "far", saying=there)
    case(*combine, "a b", "--submodel", "near", saying="a letter first")
    case(*combine, "both", "--submodel", "near", "--submodel", "near", saying="named 2 times")
    case(*combine, "both", "--submodel", "near", "--context", "chunk=4", saying="chunk=4' is no context")
    case("remove", "--from", tmp_path / "nowhere", "--name", "near", "--out", out, saying="no such run directory")
    case("list", tmp_path / "nowhere", saying="no such run directory")
    assert not out.exists()

    code, _, err = finish("submodel", *attach[:2], file, "--from", near, "--file", file)
    assert code == 1 and [line[:6] for line in err.splitlines()] == ["error:"] * 3  # all findings at once
    for text in (f"{file}: is a file", "sub-model near already", "variant near-late already"):
        assert text in err


@pytest.mark.parametrize("words", [("remove", "--name", "near"), ("combine", "--variant", "c", "--submodel", "near")])
def test_an_occupied_place(near: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(*words, "--from", near, "--out", out, saying="not empty", out=out)
    (out / "notes.txt").unlink()
    code, _, _ = finish("submodel", *words, "--from", near, "--out", out)  # an empty directory will do
    assert code == 0 and (out / DONE).is_file()
    refused(*words, "--from", near, "--out", out, saying="not empty", out=out)
    beneath = near / WEIGHTS / "out"
    refused(*words, "--from", near, "--out", beneath, saying="cannot write", out=near / "out")


def test_a_damaged_run(near: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", variants=VARIANTS)
    weights = bytearray((run / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (run / WEIGHTS).write_bytes(weights)
    for words in (("list", run), ("remove", "--from", run, "--name", "near", "--out", tmp_path / "x")):
        refused(*words, saying="digest", out=tmp_path / "x")


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_damaged_file(
    data: st.DataObject, near: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut anywhere or one bit flipped anywhere, it is refused in one line."""
    folder = tmp_path_factory.mktemp("damaged")
    extract_submodel(near, "bottle", folder / "whole.safetensors")
    content = bytearray((folder / "whole.safetensors").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1), label="byte")
    if data.draw(st.booleans(), label="cut"):
        content = content[:place]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    (folder / "part.safetensors").write_bytes(content)
    try:
        part = read_submodel(folder / "part.safetensors")
    except UserError as error:
        assert len(error.lines) == 1 and "\n" not in error.lines[0]
        with pytest.raises(UserError):
            attach_submodel(backbone, folder / "part.safetensors", folder / "y")
        assert not (folder / "y").exists()
    else:  # a letter of the header that means nothing, such as a space
        whole = read_submodel(folder / "whole.safetensors")
        assert tensors_digest(part.tensors.items()) == tensors_digest(whole.tensors.items())
        assert part.spec == whole.spec and part.lineage == whole.lineage


def test_a_file_of_another_kind(near: Path, backbone: Path, tmp_path: Path) -> None:
    words = ("attach", "--from", backbone, "--out", tmp_path / "y", "--file")
    refused(*words, near / WEIGHTS, saying="is no sub-model", out=tmp_path / "y")
    refused(*words, near / MODEL, saying="damaged or no sub-model", out=tmp_path / "y")
    extract_submodel(near, "bottle", tmp_path / "bottle.safetensors")
    part = read_submodel(tmp_path / "bottle.safetensors")
    with safe_open(tmp_path / "bottle.safetensors", framework="pt") as opened:
        header = opened.metadata()
    changed = {key: tensor + 1 for key, tensor in part.tensors.items()}
    save_file(changed, tmp_path / "changed.safetensors", header)
    refused(*words, tmp_path / "changed.safetensors", saying="digests differ", out=tmp_path / "y")
    edited = header | {"content": header["content"].replace(part.backbone_sha256, "0" * 64)}
    save_file(part.tensors, tmp_path / "edited.safetensors", edited)
    refused(*words, tmp_path / "edited.safetensors", saying="digests differ", out=tmp_path / "y")


def test_a_failure_leaves_nothing(near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up at the weights, after other files were written."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("asrkit.training.run_writer.save_weights", full)
    with pytest.raises(UserError, match=r"x: cannot write \(No space left on device\)"):
        remove_submodel(near, "near", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "standard-output").symlink_to("/proc/self/fd/1")
    for path in (tmp_path / "pipe", tmp_path / "standard-output"):
        with pytest.raises(UserError, match="is a device or a pipe, not a file"), atomic_write(path) as temporary:
            temporary.write_text("x")
        assert special(path)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "standard-output"}


def test_atomic_directory(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "new") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "new").exists()
    assert contents(tmp_path) == {"new/a": b"a"}
    with pytest.raises(UserError, match="choose another --out"), atomic_directory(tmp_path / "new") as folder:
        (folder / "b").write_text("b")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "other") as folder:
        (folder / "c").write_text("c")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"new/a": b"a"} and [path.name for path in tmp_path.iterdir()] == ["new"]


def test_backbone_digest(near: Path) -> None:
    """Of the encoder without its sub-models: every name, type, shape and bit counts, nothing else does."""
    tensors = load_model(open_run(near)).state_dict()
    before = backbone_digest(tensors)
    assert before == backbone_digest(dict(reversed(tensors.items())))
    assert before == backbone_digest(load_model(open_run(near)).state_dict())
    backbone_keys = [key for key in tensors if key.startswith("encoder.") and ".submodels." not in key]
    assert "encoder.normalize.mean" in backbone_keys
    for key, tensor in tensors.items():
        changed = backbone_digest(tensors | {key: -tensor - 1})
        assert (changed != before) == (key in backbone_keys), key
    key = "encoder.blocks.0.conv.depthwise.weight"
    for other in (tensors[key].double(), tensors[key].flatten(), tensors[key].t()):
        assert backbone_digest(tensors | {key: other}) != before
    assert backbone_digest({name: t for name, t in tensors.items() if name != key}) != before
    assert backbone_digest(tensors | {key: tensors[key].t().contiguous().t()}) == before  # strides are no content


def test_help_shows_examples() -> None:
    for name in ("list", "remove", "extract", "attach", "combine"):
        code, out, _ = finish("submodel", name, "--help")
        assert code == 0 and f"asrkit submodel {name} " in " ".join(out.split()), name


def test_config_is_what_was_asked(near: Path, tmp_path: Path) -> None:
    """config.yaml holds what it takes to do it again, and its digest is in the lineage."""
    combine_submodels(near, "both", ["near", "attention"], tmp_path / "z", command="asrkit test")
    config = read_yaml(tmp_path / "z" / CONFIG)
    assert config == {
        "stage": "submodel combine",
        "from": str(near),
        "from_weights_sha256": sha256_of(near / WEIGHTS),
        "variant": "both",
        "submodels": ["near", "attention"],
        "contexts": ["chunk=4,left=8"],
        "inputs": {},
    }
    entry = open_run(tmp_path / "z").lineage[-1]
    assert entry["config_sha256"] == digest(config) and entry["command"] == "asrkit test"
