"""pretrain as a user meets it: from audio to an encoder, from there to a recognizer; killed, shared, gone on with; mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from asrkit.methods import pretraining
from asrkit.methods.pretraining import PretrainConfig
from asrkit.models.registry import ENCODER, load_encoder
from asrkit.run_dir import WEIGHTS, open_run, read_yaml
from asrkit.stages.pretrain import build_task
from asrkit.training.contexts import TrainedContexts
from helpers.commands import TWO, asrkit, killed, launched, sets
from helpers.run_dirs import metrics, model_of, weights_equal
from helpers.small_runs import write_run
from helpers.tones import copied, data, make_corpus

QUICK = [
    "data.num_workers=0", "data.num_buckets=1", "training.steps=4", "training.log_every=1", "training.evaluate_every=2",
    "training.save_every=2", "training.tensorboard=false", "training.precision=float32",
]  # fmt: skip
SMALL = [
    "model.size=tiny", "model.num_layers=2", "model.dim=32", "model.feedforward_dim=32", "model.kernel_size=5",
    "quantizer.entries=16", "quantizer.code_dim=16", "quantizer.final_dim=16", "mask.distractors=20",
]  # fmt: skip
TUNED = [*QUICK, "loss.backend=torch", "tokenizer.vocab_size=18"]


def quick(*settings: str) -> list[str]:
    return sets(*QUICK, *SMALL, *settings)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, 16)
    make_corpus(folder, 4, seed=1, name="dev")
    return folder


@pytest.fixture(scope="module")
def pretrained(corpus: Path) -> Path:
    """With attention in training, in two contexts."""
    asrkit("pretrain", *data(corpus), "--out", corpus / "pre", *quick(
        "model.attention_dropout.probability=0", "model.attention_dim=16", "contexts.train=[full,'chunk=4,left=8']",
    ))  # fmt: skip
    return corpus / "pre"


def test_a_run_holds_an_encoder_and_what_it_was_pretrained_with(pretrained: Path) -> None:
    run = open_run(pretrained)
    model = load_encoder(run)
    assert run.kind == ENCODER and not run.tokenizer_path.exists() and model.objective is not None
    assert model.spec.variant == "joint" and model.spec.variants["joint"].contexts == ["full", "chunk=4,left=8"]
    assert model.spec.objective is not None and model.spec.objective.entries == 16
    rows = metrics(pretrained)
    for row in (row for row in rows if "loss" in row):
        assert {"contrastive", "accuracy", "perplexity", "diversity", "masked", "temperature"} <= row.keys()
        assert 0.1 < row["masked"] < 0.8 and 2 <= row["perplexity"] <= 32
    assert [row["dev_contrastive"] for row in rows if "dev_contrastive" in row][-1] == run.lineage[-1]["metrics"][
        "contrastive"
    ]
    shown = asrkit("info", pretrained)
    assert "objective" in shown and "submodel joint" in shown and "contrastive" in shown


@pytest.mark.slow
def test_it_learns_to_tell_what_is_hidden(corpus: Path, tmp_path: Path) -> None:
    """From noise on, also of audio that it has not heard; and more and more of its codebooks is used."""
    asrkit("pretrain", *data(corpus), "--out", tmp_path / "pre", *quick(
        "training.steps=60", "training.evaluate_every=60", "training.optimizer.learning_rate=5e-3", "loss.diversity_scale=1",
    ))  # fmt: skip
    rows = metrics(tmp_path / "pre")
    learned = {
        name: [float(row[name]) for row in rows if "loss" in row] for name in ("accuracy", "contrastive", "perplexity")
    }
    first, last = (
        {name: sum(values[part]) / 10 for name, values in learned.items()} for part in (slice(10), slice(-10, None))
    )
    assert last["accuracy"] > first["accuracy"] + 0.1 and last["contrastive"] < first["contrastive"] - 0.3
    assert last["perplexity"] > first["perplexity"] + 2
    (measured,) = [row for row in rows if "dev_accuracy" in row]
    assert measured["dev_accuracy"] > 3 / 21  # three times as often as by chance


@pytest.mark.slow
def test_from_audio_to_a_recognizer(corpus: Path, pretrained: Path, tmp_path: Path) -> None:
    """Its encoder is pretrained, then tuned, then recognizes; the kind of run that a command needs is named in one line."""
    for words in (["evaluate", "--manifest", corpus / "dev.jsonl.gz"], ["export", "--out", tmp_path / "onnx"]):
        (line,) = asrkit(words[0], "--from", pretrained, *words[1:], code=1).splitlines()
        assert "make a recognizer of it first with `asrkit train-backbone --from" in line
    asrkit("train-backbone", "--from", pretrained, *data(corpus), "--out", tmp_path / "asr", *sets(*TUNED))
    model, before = model_of(tmp_path / "asr"), load_encoder(open_run(pretrained))
    assert model.spec.encoder == before.spec.encoder and model.spec.variants == before.spec.variants
    assert torch.equal(model.encoder.normalize.mean, before.encoder.normalize.mean)
    assert not any(name.startswith("objective.") for name in open_run(tmp_path / "asr").weights())
    asrkit("evaluate", "--from", tmp_path / "asr", "--manifest", corpus / "dev.jsonl.gz", "--chunk", 4, "--left", 8)
    asrkit("train-backbone", "--from", tmp_path / "asr", *data(corpus), "--out", tmp_path / "more", *sets(*TUNED[:-1]))
    assert [entry["stage"] for entry in open_run(tmp_path / "more").lineage] == ["pretrain", *2 * ["train-backbone"]]
    distill = [
        "distill",
        "--teacher",
        tmp_path / "asr",
        "--from",
        pretrained,
        *data(corpus),
        "--out",
        tmp_path / "taught",
    ]
    asrkit(*distill, *sets(*QUICK, "loss.backend=torch"))
    assert model_of(tmp_path / "taught").spec.encoder == before.spec.encoder


@pytest.mark.slow
def test_texts_do_not_matter(corpus: Path, tmp_path: Path) -> None:
    """Nor whether there are any."""

    def silent(number: int, cut: dict[str, Any]) -> None:
        if number % 2:
            cut["supervisions"] = []
        else:
            cut["supervisions"][0]["text"] = "ĝ" * 500

    bare = copied(corpus, tmp_path / "bare.jsonl.gz", silent)
    for name, manifest in (("with", corpus / "train.jsonl.gz"), ("without", bare)):
        words = ["--manifest", manifest, "--out", tmp_path / name, "--max-duration", 20]
        asrkit("pretrain", *words, *quick("training.steps=2"))
    assert weights_equal(tmp_path / "with", tmp_path / "without")


def test_recordings_without_texts(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "train", tmp_path / "recordings" / "of-one")
    asrkit("data", "import", tmp_path / "recordings", "--text", "none", "--out", tmp_path / "data")
    words = ["--manifest", tmp_path / "data" / "all.jsonl.gz", "--out", tmp_path / "run", "--max-duration", 20]
    assert "16 utterances" in asrkit("pretrain", *words, *quick("training.steps=1"))


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    settings = quick(
        "training.steps=6", "data.crop=1.2", "contexts.train=[full,'chunk=4,left=8']", "data.augment.speed=0.1"
    )
    asrkit("pretrain", *data(corpus), "--out", tmp_path / "whole", *settings)
    killed("step 3/", "pretrain", *data(corpus), "--out", tmp_path / "killed", *settings)
    assert "resuming after step 2" in asrkit("pretrain", *data(corpus), "--out", tmp_path / "killed", *settings)
    assert weights_equal(tmp_path / "whole", tmp_path / "killed")
    rows = [
        [{k: v for k, v in row.items() if k != "timing"} for row in metrics(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_two_processes_are_one(corpus: Path, tmp_path: Path) -> None:
    words = ["--manifest", corpus / "train.jsonl.gz", "--max-duration", 10]
    asrkit("pretrain", *words, "--out", tmp_path / "one", *quick("training.accumulate=2"))
    launched(TWO, "pretrain", *words, "--out", tmp_path / "two", "--device", "cpu", *quick())
    assert weights_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_pretraining_goes_on_with_quantizer_and_projections(corpus: Path, pretrained: Path, tmp_path: Path) -> None:
    """At a rate of nothing everything is what the parent has."""
    words = ["pretrain", "--from", pretrained, "--manifest", corpus / "train.jsonl.gz", "--max-duration", 20]
    settings = sets(*QUICK, "mask.distractors=20", "training.steps=1")
    asrkit(*words, "--out", tmp_path / "on", *settings, *sets("training.optimizer.learning_rate=1e-12"))
    before, after = open_run(pretrained).weights(), open_run(tmp_path / "on").weights()
    assert before.keys() == after.keys() and any(name.startswith("objective.quantizer") for name in after)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    content = read_yaml(tmp_path / "on" / "config.yaml")
    assert "model" not in content and "quantizer" not in content and content["from"] == str(pretrained)
    asrkit(*words, "--out", tmp_path / "plain", "--variant", "backbone", *settings)
    changed = {
        name for name, tensor in open_run(tmp_path / "plain").weights().items() if not torch.equal(tensor, before[name])
    }
    assert changed and not any(name.startswith("encoder.submodels.") for name in changed)


def test_it_goes_on_in_the_contexts_it_was_trained_in(pretrained: Path, tmp_path: Path) -> None:
    for given, expected in ((None, ["full", "chunk=4,left=8"]), (["chunk=8,left=0"], ["chunk=8,left=0"])):
        settings = PretrainConfig(contexts=TrainedContexts(train=given))
        task = build_task(settings, pretrained, tmp_path, batches=None)  # type: ignore[arg-type]
        assert task.loss.keywords["settings"].contexts.train == expected  # type: ignore[attr-defined]
        assert task.loss.keywords["attention_dropout"] is None and task.variant == "joint"  # type: ignore[attr-defined]


@pytest.mark.slow
def test_what_is_measured_is_always_the_same(corpus: Path, tmp_path: Path) -> None:
    """At a rate of nothing, two measurements are equal."""
    settings = quick(
        "training.optimizer.learning_rate=1e-30", "training.optimizer.weight_decay=0", "training.average_decay=0"
    )
    asrkit("pretrain", *data(corpus), "--out", tmp_path / "run", *settings)
    rows = [row for row in metrics(tmp_path / "run") if "dev_contrastive" in row]
    one, other = ({k: v for k, v in row.items() if k.startswith("dev_")} for row in rows)
    assert one == other and one["dev_contrastive"] > 0 and 0 <= one["dev_accuracy"] <= 1 and one["dev_perplexity"] >= 2


def test_a_collapse_is_warned_of(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "COLLAPSED", 17.0)  # more than there can be of each 16
    monkeypatch.setattr(pretraining, "COLLAPSED_SHARE", 2.0)
    words = ["--manifest", corpus / "train.jsonl.gz", "--out", tmp_path / "run", "--max-duration", 20]
    said = asrkit("pretrain", *words, *quick())
    (line,) = (line for line in said.splitlines() if "codebooks have collapsed" in line)
    assert line.startswith("step 3: the codebooks have collapsed: of 32 entries")


def test_weights_whose_measurement_is_no_number_are_not_published(corpus: Path, tmp_path: Path) -> None:
    words = ["pretrain", *data(corpus), "--out", tmp_path / "run"]
    said = asrkit(*words, *quick("training.optimizer.learning_rate=1e30", "training.optimizer.warm_up_steps=0"), code=1)
    assert "after step 2: dev contrastive" in said and "is not a number, so these weights were not published" in said
    assert not (tmp_path / "run" / WEIGHTS).exists() and not (tmp_path / "run" / "done").exists()


def test_one_utterance_is_enough_and_noted(corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path, 1, name="one")
    words = ["--manifest", tmp_path / "one.jsonl.gz", "--out", tmp_path / "run", "--max-duration", 20]
    assert "holds one utterance" in asrkit("pretrain", *words, *quick("training.steps=1"))


def test_short_cuts_are_refused_or_left_out(corpus: Path, tmp_path: Path) -> None:
    def short(number: int, cut: dict[str, Any]) -> None:
        if number == 3:
            cut["duration"] = cut["supervisions"][0]["duration"] = 0.25

    manifest = copied(corpus, tmp_path / "short.jsonl.gz", short)
    words = ["pretrain", "--manifest", manifest, "--out", tmp_path / "run", "--max-duration", 20]
    first, second = asrkit(*words, *quick(), code=1).splitlines()
    expected = "cut train-3: short: 0.250 s, less than the 0.31 s 7 encoder frames need, of which a span can be hidden"
    assert expected in first and "--set bad_cuts=skip" in second and not (tmp_path / "run").exists()
    assert "left out: cut train-3" in asrkit(*words, *quick("bad_cuts=skip", "training.steps=1"))
    words[4] = tmp_path / "whole"
    assert "16 utterances" in asrkit(*words, *quick("training.steps=1", "mask.length=3"))


def test_a_manifest_without_audio_is_refused(corpus: Path, tmp_path: Path) -> None:
    def bare(number: int, cut: dict[str, Any]) -> None:
        del cut["recording"]

    manifest = copied(corpus, tmp_path / "bare.jsonl.gz", bare)
    shutil.copy(corpus / "dev.jsonl.gz", tmp_path / "dev.jsonl.gz")
    words = ["pretrain", "--manifest", manifest, "--out", tmp_path / "run"]
    said = asrkit(*words, *quick(), code=1)
    assert "cut train-0" in said and "Traceback" not in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["quantizer.code_dim=15"], "quantizer.code_dim: every codebook has an equal share"),
        (["temperature.end=3"], "temperature.end: is above temperature.start"),
        (["data.crop=0.2"], "data.crop: 0.2 s are 4 encoder frames, but a span of mask.length=5 needs 7"),
        (["variant=joint"], "variant: works with --from only"),
        (["mask.length=1"], "mask.length: Input should be greater than or equal to 2"),
        (["model.kernel_size=4"], "kernel_size must be odd"),
        (["loss.ctc_scale=0"], "loss.ctc_scale: unknown key"),
    ],
)
def test_mistakes_are_one_line(corpus: Path, tmp_path: Path, settings: list[str], complaint: str) -> None:
    words = ["pretrain", "--manifest", corpus / "train.jsonl.gz", "--out", tmp_path / "run"]
    (line,) = asrkit(*words, *quick(*settings), code=1).splitlines()
    assert complaint in line and not (tmp_path / "run").exists()


def test_a_parent_of_another_kind_or_shape_is_refused(corpus: Path, pretrained: Path, tmp_path: Path) -> None:
    words = ["pretrain", "--manifest", corpus / "train.jsonl.gz", "--out", tmp_path / "run", "--from"]
    recognizer = write_run(tmp_path / "asr")
    (line,) = asrkit(*words, recognizer, *sets(*QUICK), code=1).splitlines()
    assert line.endswith("is a recognizer, not a pretrained encoder; train one with `asrkit pretrain`")
    lines = asrkit(*words, pretrained, *quick(), code=1).splitlines()
    assert (
        len(lines) == 2 and "model: a pretrained encoder already has" in lines[0] and "quantizer: is taken" in lines[1]
    )
    (line,) = asrkit(*words, pretrained, "--variant", "far", *sets(*QUICK), code=1).splitlines()
    assert "no variant far; there are backbone, joint" in line and not (tmp_path / "run").exists()
