"""supernet: what it promises of the run it writes, what other commands make of that run, and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from asrkit.config import to_dict
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.exported import ExportedAcousticModel
from asrkit.export.directory import open_exported
from asrkit.export.runtime import ExportedModel
from asrkit.methods.supernet import masks
from asrkit.methods.supernet.masks import density, masks_digest
from asrkit.models.compression import block_of, compressed_layers
from asrkit.models.registry import load_encoder
from asrkit.models.surgery import in_variant, is_mask
from asrkit.nn.compression import find_mask
from asrkit.nn.context import parse_context
from asrkit.run_dir import CONFIG, LINEAGE, STATE, WEIGHTS, digests_of, open_run, read_yaml, write_yaml
from asrkit.stages.info import describe_run
from asrkit.stages.supernet_cut import trained_loss
from asrkit.training.asr_loss import LossConfig
from asrkit.training.checkpoint import STATE_FILE, save_weights
from helpers.commands import QUICK, TWO, asrkit, killed, launched, quick, sets
from helpers.run_dirs import metrics, model_of, weights_equal
from helpers.small_runs import write_encoder
from helpers.tones import data, make_corpus

SHAPE = [
    "model.size=tiny", "model.num_layers=2", "model.dim=32", "model.feedforward_dim=48", "tokenizer.vocab_size=18",
    "model.attention_dropout.probability=0",
]  # fmt: skip
GROWTH = ["growth.interval=1", "growth.share=0.3", "seed=2", "training.optimizer.warm_up_steps=0"]
STREAMING = "chunk=4,left=8"
MEMBERS = ["--sparsity", "0.5", "--sparse", STREAMING]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, 12)
    make_corpus(folder, 4, seed=1, name="dev")
    return folder


@pytest.fixture(scope="module")
def parent(corpus: Path) -> Path:
    """A small Conformer, with a sub-model that no supernet of `joint` uses."""
    run = corpus / "parent"
    asrkit("train-backbone", *data(corpus), "--out", run, *quick(*SHAPE))
    asrkit("add-submodel", "--from", run, "--name", "other", "--kind", "adapter", *data(corpus), "--out", corpus / "more",
           *quick("training.steps=1"))  # fmt: skip
    return corpus / "more"


@pytest.fixture(scope="module")
def supernet(corpus: Path, parent: Path) -> Path:
    run = corpus / "super"
    words = ["--from", parent, "--variant", "joint", *MEMBERS, *data(corpus), "--out", run]
    said = asrkit("supernet", *words, *quick(*GROWTH, "lasso.scale=0.5", "training.steps=6"))
    assert f"never trained in {STREAMING} but in full" in said and "final from step 2 on" in said
    return run


def test_one_checkpoint_is_two_models(supernet: Path, corpus: Path) -> None:
    spec = open_run(supernet).model_spec
    assert spec["variant"] == "sparse" and list(spec["submodels"]) == ["joint"]
    assert spec["variants"] == {
        "dense": {"submodels": ["joint"], "contexts": ["full"], "masks": False, "integers": True},
        "sparse": {"submodels": ["joint"], "contexts": [STREAMING], "masks": True, "integers": True},
    }
    model = model_of(supernet)
    layers = compressed_layers(model)
    assert all(path.startswith("encoder.") for path in layers) and any(".submodels." in path for path in layers)
    for layer in layers.values():
        blocks = layer.mask.view(-1, 8, layer.in_features)
        assert torch.equal(blocks.all(1), blocks.any(1))
        assert int((~blocks.all(1)).sum()) == round(0.5 * blocks[:, 0].numel())
        assert layer.weight[~layer.mask].any(), "the dense member has lost its weights"
    rows = metrics(supernet)
    assert [row["sparsity"] for row in rows if "sparsity" in row] == pytest.approx([0.0, 0.3, *[0.5] * 4])
    assert any("dense" in row for row in rows) and any("sparse" in row for row in rows)
    assert any({"dev_wer", "dev_dense_wer"} <= set(row) for row in rows)
    assert open_run(supernet).lineage[-1]["masks_final_before_step"] == 2
    described = {row["variant"]: row for row in describe_run(supernet)["variants"]}
    assert described["sparse"]["bytes"] < described["dense"]["bytes"]
    outputs: dict[str, Tensor] = {}
    features, lens = torch.randn(1, 83, 80) * 3 - 8, torch.tensor([83])
    for variant in ("dense", "sparse"):
        asrkit("evaluate", "--from", supernet, "--variant", variant, "--manifest", corpus / "dev.jsonl.gz")
        with torch.no_grad():
            outputs[variant] = model.encode(features, lens, variant)[0]
    assert not torch.allclose(outputs["dense"], outputs["sparse"], atol=1e-3)


@pytest.mark.slow
def test_without_masks_it_is_dual_mode_training_bit_for_bit(
    corpus: Path, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "grow_masks", lambda *_: None)
    settings = quick("seed=2", "training.keep=last", "training.optimizer.warm_up_steps=0")
    asrkit("supernet", "--from", parent, "--variant", "joint", *MEMBERS, *data(corpus), "--out", tmp_path / "super",
           *settings, "--set", "growth.interval=1", "--set", "growth.share=0.3")  # fmt: skip
    asrkit("train-backbone", "--from", parent, "--variant", "joint", *data(corpus), "--out", tmp_path / "dual", *settings,
           "--set", f"contexts.train=[full,'{STREAMING}']")  # fmt: skip
    one, other = (open_run(tmp_path / name).weights() for name in ("super", "dual"))
    assert all(bool(tensor.all()) for name, tensor in one.items() if is_mask(name))
    for name, tensor in other.items():
        assert name.startswith("encoder.submodels.other.") or torch.equal(tensor, one[name]), name
    assert any("sparse" in row for row in metrics(tmp_path / "super"))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(corpus: Path, parent: Path, tmp_path: Path) -> None:
    for kind in ("whole", "parted"):
        words = ["supernet", "--from", parent, "--variant", "joint", *MEMBERS, *data(corpus), "--out", tmp_path / kind,
                 *quick(*GROWTH, "growth.start=2", "growth.score=adam", "growth.monotone=false", "lasso.scale=1",
                        "adaptive_dropout=true", "distillation.scale=0.2", "draws=[1,2]", "training.steps=6",
                        "training.save_every=1")]  # fmt: skip
        if kind == "parted":
            killed("step 3", *words)
            assert not (tmp_path / kind / "done").exists()
        asrkit(*words)
    assert weights_equal(tmp_path / "whole", tmp_path / "parted")


@pytest.mark.slow
def test_processes_draw_their_members_independently(corpus: Path, parent: Path, tmp_path: Path) -> None:
    """Two processes end with the weights of one that computes both slices; in some steps they train different members."""
    words = ["supernet", "--from", parent, "--variant", "joint", *MEMBERS, *data(corpus)]
    settings = quick(*GROWTH, "training.steps=6", "training.average_decay=0", "lasso.scale=1")
    launched(TWO, *words, "--out", tmp_path / "two", *settings)
    asrkit(*words, "--out", tmp_path / "one", *settings, "--set", "training.accumulate=2")
    assert weights_equal(tmp_path / "two", tmp_path / "one")
    rows = [row for row in metrics(tmp_path / "two") if "loss" in row]
    drawn = [("dense" in row, "sparse" in row) for row in rows]
    assert (True, True) in drawn and len(set(drawn)) > 1


@pytest.mark.slow
def test_masks_are_kept_when_they_are_frozen(corpus: Path, supernet: Path, tmp_path: Path) -> None:
    run = tmp_path / "tuned"
    words = ["supernet", "--from", supernet, "--freeze-masks", "--sparse", STREAMING, *data(corpus), "--out", run]
    said = asrkit(*words, *quick("seed=2", "adaptive_dropout=true"))
    assert "the masks are the parent's and stay" in said and "warning" not in said
    before, after = open_run(supernet).weights(), open_run(run).weights()
    assert masks_digest(before) == masks_digest(after) == open_run(run).lineage[-1]["masks_sha256"]
    name = "encoder.blocks.0.conv.out.weight"
    assert not torch.equal(before[name], after[name])
    assert [row["sparsity"] for row in metrics(run) if "sparsity" in row] == pytest.approx(
        [1 - density(model_of(run))] * 4
    )
    said = asrkit(*words[:-1], tmp_path / "no", "--sparsity", "0.4", *quick(), code=1)
    assert "leave out sparsity" in said and not (tmp_path / "no").exists()
    said = asrkit(*words[:-1], tmp_path / "no", *quick("members.random=3"), code=1)
    assert "members.random: this supernet has no members between its two" in said


@pytest.mark.slow
def test_the_exported_sparse_member_is_the_one_in_torch(supernet: Path, tmp_path: Path) -> None:
    """To rounding, chunk by chunk; and the file takes the bytes that are accounted for."""
    asrkit("export", "--from", supernet, "--variant", "sparse", "--streaming", "--out", tmp_path / "onnx")
    exported = open_exported(tmp_path / "onnx")
    for name, part in exported.parts.items():
        assert part.counted <= part.stored <= part.counted + 64, name
    assert exported.parts["backbone"].stored < 0.7 * exported.parts["backbone"].float32
    context = parse_context(STREAMING)
    model = TorchAcousticModel(model_of(supernet), "sparse", context)
    files = ExportedAcousticModel(
        ExportedModel(tmp_path / "onnx", exported.state_size), context, model.vocab_size, model.context_size
    )
    features = torch.randn(1, 99, 80) * 3 - 8
    ours, theirs = (one.encode(features, torch.tensor([99])) for one in (model, files))
    torch.testing.assert_close(theirs.joiner_in, ours.joiner_in, rtol=1e-3, atol=1e-3)
    dense = TorchAcousticModel(model_of(supernet), "dense", context).encode(features, torch.tensor([99]))
    assert not torch.allclose(dense.joiner_in, ours.joiner_in, atol=1e-2)
    asrkit("export", "--from", supernet, "--variant", "dense", "--out", tmp_path / "server")
    assert open_exported(tmp_path / "server").parts["backbone"].stored >= exported.parts["backbone"].float32 - 64


@pytest.mark.slow
def test_a_member_is_compressed_by_itself(corpus: Path, supernet: Path, tmp_path: Path) -> None:
    said = asrkit("qat", "--from", supernet, "--variant", "sparse", "--bits", 4, *data(corpus), "--out", tmp_path / "int4",
                  *quick())  # fmt: skip
    assert f"variant sparse alone: dense of {supernet} share its weights" in said
    assert list(open_run(tmp_path / "int4").model_spec["variants"]) == ["sparse"]
    before, after = compressed_layers(model_of(supernet)), compressed_layers(model_of(tmp_path / "int4"))
    for path, layer in after.items():
        assert torch.equal(layer.mask, before[path].mask) and not layer.weight[~layer.mask].any()
        assert not layer.codes().codes[~layer.mask].any()
    asrkit("evaluate", "--from", tmp_path / "int4", "--manifest", corpus / "dev.jsonl.gz")
    asrkit("export", "--from", tmp_path / "int4", "--streaming", "--out", tmp_path / "onnx")
    # The dense member is pruned in another way; the sparse one is pruned already.
    asrkit("prune", "--from", supernet, "--variant", "dense", "--sparsity", "2:4", *data(corpus), "--out", tmp_path / "nm",
           *quick())  # fmt: skip
    for layer in compressed_layers(model_of(tmp_path / "nm")).values():
        assert bool((layer.mask.view(layer.out_features, -1, 4).sum(-1) == 2).all())
    said = asrkit("prune", "--from", supernet, *data(corpus), "--out", tmp_path / "no", *quick(), code=1)
    assert "pruned already" in said
    # Without training, both are quantized.
    asrkit("quantize", "--from", supernet, "--bits", 8, "--out", tmp_path / "int8")
    sizes = {row["variant"]: row["bytes"] for row in describe_run(tmp_path / "int8")["variants"]}
    plain = {row["variant"]: row["bytes"] for row in describe_run(supernet)["variants"]}
    assert sizes["sparse"] < sizes["dense"] < plain["sparse"] < plain["dense"]


@pytest.mark.slow
def test_other_stages_on_a_supernet(corpus: Path, supernet: Path, tmp_path: Path) -> None:
    """What is trained on a member runs with that member's masks."""
    asrkit("add-submodel", "--from", supernet, "--name", "near", *data(corpus), "--out", tmp_path / "near",
           *quick("training.steps=1"))  # fmt: skip
    variants = open_run(tmp_path / "near").model_spec["variants"]
    assert variants["near"]["masks"] and not variants["dense"]["masks"]
    said = asrkit("train-backbone", "--from", supernet, "--variant", "dense", *data(corpus), "--out", tmp_path / "on",
           *quick("training.steps=1"))  # fmt: skip
    assert "variant dense alone is trained: sparse shares its weights" in said
    spec = open_run(tmp_path / "on").model_spec
    assert spec["variant"] == "dense" and not spec["variants"]["dense"]["masks"]
    before, after = open_run(supernet).weights(), open_run(tmp_path / "on").weights()
    assert masks_digest(before) == masks_digest(after)
    said = asrkit("sequence-train", "--from", supernet, "--criterion", "mwer", *data(corpus), "--out", tmp_path / "mwer",
                  *quick("training.steps=1"))  # fmt: skip
    assert "variant sparse alone is trained: dense shares its weights" in said
    assert masks_digest(before) == masks_digest(open_run(tmp_path / "mwer").weights())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sparsity", "1.5"], "less than 1"),
        (["--block", "8"], "write outputs x inputs"),
        (["--block", "7x1"], "blocks of 7x1 do not divide"),
        (["--sparsity", "0.99", "--block", "32x16", "--set", "growth.share=0.9"], "is all of them"),
        (["--sparse", "soon"], "is no context"),
        (["--variant", "none"], "there are backbone, joint, other"),
        (["--set", "growth.interval=4"], "would be reached at step 8, but training.steps is 4"),
        (["--set", "growth.score=adam", "--set", "growth.start=0"], "set growth.start (0) above 0"),
        (["--set", "growth.score=adam", "--set", "training.optimizer.name=sgd"], "needs the second moments of adamw"),
        (["--lasso", "1", "--set", "lasso.start=2"], "lasso: would begin at step 2 and end at step 2"),
        (["--set", "dense_steps=4"], "the sparse member would never be trained"),
        (["--set", "contexts.train=[full]"], "use --dense and --sparse"),
        (["--set", "layers.only=[encoder,joiner]"], "joiner stays dense"),
        (["--set", "distillation.scale=1", "--set", "loss.transducer_scale=0"], "compares transducers"),
        (["--freeze-masks"], "leave out growth"),
        (["--set", "members.sparsities=[0.5,0.7]"], "stay below the sparsity of 0.67"),
        (["--set", "members.sparsities=[0.5]", "--set", "draws=[1,2]"], "leave draws out"),
        (["--set", "layers.include=[nothing]"], "nothing matches no linear layer"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    corpus: Path, parent: Path, tmp_path: Path, words: list[str], complaint: str
) -> None:
    out = tmp_path / "run"
    brief = quick("growth.interval=1", "growth.share=0.5")
    said = asrkit("supernet", "--from", parent, *data(corpus), "--out", out, *brief, *words, code=1)
    assert complaint in said and "Traceback" not in said
    assert not out.exists()


