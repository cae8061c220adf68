"""What training starts from: a recognizer made of a pretrained encoder, attention or norms added to a trained backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from asrkit.config import from_dict
from asrkit.models.digests import tensors_digest
from asrkit.models.registry import load_encoder
from asrkit.models.spec import PredictorSpec
from asrkit.models.surgery import recognizer_of, recognizer_spec, with_norms_per_mode
from asrkit.nn.context import FULL, Context
from asrkit.nn.masks import SpanMasks
from asrkit.run_dir import STATE, WEIGHTS, open_run, read_yaml
from asrkit.stages.train_backbone import TrainBackboneConfig
from asrkit.training.checkpoint import STATE_FILE
from asrkit.training.start import check_start, dropped_attention, first_model
from helpers.commands import asrkit, killed, quick
from helpers.run_dirs import model_of, weights_equal
from helpers.small_runs import write_encoder, write_run
from helpers.tones import make_corpus

PARTS: dict[str, Any] = {
    "submodels": {"joint": {"kind": "attention", "layers": [0, 1], "dim": 8, "heads": 2}},
    "variants": {"backbone": {"contexts": ["full"]}, "joint": {"submodels": ["joint"], "contexts": ["full"]}},
    "variant": "joint",
    "objective": {"groups": 2, "entries": 4, "code_dim": 8, "final_dim": 8},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, 8)
    make_corpus(folder, 3, seed=1, name="dev")
    write_encoder(folder / "pre", PARTS)
    return folder


def tune(corpus: Path, out: Path, *settings: str, code: int = 0) -> str:
    return asrkit(
        "train-backbone", "--from", corpus / "pre", "--manifest", corpus / "train.jsonl.gz", "--dev", corpus / "dev.jsonl.gz",
        "--out", out, "--max-duration", 10, *quick("tokenizer.vocab_size=18", *settings), code=code,
    )  # fmt: skip


def encoder_of(run: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in open_run(run).weights().items() if name.startswith("encoder.")}


def subsampling(tensors: dict[str, Tensor]) -> str:
    return tensors_digest((name, tensor) for name, tensor in tensors.items() if ".subsampling." in name)


def test_the_encoder_is_taken_over_and_the_rest_is_new(corpus: Path) -> None:
    encoder = load_encoder(open_run(corpus / "pre"))
    spec = recognizer_spec(encoder.spec, 12, PredictorSpec(dim=8), 8, ["en", "fr"])
    torch.manual_seed(1)
    model = recognizer_of(encoder, spec)
    assert model.submodels_of() == ("joint",) and model.spec.variants == encoder.spec.variants and not model.training
    for name, tensor in encoder.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor)
    features, lens = torch.randn(2, 50, 80), torch.tensor([50, 41])
    for context in (FULL, Context(4, 8)):
        expected, _ = encoder.encoder(features, lens, encoder.submodels_of(), context)
        both = torch.tensor([0, 1])
        assert torch.equal(model.encode(features, lens, None, context, languages=both)[0], expected)
    torch.manual_seed(2)
    other = recognizer_of(encoder, spec)
    assert not torch.equal(other.ctc_head.weight, model.ctc_head.weight)


@pytest.mark.slow
def test_the_new_parts_are_trained_first_and_then_all_but_the_subsampling(corpus: Path, tmp_path: Path) -> None:
    """Killed while the encoder is frozen, and gone on with: the state then has the parent's encoder, to the last bit."""
    before = encoder_of(corpus / "pre")
    settings = ("pretrained.frozen_steps=3", "training.steps=6", "training.keep=last")
    tune(corpus, tmp_path / "whole", *settings)
    words = ["train-backbone", "--from", corpus / "pre", "--manifest", corpus / "train.jsonl.gz", "--dev", corpus / "dev.jsonl.gz",
             "--out", tmp_path / "killed", "--max-duration", 10, *quick("tokenizer.vocab_size=18", *settings)]  # fmt: skip
    killed("step 3/", *words)
    state = load_file(tmp_path / "killed" / STATE / STATE_FILE)
    for which in ("model.", "average."):
        frozen = {name.removeprefix(which): t for name, t in state.items() if name.startswith(f"{which}encoder.")}
        assert tensors_digest(frozen.items()) == tensors_digest(before.items())
    assert any(name.startswith("optimizer.") for name in state)
    assert "resuming after step 2" in asrkit(*words)
    assert weights_equal(tmp_path / "whole", tmp_path / "killed")
    after = encoder_of(tmp_path / "whole")
    assert tensors_digest(before.items()) != tensors_digest(after.items()) and subsampling(before) == subsampling(after)
    tune(corpus, tmp_path / "all", "pretrained.frozen_steps=0", "pretrained.freeze_embed=false")
    assert subsampling(before) != subsampling(encoder_of(tmp_path / "all"))


