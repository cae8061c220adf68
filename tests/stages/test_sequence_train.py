"""sequence-train: whole runs, what stays as it was in the parent, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from asrkit import extras
from asrkit.config import from_dict
from asrkit.data.batch import Batch
from asrkit.errors import UserError
from asrkit.methods.sequence.config import SequenceTrainConfig
from asrkit.models.compression import compressed_layers
from asrkit.run_dir import open_run
from asrkit.stages.sequence_train import build_task
from asrkit.training.datasets import training_batches
from asrkit.training.step import TrainTask
from helpers.commands import ONE, TWO, asrkit, killed, launched, quick
from helpers.run_dirs import metrics, model_of, weights_equal
from helpers.tones import copied, data, make_corpus, rewrite

SHAPE = [
    "model.size=tiny", "model.num_layers=2", "model.dim=32", "model.feedforward_dim=48", "tokenizer.vocab_size=18",
    "model.predictor_dim=16", "model.joiner_dim=24",
]  # fmt: skip
OBJECTIVES = {
    "mwer": "expected_errors", "sampled-mbr": "expected_errors", "mmi": "log_posterior", "bmmi": "log_posterior",
    "smbr": "accuracy", "mpe": "token_accuracy",
}  # fmt: skip


def speak(number: int, cut: dict[str, Any]) -> None:
    cut["supervisions"][0]["language"] = ("en", "fr")[number % 2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cuts of two languages."""
    folder = tmp_path_factory.mktemp("corpus")
    rewrite(make_corpus(folder, 12), speak)
    rewrite(make_corpus(folder, 4, seed=1, name="dev"), speak)
    return folder


@pytest.fixture(scope="module")
def parent(corpus: Path) -> Path:
    """A model trained so far that its hypotheses differ."""
    run = corpus / "parent"
    asrkit("train-backbone", *data(corpus), "--out", run, *quick(*SHAPE, "training.steps=20", "loss.warm_up_steps=5"))
    return run


def sequence_train(parent: Path, corpus: Path, out: Path, *settings: str, words: Iterable[object] = ()) -> list[object]:
    """The words of a short run."""
    return ["sequence-train", "--from", parent, *words, *data(corpus), "--out", out, *quick(*settings)]


def needs(criterion: str) -> None:
    if criterion not in ("mwer", "sampled-mbr"):
        pytest.importorskip("k2")


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(run) if "loss" in row]


@pytest.fixture(scope="module")
def mwer(corpus: Path, parent: Path) -> Path:
    asrkit(*sequence_train(parent, corpus, corpus / "mwer"))
    return corpus / "mwer"