@pytest.mark.slow
def test_parents_that_cannot_become_one(corpus: Path, parent: Path, supernet: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asrkit("quantize", "--from", parent, "--out", tmp_path / "int8")
    asrkit("prune", "--from", parent, *data(corpus), "--out", tmp_path / "pruned", *quick("training.steps=1"))
    for run, complaint, *words in (
        (supernet, "is a supernet already"),
        (tmp_path / "int8", "is quantized already"),
        (tmp_path / "pruned", "is pruned already"),
        (tmp_path / "pruned", "is pruned already", "--freeze-masks"),
        (parent, "has no masks to keep", "--freeze-masks"),
    ):
        said = asrkit(
            "supernet", "--from", run, *words, *data(corpus), "--out", out, *quick("training.steps=2000"), code=1
        )
        assert complaint in said and said.count("\n") == 1 and not out.exists()


# --- a pretrained encoder

PRETRAINED = {
    "encoder": {"dim": 32, "num_layers": 2, "feedforward_dim": 48, "kernel_size": 5},
    "objective": {"groups": 2, "entries": 4, "code_dim": 8, "final_dim": 8},
}


@pytest.mark.slow
def test_a_supernet_of_a_pretrained_encoder(corpus: Path, tmp_path: Path) -> None:
    """It gets a tokenizer and heads, which are trained alone at first: no decay and no mask touches the encoder in these steps, and the
    subsampling, which is never trained, has no mask."""
    encoder = write_encoder(tmp_path / "pre", PRETRAINED)
    words = ["supernet", "--from", encoder, *MEMBERS, "--lasso", 1, *data(corpus)]
    settings = quick(*GROWTH, "tokenizer.vocab_size=18", "training.steps=8", "pretrained.frozen_steps=4",
                     "training.average_decay=0", "training.save_every=1")  # fmt: skip
    killed("step 4/", *words, "--out", tmp_path / "super", *settings)
    state = load_file(tmp_path / "super" / STATE / STATE_FILE)
    before = {name: tensor for name, tensor in open_run(encoder).weights().items() if name.startswith("encoder.")}
    assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in before.items())
    asrkit(*words, "--out", tmp_path / "super", *settings)
    asrkit(*words, "--out", tmp_path / "whole", *settings)
    assert weights_equal(tmp_path / "super", tmp_path / "whole")
    model = model_of(tmp_path / "super")
    assert list(model.spec.variants) == ["dense", "sparse"] and density(model) == pytest.approx(0.5, abs=0.01)
    after = model.state_dict()
    assert torch.equal(after["encoder.subsampling.out.weight"], before["encoder.subsampling.out.weight"])
    assert not torch.equal(after["encoder.blocks.0.conv.out.weight"], before["encoder.blocks.0.conv.out.weight"])
    assert not any(path.startswith("encoder.subsampling.") for path in compressed_layers(model))
    assert read_yaml(tmp_path / "super" / CONFIG)["growth"]["start"] == 5
    assert [entry["stage"] for entry in open_run(tmp_path / "super").lineage] == ["pretrain", "supernet"]
    for wrong, complaint in (
        (["growth.score=adam", "pretrained.freeze_embed=false", "growth.start=4"], "set growth.start (4) above 4"),
        (["growth.start=3", "lasso.end=7"], "the encoder is trained from step 4 on"),
        (["growth.start=4", "lasso.end=4"], "lasso: would begin at step 4 and end at step 4"),
        (["model.dim=16"], "already has its shape"),
    ):
        said = asrkit(*words, "--out", tmp_path / "no", *settings, *sets(*wrong), code=1)
        assert complaint in said and said.count("\n") == 1 and not (tmp_path / "no").exists()


