"""add-submodel: what is frozen stays frozen, bit for bit; what is added learns; mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from asrkit.models import load_model
from asrkit.models.digests import backbone_digest
from asrkit.nn.context import FULL, Context
from asrkit.run_dir import open_run
from helpers.commands import asrkit, killed, quick
from helpers.run_dirs import weights_equal
from helpers.tones import make_corpus

# Of a new variant: all the compression there is.
ON = {"masks": True, "integers": True}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, 16)
    make_corpus(folder, 4, seed=1, name="dev")
    return folder


@pytest.fixture(scope="module")
def backbone(corpus: Path) -> Path:
    """Trained with attention dropout in two contexts, so it has a sub-model ``joint``."""
    run = corpus / "backbone"
    asrkit(
        "train-backbone", "--manifest", corpus / "train.jsonl.gz", "--dev", corpus / "dev.jsonl.gz", "--out", run,
        "--max-duration", 20, *quick(
            "model.size=tiny", "model.num_layers=2", "model.dim=32", "model.feedforward_dim=32", "tokenizer.vocab_size=18",
            "model.attention_dropout.probability=0.5", "contexts.train=[full,'chunk=4,left=8']", "training.steps=4",
        ),
    )  # fmt: skip
    return run


@pytest.fixture(scope="module")
def attention(corpus: Path, backbone: Path) -> Path:
    run = corpus / "attention"
    said = asrkit(
        "add-submodel", "--from", backbone, "--name", "attention", "--manifest", corpus / "train.jsonl.gz",
        "--dev", corpus / "dev.jsonl.gz", "--out", run, "--max-duration", 20,
        *quick("training.steps=8", "training.optimizer.name=adamw"),
    )  # fmt: skip
    assert "parameters are trained, the rest is frozen" in said
    return run


def outputs(run: Path, variant: str, context: Context) -> torch.Tensor:
    model = load_model(open_run(run))
    features = torch.randn(2, 120, 80, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        encoder_out, _ = model.encode(features, torch.tensor([120, 90]), variant, context)
        return model.joiner(model.joiner.project_encoder(encoder_out), encoder_out.new_zeros(1))


@pytest.mark.parametrize("context", [FULL, Context(4, 8)])
def test_what_was_there_is_untouched(backbone: Path, attention: Path, context: Context) -> None:
    before, after = open_run(backbone).weights(), open_run(attention).weights()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert backbone_digest(before) == backbone_digest(after) == open_run(attention).lineage[-1]["backbone_sha256"]
    for variant in ("backbone", "joint"):
        assert torch.equal(outputs(backbone, variant, context), outputs(attention, variant, context))
    assert not torch.equal(outputs(attention, "backbone", context), outputs(attention, "attention", context))


def test_the_new_part_learned(backbone: Path, attention: Path) -> None:
    added = {
        name: tensor
        for name, tensor in open_run(attention).weights().items()
        if name.startswith("encoder.submodels.attention")
    }
    projections = [tensor for name, tensor in added.items() if name.endswith("out.weight")]
    assert len(projections) == 2 and all(tensor.abs().sum() > 0 for tensor in projections)  # they began as zeros
    run = open_run(attention)
    assert run.model_spec["variant"] == "attention"
    assert run.model_spec["variants"]["attention"] == ON | {"submodels": ["attention"], "contexts": ["full"]}
    assert [entry["stage"] for entry in run.lineage] == ["train-backbone", "add-submodel"]


def test_a_second_one_of_another_kind_on_the_first(corpus: Path, attention: Path, tmp_path: Path) -> None:
    run = tmp_path / "near"
    asrkit(
        "add-submodel", "--from", attention, "--name", "near", "--kind", "adapter", "--layers", "1", "--position", "parallel",
        "--active", "attention", "--manifest", corpus / "train.jsonl.gz", "--out", run, "--max-duration", 20,
        *quick("training.steps=2", "contexts.train=['chunk=4,left=8']", "also_train=[ctc_head]"),
    )  # fmt: skip
    spec = open_run(run).model_spec
    assert spec["submodels"]["near"]["layers"] == [1] and spec["submodels"]["near"]["position"] == "parallel"
    assert spec["variants"]["near"] == ON | {"submodels": ["attention", "near"], "contexts": ["chunk=4,left=8"]}
    before, after = open_run(attention).weights(), open_run(run).weights()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {"ctc_head.weight", "ctc_head.bias"}


def test_a_copy_of_the_jointly_trained_part(corpus: Path, backbone: Path, tmp_path: Path) -> None:
    """One step at a rate of nothing: the sub-model is still what it was copied from."""
    run = tmp_path / "copy"
    asrkit(
        "add-submodel", "--from", backbone, "--name", "copy", "--init", "joint", "--manifest", corpus / "train.jsonl.gz",
        "--out", run, "--max-duration", 20, *quick("training.steps=1", "training.optimizer.learning_rate=1e-12"),
    )  # fmt: skip
    weights = open_run(run).weights()
    for name, tensor in weights.items():
        if name.startswith("encoder.submodels.copy."):
            torch.testing.assert_close(tensor, weights[name.replace(".copy.", ".joint.")], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(
    corpus: Path, attention: Path, backbone: Path, tmp_path: Path
) -> None:
    """The fixture's run, stopped at half its way by a SIGKILL of its own and started again."""
    run = tmp_path / "again"
    words = [
        "add-submodel", "--from", backbone, "--name", "attention", "--manifest",
        corpus / "train.jsonl.gz", "--dev", corpus / "dev.jsonl.gz", "--out", run, "--max-duration", 20,
        *quick("training.steps=8", "training.optimizer.name=adamw"),
    ]  # fmt: skip
    killed("step 4", *words)
    assert not (run / "done").exists()
    asrkit(*words)
    assert weights_equal(run, attention)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--name", "joint"], "already has it"),
        (["--name", "a/b"], "a name is letters"),
        (["--name", "x", "--layers", "0-5"], "layers 0 to 1"),
        (["--name", "x", "--layers", "some"], "write all, a range such as 0-5"),
        (["--name", "x", "--init", "nothing"], "choose from noop, random, joint"),
        (["--name", "x", "--init", "joint", "--kind", "adapter"], "has another shape"),
        (["--name", "x", "--context", "left=4"], "write full, or chunk=16,left=64"),
        (["--name", "x", "--kind", "adapter", "--context", "chunk=4,left=4"], "only attention has a context"),
        (["--name", "x", "--active", "other"], "it has joint"),
        (["--name", "x", "--set", "submodel.heads=5"], "even multiple of heads"),
        (["--name", "x", "--manifest", "nowhere.jsonl.gz"], "no such file"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    corpus: Path, backbone: Path, tmp_path: Path, options: list[str], complaint: str
) -> None:
    manifest = [] if "--manifest" in options else ["--manifest", corpus / "train.jsonl.gz"]
    said = asrkit("add-submodel", "--from", backbone, "--out", tmp_path / "run", *manifest, *options, *quick(), code=1)
    assert complaint in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_frozen_model_that_never_streamed_warns(corpus: Path, tmp_path: Path) -> None:
    common = ["--manifest", corpus / "train.jsonl.gz", "--max-duration", 20]
    small = ["model.size=tiny", "model.num_layers=1", "model.dim=16", "tokenizer.vocab_size=18", "training.steps=1"]
    asrkit("train-backbone", "--out", tmp_path / "a", *common, *quick(*small))
    said = asrkit(
        "add-submodel", "--from", tmp_path / "a", "--name", "near", "--context", "left=8,chunk=4", "--out", tmp_path / "b",
        *common, *quick("training.steps=1"),
    )  # fmt: skip
    assert "never trained for streaming" in said
    assert yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())["submodel"]["context"] == "chunk=4,left=8"