def test_a_run_directory_like_any_other(corpus: Path, parent: Path, mwer: Path) -> None:
    run = open_run(mwer)
    assert [entry["stage"] for entry in run.lineage] == ["train-backbone", "sequence-train"]
    assert run.lineage[-1]["criterion"] == "mwer" and run.config["criterion"] == "mwer"
    assert model_of(mwer).spec == model_of(parent).spec and not weights_equal(mwer, parent)
    assert run.config["training"]["optimizer"]["name"] == "adamw"
    assert len(rows(mwer)) == 4
    for row in rows(mwer):
        assert row["oracle_errors"] <= row["one_best_errors"] and row["hypotheses"] > 1 and row["lattice_age"] == 0
        assert row["oracle_errors"] <= row["expected_errors"] and {"ctc", "pruned", "simple"} <= row.keys()
    asrkit("evaluate", "--from", mwer, "--manifest", corpus / "dev.jsonl.gz")


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "head"), [
    ("mwer", "ctc"), ("sampled-mbr", "transducer"), ("sampled-mbr", "ctc"), ("mmi", "ctc"), ("bmmi", "ctc"), ("smbr", "ctc"), ("mpe", "ctc"),
])  # fmt: skip
def test_every_criterion(corpus: Path, parent: Path, tmp_path: Path, criterion: str, head: str) -> None:
    """By itself it trains the encoder and its head; also where a search has cast weights to bfloat16 before."""
    needs(criterion)
    settings = ("training.average_decay=0", f"head={head}", "training.precision=bfloat16")
    run = tmp_path / "run"
    said = asrkit(*sequence_train(parent, corpus, run, *settings, words=["--criterion", criterion, "--smoothing", 0]))
    assert len(rows(run)) == 4 and all(OBJECTIVES[criterion] in row and "ctc" not in row for row in rows(run))
    before, after = open_run(parent).weights(), open_run(run).weights()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert {"encoder", *({"ctc_head"} if head == "ctc" else {"joiner", "predictor"})} == moved
    assert open_run(run).lineage[-1]["losses"] == [head]
    if criterion in ("mmi", "bmmi", "smbr", "mpe"):
        assert "denominator graph of order 2" in said
        facts = open_run(run).lineage[-1]["denominator_sha256"]
        assert len(facts) == 64
        assert all(row["no_path"] == 0 and row["arcs"] > 1 for row in rows(run))


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "settings"), [
    ("mwer", ("search_every=3", "l2=0.1", "hypotheses.add_reference=true", "hypotheses.unit=char")),
    ("sampled-mbr", ()),
    ("smbr", ("search_every=3", "lattice.kappa=0.5")),
    ("mpe", ("cache=true", "data.augment.speed=0")),
])  # fmt: skip
def test_killed_and_resumed_is_the_uninterrupted_run(
    corpus: Path, parent: Path, tmp_path: Path, criterion: str, settings: tuple[str, ...]
) -> None:
    """Also between two renewals of the weights that hypotheses are searched with."""
    needs(criterion)
    words = ["--criterion", criterion]
    parted, whole = (
        sequence_train(parent, corpus, tmp_path / name, *settings, words=words) for name in ("parted", "whole")
    )
    killed("step 2:", *parted)
    assert not (tmp_path / "parted" / "done").exists()
    said = asrkit(*parted)
    assert "denominator graph" not in said and "searched" not in said  # both are done once
    asrkit(*whole)
    assert weights_equal(tmp_path / "parted", tmp_path / "whole")
    ages = [row["lattice_age"] for row in rows(tmp_path / "whole")]
    assert ages == (
        [0, 1, 2, 0] if "search_every=3" in settings else [0, 1, 2, 3] if "cache=true" in settings else [0] * 4
    )
    assert not any(name.startswith("snapshots") for name in open_run(tmp_path / "whole").weights())


def test_older_weights_are_those_of_the_last_renewal(corpus: Path, parent: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asrkit(*sequence_train(parent, corpus, run, "search_every=4", "training.average_decay=0"))
    state = load_file(run / "state" / "latest.safetensors")
    before, after = open_run(parent).weights(), open_run(run).weights()
    assert all(torch.equal(state[f"model.snapshots.searcher.{name}"], tensor) for name, tensor in before.items())
    assert not torch.equal(before["joiner.out.weight"], after["joiner.out.weight"])


@pytest.mark.slow
def test_l2_holds_the_weights_where_they_began(corpus: Path, parent: Path, tmp_path: Path) -> None:
    distances = []
    for name, settings in (("free", ()), ("held", ("l2=100",))):
        asrkit(*sequence_train(parent, corpus, tmp_path / name, "training.average_decay=0", "training.steps=8",
                               "training.optimizer.learning_rate=0.01", "training.optimizer.weight_decay=0", *settings))  # fmt: skip
        start, end = open_run(parent).weights(), open_run(tmp_path / name).weights()
        distances.append(sum(float((end[key] - start[key]).square().sum()) for key in start))
    assert distances[1] < distances[0]
    first = rows(tmp_path / "held")[0]
    assert first["regularizer"] == 0.0  # nothing has moved yet


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["mwer", "mmi"])
def test_masks_and_integers_stay(corpus: Path, parent: Path, tmp_path: Path, criterion: str) -> None:
    needs(criterion)
    asrkit(
        "prune",
        "--from",
        parent,
        "--sparsity",
        "2:4",
        *data(corpus),
        "--out",
        tmp_path / "sparse",
        *quick("training.steps=1"),
    )
    asrkit("quantize", "--from", tmp_path / "sparse", "--bits", 4, "--out", tmp_path / "int4")
    run = tmp_path / "run"
    asrkit(*sequence_train(tmp_path / "int4", corpus, run, "search_every=2", words=["--criterion", criterion]))
    before, after = model_of(tmp_path / "int4"), model_of(run)
    assert before.spec == after.spec and not weights_equal(run, tmp_path / "int4")
    layers = compressed_layers(after)
    masks = {path: layer.mask for path, layer in compressed_layers(before).items()}
    assert layers and all(torch.equal(layer.mask, masks[path]) for path, layer in layers.items())
    for layer in layers.values():
        assert bool((layer.weight[~layer.mask] == 0).all()) and layer.codes().codes.abs().max() == 7
        assert bool((layer.codes().codes[~layer.mask] == 0).all())