def with_masks(folder: Path) -> Path:
    """A pretrained encoder whose masks have been found."""
    how = {"mask": {"sparsity": 0.5, "block": [8, 1]}}
    paths = [f"encoder.blocks.{block}.{path}" for block in (0, 1) for path in ("conv.out", "feedforward1.widen")]
    spec = {
        "compression": dict.fromkeys(paths, how),
        "variants": {"dense": {"masks": False}, "sparse": {}},
        "variant": "dense",
    }
    path = write_encoder(folder / "masked", PRETRAINED | spec)
    model = load_encoder(open_run(path))
    for layer in compressed_layers(model).values():
        assert layer.how.mask is not None
        layer.mask.copy_(find_mask(layer.weight.detach().abs(), layer.how.mask))
    save_weights(path / WEIGHTS, model)
    write_yaml(path / LINEAGE, [read_yaml(path / LINEAGE)[-1] | digests_of(path)])
    return path


def test_an_encoder_has_the_masks_of_its_variant(tmp_path: Path) -> None:
    model = load_encoder(open_run(with_masks(tmp_path)))
    features, lens = torch.randn(1, 83, 80), torch.tensor([83])
    outputs: dict[str, Tensor] = {}
    for variant in ("dense", "sparse", "dense"):
        with torch.no_grad():
            again = model.encoder(features, lens, model.select(variant))[0]
        assert torch.equal(outputs.setdefault(variant, again), again)
    assert not torch.allclose(outputs["dense"], outputs["sparse"], atol=1e-3)