@pytest.mark.slow
def test_a_language_input_is_new(corpus: Path, tmp_path: Path) -> None:
    tune(
        corpus,
        tmp_path / "run",
        "model.languages=[xx]",
        "pretrained.frozen_steps=0",
        "training.optimizer.name=scaled_adam",
    )
    assert model_of(tmp_path / "run").spec.languages == ["xx"]
    assert open_run(tmp_path / "run").weights()["encoder.languages.weight"].any()  # it began as zeros


def test_a_tuned_run_says_what_applies(corpus: Path, tmp_path: Path) -> None:
    tune(corpus, tmp_path / "run", "training.steps=1")
    model, content = model_of(tmp_path / "run"), read_yaml(tmp_path / "run" / "config.yaml")
    assert content["model"].keys() == {"predictor_dim", "predictor_dropout", "context_size", "joiner_dim", "languages"}
    assert content["training"]["optimizer"]["hold_share"] == 0.4 and content["data"]["augment"]["spec_augment"] is None
    assert model.spec.variant == "joint" and model.spec.predictor.dim == model.spec.joiner_dim == 16
    assert [entry["stage"] for entry in open_run(tmp_path / "run").lineage] == ["pretrain", "train-backbone"]


def test_what_does_not_fit_an_encoder_is_refused_in_one_line(corpus: Path, tmp_path: Path) -> None:
    cases = {
        "model.dim=24": "model.dim: the pretrained encoder already has its shape; leave out model.dim, or --from",
        "pretrained.frozen_steps=4": "pretrained.frozen_steps is 4, but training.steps is 4, so the encoder would never be",
        "variant=other": "no variant other; there are backbone, joint",
        "model.languages=[xx,yy]": "model.languages: no training cut is in yy",
    }
    for setting, complaint in cases.items():
        (line,) = tune(corpus, tmp_path / "run", setting, code=1).splitlines()
        assert complaint in line and not (tmp_path / "run").exists()
    words = ["train-backbone", "--manifest", corpus / "train.jsonl.gz", "--out", tmp_path / "run"]
    (line,) = asrkit(*words, *quick("pretrained.freeze_embed=false"), code=1).splitlines()
    assert "pretrained: says how a recognizer is made of a pretrained encoder" in line


def test_masks_hide_spans_in_training_alone() -> None:
    vector = torch.full((6,), 7.0)
    masks = SpanMasks(vector, (0.2, 3), (0.3, 2))
    x = torch.randn(4, 30, 6)
    torch.manual_seed(3)
    hidden = masks(x)
    torch.manual_seed(3)
    assert torch.equal(masks(x), hidden)
    torch.manual_seed(3)
    time, channels = torch.rand(4, 30) < 0.2, torch.rand(4, 6) < 0.3
    for row in range(4):
        for frame in range(30):
            in_span = any(time[row, max(0, frame - 2) : frame + 1])
            for channel in range(6):
                zeroed = any(channels[row, max(0, channel - 1) : channel + 1])
                expected = 0.0 if zeroed else 7.0 if in_span else float(x[row, frame, channel])
                assert float(hidden[row, frame, channel]) == expected
    with masks.one_draw():
        both = masks(x), masks(x)
    assert torch.equal(*both) and not torch.equal(masks(x), both[0]) and not torch.equal(masks(x), masks(x))
    assert masks.eval()(x) is x and not masks.state_dict()


def test_attention_is_added_to_a_trained_backbone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", layers=2)
    shape = {"attention_dropout": {"probability": 0.5}, "attention_dim": 8, "attention_heads": 2}
    settings = from_dict(TrainBackboneConfig, {"model": shape}, "test")
    assert check_start(settings, run, None) == []
    model, variant = first_model(settings, run, tmp_path, None)  # type: ignore[arg-type]
    assert (variant, model.spec.variant, list(model.spec.variants)) == ("joint", "backbone", ["backbone", "joint"])
    assert model.spec.submodels["joint"].layers == [0, 1] and model.spec.submodels["joint"].dim == 8
    features, lens = torch.randn(2, 90, 80), torch.tensor([90, 70])
    before = model_of(run).encode(features, lens)[0]
    assert all(torch.equal(model.eval().encode(features, lens, name)[0], before) for name in ("backbone", "joint"))
    assert dropped_attention(settings, run) == settings.model.attention_dropout
    assert dropped_attention(TrainBackboneConfig(), run) is None
    never = from_dict(TrainBackboneConfig, {"model": {"attention_dropout": {"probability": 0}}}, "test")
    assert first_model(never, run, tmp_path, None)[0].spec.variant == "joint"  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_backbone_is_trained_on_under_dropped_attention(corpus: Path, tmp_path: Path) -> None:
    data = ["--manifest", corpus / "train.jsonl.gz", "--max-duration", 10]
    small = [
        "model.size=tiny",
        "model.num_layers=2",
        "model.dim=16",
        "model.feedforward_dim=16",
        "tokenizer.vocab_size=18",
    ]
    asrkit("train-backbone", *data, "--out", tmp_path / "parent", *quick(*small))
    words = ["train-backbone", "--from", tmp_path / "parent", *data, "--out", tmp_path / "run"]
    dropped = quick("model.attention_dropout.probability=0.5", "model.attention_dim=8", "model.attention_heads=2")
    killed("step 2/", *words, *dropped)
    asrkit(*words, *dropped)
    model, config = model_of(tmp_path / "run"), open_run(tmp_path / "run").config
    assert model.spec.variant == "backbone" and config["model"]["attention_dropout"]["probability"] == 0.5
    out = [
        weight for name, weight in model.encoder.submodels["joint"].named_parameters() if name.endswith("out.weight")
    ]
    assert len(out) == 2 and all(weight.any() for weight in out)  # it began at zero
    on = ["train-backbone", "--from", tmp_path / "run", *data, "--out", tmp_path / "on"]
    refused = asrkit(*on, *quick("model.attention_dropout.probability=0.5", "model.attention_dim=4"), code=1)
    assert "already has attention (joint)" in refused
    asrkit(*on, *quick("model.attention_dropout.probability=0"))
    assert model_of(tmp_path / "on").spec.variant == "joint"