@pytest.mark.slow
def test_a_streaming_sub_model_of_a_model_with_languages(corpus: Path, tmp_path: Path) -> None:
    contexts = "contexts.train=[full,'chunk=4,left=8']"
    asrkit(
        "train-backbone",
        *data(corpus),
        "--out",
        tmp_path / "base",
        *quick(*SHAPE, contexts, "model.languages=[en,fr]", "training.steps=1"),
    )
    asrkit("add-submodel", "--from", tmp_path / "base", "--name", "near", "--layers", "0", "--context", "chunk=4,left=8",
           *data(corpus), "--out", tmp_path / "near", *quick("training.steps=1"))  # fmt: skip
    for variant in ("near", "backbone"):
        run = tmp_path / f"run-{variant}"
        asrkit(*sequence_train(tmp_path / "near", corpus, run, "search_every=2", words=["--variant", variant]))
        spec, was = model_of(run).spec, model_of(tmp_path / "near").spec
        assert spec.variant == variant and spec.variants == was.variants and spec.languages == ["en", "fr"]
        asrkit("evaluate", "--from", run, "--chunk", 4, "--manifest", corpus / "dev.jsonl.gz")


@pytest.mark.slow
def test_two_processes_equal_one_with_two_parts(corpus: Path, parent: Path, tmp_path: Path) -> None:
    criterion = "mmi" if extras.available("k2") else "mwer"
    common = [
        "sequence-train",
        "--from",
        parent,
        "--criterion",
        criterion,
        "--manifest",
        corpus / "train.jsonl.gz",
        "--max-duration",
        10,
    ]
    launched(TWO, *common, "--out", tmp_path / "two", *quick("training.steps=2"))
    asrkit(*common, "--out", tmp_path / "one", *quick("training.steps=2", "training.accumulate=2"))
    one, two = (open_run(tmp_path / name).weights() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


REFUSED: list[tuple[list[str], list[str], str]] = [
    ([], ["hypotheses.beam=1"], "raise it to 2 or more (4 is usual)"),
    (["--criterion", "sampled-mbr"], ["hypotheses.paths=1"], "raise it to 2 or more"),
    (["--criterion", "sampled-mbr"], ["search_every=2"], "leave it at 1"),
    (["--criterion", "sampled-mbr"], ["loss.topology=regular"], "set loss.topology=modified, or head=ctc"),
    (["--criterion", "mmi"], ["head=transducer"], "needs the lattices of the CTC head"),
    (["--criterion", "smbr"], ["data.bpe_dropout=0.1"], "set data.bpe_dropout=0 and data.augment.join=0"),
    ([], ["contexts.sampling=joint", "contexts.train=[full,'chunk=4,left=8']"], "set contexts.sampling=random"),
    (["--criterion", "mmi", "--cache"], ["data.augment.speed=0.1"], "--cache: was searched in audio as it is; set data.augment.speed=0"),
    (["--cache"], ["search_every=2"], "searches once; leave search_every at 1"),
    (["--workers", "2"], ["search_every=2"], "replicas have steps of their own; leave it at 1"),
    ([], ["search_every=2", "asynchronous.driver=simulated", "asynchronous.staleness=3"], "make its weights older; leave it at 1"),
    ([], ["lattice.kappa=0.5"], "lattice.kappa: mwer does not use it"),
    ([], ["hypotheses.paths=9"], "hypotheses.paths: mwer does not use it"),
    (["--criterion", "sampled-mbr"], ["hypotheses.scale=0.5"], "hypotheses.scale: sampled-mbr does not use it"),
    (["--criterion", "mpe"], ["lattice.blank=0.1"], "lattice.blank: mpe does not use it"),
    (["--criterion", "mmi"], ["lattice.boost=0.5"], "lattice.boost: mmi does not use it"),
    (["--smoothing", "0.5"], ["loss.transducer_scale=0", "loss.ctc_scale=0"], "smoothing: the recognizer's own losses have weight 0"),
    (["--variant", "none"], [], "no variant none; there are backbone"),
    ([], ["lattice.denominator.order=1"], "lattice.denominator.order"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "settings", "complaint"), REFUSED)
def test_refusals_are_one_line(
    corpus: Path, parent: Path, tmp_path: Path, words: list[str], settings: list[str], complaint: str
) -> None:
    said = asrkit(*sequence_train(parent, corpus, tmp_path / "run", *settings, words=words), code=1)
    assert said.count("\n") == 1 and complaint in said, said
    assert not (tmp_path / "run").exists()


def test_a_head_that_was_never_trained(corpus: Path, tmp_path: Path) -> None:
    settings = quick(*SHAPE, "training.steps=1", "loss.transducer_scale=0", "loss.ctc_scale=1")
    asrkit("train-backbone", *data(corpus), "--out", tmp_path / "ctc", *settings)
    said = asrkit(*sequence_train(tmp_path / "ctc", corpus, tmp_path / "run"), code=1)
    assert "was trained without the transducer head" in said and "head=ctc" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    asrkit(*sequence_train(tmp_path / "ctc", corpus, tmp_path / "run", "loss.transducer_scale=0"))


def test_a_graph_that_is_too_large_and_cuts_without_a_path(corpus: Path, parent: Path, tmp_path: Path) -> None:
    pytest.importorskip("k2")
    large = ["lattice.denominator.max_arcs=100", "lattice.denominator.order=4"]
    words = ["--criterion", "mmi"]
    said = asrkit(*sequence_train(parent, corpus, tmp_path / "run", *large, words=words), code=1)
    assert "of order 4 over 16 tokens would have" in said and said.count("\n") == 1
    narrow = ["interpolation=0", "search_beam=0.001", "max_active=1", "min_active=0"]
    settings = [f"lattice.denominator.{each}" for each in narrow]
    said = asrkit(*sequence_train(parent, corpus, tmp_path / "run", *settings, words=words), code=1)
    assert "cuts train-" in said and "no path through the denominator graph is left" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def step_of(task: TrainTask, plain: TrainTask, batch: Batch) -> list[tuple[Tensor, dict[str, Any]]]:
    """Losses and metrics of the first step, of two tasks."""
    return [((found := each.loss(each.model, batch, 0)).losses, dict(found.metrics)) for each in (task, plain)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("criterion", "head"),
    [("mwer", "transducer"), ("sampled-mbr", "ctc"), ("mmi", "ctc")],
)
def test_sound_in_which_nobody_speaks(corpus: Path, parent: Path, tmp_path: Path, criterion: str, head: str) -> None:
    """Also in a batch of nothing else: every word of a hypothesis is an error."""
    needs(criterion)

    def hush(number: int, cut: dict[str, Any]) -> None:
        cut["supervisions"][0]["text"] = "" if number % 4 else cut["supervisions"][0]["text"]

    quiet = copied(corpus, tmp_path / "quiet.jsonl.gz", hush)
    words = [
        "sequence-train",
        "--from",
        parent,
        "--criterion",
        criterion,
        "--manifest",
        quiet,
        "--out",
        tmp_path / "run",
    ]
    asrkit(*words, *quick("data.empty_texts=silence", f"head={head}", "data.max_duration=2"))
    assert len(rows(tmp_path / "run")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["mwer", "mmi", "smbr"])
def test_a_few_steps_on_one_batch_improve_what_is_trained(
    corpus: Path, parent: Path, tmp_path: Path, criterion: str
) -> None:
    needs(criterion)
    run = tmp_path / "run"
    one_batch = ("data.max_duration=40", "training.steps=25", "data.augment.speed=0", "data.augment.spec_augment=null",
                 "training.optimizer.warm_up_steps=0", "training.optimizer.decay=constant", "smoothing=0",
                 "training.optimizer.learning_rate=1e-3", *(["hypotheses.unit=char"] if criterion == "mwer" else []))  # fmt: skip
    words = ["--criterion", criterion, "--manifest", corpus / "train.jsonl.gz"]
    asrkit("sequence-train", "--from", parent, *words, "--out", run, *quick(*one_batch))
    values = [row[OBJECTIVES[criterion]] for row in rows(run)]
    first, last = sum(values[:3]) / 3, sum(values[-3:]) / 3
    assert (last < 0.97 * first) if "errors" in OBJECTIVES[criterion] else (last > first + 0.02 * abs(first)), values


@contextmanager
def whole_again(folder: Path) -> Iterator[list[Path]]:
    """The safetensors files of a folder; they are put back afterwards."""
    before = {file: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}
    yield [*before]
    for file, content in before.items():
        file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["mwer", "mmi", "smbr", "mpe"])