@pytest.mark.slow
def test_masks_found_in_pretraining_are_kept(corpus: Path, tmp_path: Path) -> None:
    encoder = with_masks(tmp_path)
    words = ["supernet", "--from", encoder, "--sparse", STREAMING, *data(corpus), "--out", tmp_path / "super",
             *quick("tokenizer.vocab_size=18", "seed=2")]  # fmt: skip
    assert "keep its masks with --freeze-masks" in asrkit(*words, code=1)
    asrkit(*words, "--freeze-masks")
    before, after = (open_run(path).weights() for path in (encoder, tmp_path / "super"))
    assert masks_digest(before) == masks_digest(after) and any(is_mask(name) for name in after)
    name = "encoder.blocks.0.conv.out"
    assert (after[f"{name}.weight"] != before[f"{name}.weight"])[~after[f"{name}.mask"]].any()
    asrkit("train-backbone", "--from", encoder, "--variant", "sparse", *data(corpus), "--out", tmp_path / "one",
           *quick("tokenizer.vocab_size=18", "training.steps=1"))  # fmt: skip
    assert masks_digest(before) == masks_digest(open_run(tmp_path / "one").weights())


@pytest.mark.slow
def test_masks_are_found_while_an_encoder_is_pretrained(corpus: Path, tmp_path: Path) -> None:
    """pretrain --supernet, killed and gone on with, new and from an encoder; then a supernet that keeps its masks."""
    small = ["model.num_layers=2", "model.dim=32", "model.feedforward_dim=48", "model.kernel_size=5", "quantizer.entries=16",
             "quantizer.code_dim=16", "quantizer.final_dim=16"]  # fmt: skip
    brief = [each for each in QUICK if not each.startswith("loss.")] + [
        "mask.distractors=20",
        "training.steps=5",
        "training.save_every=1",
    ]
    grown = ["supernet.growth.interval=1", "supernet.growth.share=0.3", "supernet.lasso.scale=1", "seed=2"]
    words = ["pretrain", "--supernet", "--sparsity", 0.5, *data(corpus), *sets(*brief, *grown)]
    killed("step 3/", *words, *sets(*small), "--out", tmp_path / "pre")
    for out in ("pre", "whole"):
        asrkit(*words, *sets(*small), "--out", tmp_path / out)
    assert weights_equal(tmp_path / "pre", tmp_path / "whole")
    model = load_encoder(open_run(tmp_path / "pre"))
    assert model.spec.variant == "dense" and [one.masks for one in model.spec.variants.values()] == [False, True]
    assert density(model) == pytest.approx(0.5, abs=0.01) and not any(
        "objective" in path for path in compressed_layers(model)
    )
    assert all(layer.weight[~layer.mask].any() for layer in compressed_layers(model).values())
    rows = metrics(tmp_path / "pre")
    assert [row["sparsity"] for row in rows if "sparsity" in row] == pytest.approx([0.0, 0.3, 0.5, 0.5, 0.5])
    assert any("dense" in row for row in rows) and any("sparse" in row for row in rows)
    assert any({"dev_contrastive", "dev_sparse_contrastive"} <= set(row) for row in rows)
    asrkit("info", tmp_path / "pre")
    asrkit("supernet", "--from", tmp_path / "pre", "--freeze-masks", "--sparse", STREAMING, *data(corpus), "--out", tmp_path / "super",
           *quick("tokenizer.vocab_size=18"))  # fmt: skip
    found, kept = (open_run(tmp_path / name).weights() for name in ("pre", "super"))
    assert masks_digest(found) == masks_digest(kept)
    alone = ["pretrain", "--from", tmp_path / "pre", *data(corpus), *sets(*brief, "training.steps=1")]
    assert "variant dense alone is trained: sparse shares its weights" in asrkit(*alone, "--out", tmp_path / "alone")
    # From an encoder that was pretrained densely; one with masks is refused, and so is a schedule that is too long.
    asrkit("pretrain", *data(corpus), *sets(*brief, *small), "--out", tmp_path / "dense")
    asrkit(*words, "--from", tmp_path / "dense", "--out", tmp_path / "further")
    assert density(load_encoder(open_run(tmp_path / "further"))) == pytest.approx(0.5, abs=0.01)
    for wrong, complaint in (
        ([*words, "--from", tmp_path / "pre"], "is a supernet already"),
        ([*words, *sets("supernet.growth.interval=9")], "would be reached at step 18"),
        (
            [*words, *sets("supernet.growth.score=adam", "supernet.growth.start=0")],
            "set supernet.growth.start (0) above 0",
        ),
        (["pretrain", "--sparsity", 0.5, *data(corpus)], "works only with --supernet"),
    ):
        said = asrkit(*wrong, "--out", tmp_path / "no", code=1)
        assert complaint in said and said.count("\n") == 1 and not (tmp_path / "no").exists()