ATTENTION = {
    "submodels": {"near": {"kind": "attention", "layers": [0], "dim": 8, "heads": 2}},
    "variants": {
        "backbone": {"contexts": ["full"]},
        "near": {"submodels": ["near"], "contexts": ["full", "chunk=4,left=8"]},
    },
    "variant": "near",
}


def test_norms_of_a_trained_model_get_a_second_pair_for_streaming(corpus: Path, tmp_path: Path) -> None:
    """It begins as a copy, so that the model computes the same, and is trained apart from then on."""
    parent = write_run(tmp_path / "parent", ATTENTION)
    with torch.no_grad():
        weights = load_file(parent / WEIGHTS)
        for name, weight in weights.items():
            if "norm" in name.split(".")[-2]:
                weight += torch.randn(weight.shape)
        origin = model_of(parent)
        origin.load_state_dict(weights)
        model = with_norms_per_mode(origin)
        assert with_norms_per_mode(model) is model and model.spec.encoder.norms == "per_mode"
        features, lens = torch.randn(2, 67, 80), torch.tensor([67, 40])
        for context in (FULL, Context(4, 8)):
            outputs = [each.encoder(features, lens, ["near"], context)[0] for each in (origin, model)]
            assert torch.equal(*outputs) and outputs[0].any()
        norms = [name for name in model.state_dict() if ".streaming." in name]
        assert any("submodels.near" in name for name in norms)
    words = ["train-backbone", "--manifest", corpus / "train.jsonl.gz", "--max-duration", 10]
    small = ["model.size=tiny", "model.num_layers=1", "model.dim=16", "model.feedforward_dim=16"]
    asrkit(*words, "--out", tmp_path / "shared", *quick(*small, "tokenizer.vocab_size=18"))
    both = quick('contexts.train=[full,"chunk=4,left=8"]', "contexts.sampling=joint", "model.norms=per_mode")
    asrkit(*words, "--from", tmp_path / "shared", "--out", tmp_path / "run", *both)
    trained = model_of(tmp_path / "run").state_dict()
    norms = [name for name in trained if ".streaming." in name]
    assert open_run(tmp_path / "run").config["model"] == {"norms": "per_mode"}
    assert norms and all(not torch.equal(trained[name], trained[name.replace(".streaming.", ".")]) for name in norms)
    asrkit(*words, "--from", tmp_path / "run", "--out", tmp_path / "on", *quick())
    assert model_of(tmp_path / "on").spec.encoder.norms == "per_mode"
    assert "model" not in open_run(tmp_path / "on").config


@pytest.mark.parametrize(
    ("model", "variant", "said"),
    [
        ({"dim": 16}, None, "model.dim: a trained model already has its shape"),
        ({"size": "small"}, None, "model.size: a trained model already has its shape"),
        ({"attention_dim": 8}, None, "model.attention_dim: a trained model already has its shape"),
        ({"dim": 16, "attention_dropout": {"probability": 0.5}}, None, "leave out model.dim, or --from"),
        ({"attention_dropout": {"probability": 0.5}}, "backbone", "--variant backbone: model.attention_dropout trains"),
    ],
)
def test_the_shape_of_a_trained_model_stays(
    tmp_path: Path, model: dict[str, Any], variant: str | None, said: str
) -> None:
    settings = from_dict(TrainBackboneConfig, {"model": model, "variant": variant}, "test")
    findings = check_start(settings, write_run(tmp_path / "run"), None)
    assert len(findings) == 1 and said in findings[0]