def test_what_was_searched_before_is_what_the_first_step_would_find(
    corpus: Path, parent: Path, tmp_path: Path, criterion: str
) -> None:
    needs(criterion)
    augment = {"speed": 0.0, "spec_augment": None, "volume_db": 0.0}
    values = {
        "criterion": criterion,
        "data": {"augment": augment, "num_workers": 0, "num_buckets": 1, "max_duration": 20.0},
    }
    run = tmp_path / "run"
    still = [f"data.augment.{key}={'null' if value is None else value}" for key, value in augment.items()]
    asrkit(
        *sequence_train(parent, corpus, run, *still, "cache=true", "training.steps=1", words=["--criterion", criterion])
    )
    plain = from_dict(SequenceTrainConfig, values, "test")
    batches = training_batches(corpus / "train.jsonl.gz", plain.data, run, 1, 1)
    cached = build_task(replace(plain, cache=True), parent, run, batches)
    for change in (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), Path.unlink):
        with whole_again(run / "searched") as files:
            change(files[0])
            with pytest.raises(UserError, match="is damaged|not all of them"):
                build_task(replace(plain, cache=True), parent, run, batches)
    moved = (run / "searched").rename(run / "away")  # as the error says to
    with pytest.raises(UserError, match="run the command again, which searches again"):
        build_task(replace(plain, cache=True), parent, run, batches)
    moved.rename(run / "searched")
    searching = build_task(plain, parent, run, batches)
    for each in (cached, searching):
        each.model.eval()
    (one, found), (other, expected) = step_of(cached, searching, batches[0])
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, metric in found.items():
        assert float(metric.total) == pytest.approx(float(expected[name].total), rel=1e-3, abs=1e-4), name
    (one.sum() + other.sum()).backward()
    for mine, theirs in zip(cached.model.parameters(), searching.model.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_lattices_without_k2(corpus: Path, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    said = asrkit(*sequence_train(parent, corpus, tmp_path / "run", words=["--criterion", "smbr"]), code=1)
    assert said.count("\n") == 1 and "needs k2, which is not installed" in said and "asrkit doctor" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_replicas_on_data_of_their_own(corpus: Path, parent: Path, mwer: Path, tmp_path: Path) -> None:
    """By a real Ray and simulated, the weights are the same; one simulated replica ends with those of this process."""
    one = ["--driver", "simulated", "--workers", 1]
    asrkit(*sequence_train(parent, corpus, tmp_path / "one", words=one))
    assert weights_equal(mwer, tmp_path / "one")
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    own = copied(corpus, tmp_path / "own.jsonl.gz", lambda number, cut: None)
    for driver, words in (("ray", ["--max-staleness", 0]), ("simulated", [])):
        both = ["--driver", driver, *words, "--manifest", own]
        launched(ONE, *sequence_train(parent, corpus, tmp_path / driver, words=both))
    assert weights_equal(tmp_path / "ray", tmp_path / "simulated")
    said = asrkit(*sequence_train(parent, corpus, tmp_path / "cached", words=["--cache", *both]), code=1)
    assert "has to read all training data before it begins; give one --manifest" in said