# --- members between the two, and what is cut out

LEVELS = [
    "members.sparsities=[0.1,0.3]",
    "growth.kind=cubic",
    "growth.times=2",
    "growth.monotone=false",
    "growth.score=adam",
]


@pytest.fixture(scope="module")
def many(corpus: Path, parent: Path) -> Path:
    run = corpus / "many"
    words = ["--from", parent, "--variant", "joint", *MEMBERS, *data(corpus), "--out", run]
    asrkit(
        "supernet",
        *words,
        *quick(*GROWTH, *LEVELS, "training.steps=4", "distillation.scale=0.1", "adaptive_dropout=true"),
    )
    return run


@pytest.mark.slow
def test_any_member_is_cut_out_as_a_run(corpus: Path, many: Path, supernet: Path, tmp_path: Path) -> None:
    model = model_of(many)
    assert any(name.endswith(".reach") for name in model.state_dict())
    assert not any(name.endswith(".reach") for name in in_variant(model, "sparse").state_dict())
    assert all(row.get("random") for row in metrics(many) if "loss" in row)
    features, lens = torch.randn(1, 83, 80) * 3 - 8, torch.tensor([83])
    for text, shares in (("0.3", (0.3, 0.3, 0.3)), ("0.5", (0.5, 0.5, 0.5)), ("0.1,0.5,0.3", (0.1, 0.5, 0.3))):
        run = tmp_path / text
        asrkit("supernet-cut", "--from", many, "--sparsity", text, "--out", run)
        alone = model_of(run)
        assert list(alone.spec.variants) == ["sparse"] and alone.spec.variants["sparse"].contexts == [STREAMING]
        assert not any(name.endswith(".reach") for name in alone.state_dict())
        for path, layer in compressed_layers(alone).items():
            share = (
                shares[0] if ".blocks." not in path and ".layers." not in path else shares[1 + (block_of(path) or 0)]
            )
            assert int((~layer.mask).sum()) == 8 * round(share * layer.mask.numel() / 8), path
            assert not layer.weight[~layer.mask].any()
        assert list(open_run(run).lineage[-1]["sparsities"].values()) == list(shares)
        if text == "0.5":  # the sparse variant itself
            with torch.no_grad():
                outputs = [one.encode(features, lens, "sparse")[0] for one in (model, alone)]
            torch.testing.assert_close(*outputs)
    asrkit("evaluate", "--from", run, "--manifest", corpus / "dev.jsonl.gz")
    asrkit("export", "--from", run, "--streaming", "--out", tmp_path / "onnx")
    asrkit("qat", "--from", run, "--bits", 4, *data(corpus), "--out", tmp_path / "int4", *quick("training.steps=1"))
    said = asrkit("supernet", "--from", many, "--freeze-masks", "--sparse", STREAMING, *data(corpus), "--out", tmp_path / "no",
                  *quick("draws=[1,2]"), code=1)  # fmt: skip
    assert "leave draws out" in said
    # Two members: either of them.
    asrkit("supernet-cut", "--from", supernet, "--sparsity", 0, "--out", tmp_path / "dense")
    assert not compressed_layers(model_of(tmp_path / "dense"))
    said = asrkit("supernet-cut", "--from", supernet, "--sparsity", 0.3, "--out", tmp_path / "no", code=1)
    assert "no member of" in said and "choose from 0.5, or 0" in said and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_member_within_a_budget_is_searched(corpus: Path, many: Path, tmp_path: Path) -> None:
    words = [
        "supernet-cut",
        "--from",
        many,
        "--dev",
        corpus / "dev.jsonl.gz",
        "--set",
        "population=6",
        "--set",
        "generations=2",
    ]
    said = asrkit(*words, "--budget", "82%", "--out", tmp_path / "small")
    (row,) = describe_run(tmp_path / "small")["variants"]
    whole = next(row for row in describe_run(many)["variants"] if row["variant"] == "dense")["bytes"]
    assert row["bytes"] <= 0.82 * whole
    assert "generation 2: loss" in said and f"{row['bytes']:,} bytes" in said
    asrkit(*words, "--budget", "82%", "--out", tmp_path / "again")
    assert weights_equal(tmp_path / "small", tmp_path / "again")
    said = asrkit(*words, "--budget", "20%", "--out", tmp_path / "no", code=1)
    assert "the sparsest member needs" in said and not (tmp_path / "no").exists()
    trained = read_yaml(many / CONFIG)["loss"]
    assert (
        to_dict(trained_loss(open_run(many))) == trained | {"warm_up_steps": 0} != to_dict(LossConfig(warm_up_steps=0))
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "give either --sparsity, or --budget"),
        (["--budget", "50%"], "give both"),
        (["--sparsity", "much"], "write a share such as 0.5"),
        (["--sparsity", "0.5"], "is no supernet"),
    ],
)
def test_mistakes_of_cutting(parent: Path, tmp_path: Path, words: list[str], complaint: str) -> None:
    said = asrkit("supernet-cut", "--from", parent, *words, "--out", tmp_path / "run", code=1)
    assert complaint in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sparsities_that_no_member_has(many: Path, tmp_path: Path) -> None:
    for text, complaint in (
        ("0.2", "choose from 0.1, 0.3, 0.5"),
        ("0.1,0.3", "give one, or 3, for outside of blocks, block 0, block 1"),
    ):
        said = asrkit("supernet-cut", "--from", many, "--sparsity", text, "--out", tmp_path / "run", code=1)
        assert complaint in said and said.count("\n") == 1 and not (tmp_path / "run").exists()
