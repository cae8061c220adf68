"""A task made again in another process; runs that go on with another number of processes; the even choice of dev cuts."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asrkit.config import resolve
from asrkit.data.manifests import open_cuts, text_of
from asrkit.data.text.tokenizer import train_tokenizer
from asrkit.errors import UserError
from asrkit.methods.pretraining import PretrainConfig, masked_batches
from asrkit.methods.sequence.config import SequenceTrainConfig
from asrkit.run_dir import TOKENIZER
from asrkit.stages import add_submodel, distill, pretrain, prune, qat, sequence_train, train_backbone
from asrkit.training.dev_eval import even_subset
from asrkit.training.distributed import World
from asrkit.training.loop import OwnNumbers
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import TaskRecipe
from asrkit.training.step import Arithmetic, compute_gradients
from helpers.commands import TWO, asrkit, launched, quick
from helpers.run_dirs import weights_equal
from helpers.tones import make_corpus

SHAPE = [
    "model.size=tiny", "model.num_layers=1", "model.dim=16", "model.feedforward_dim=16", "model.kernel_size=3",
    "model.predictor_dim=8", "model.joiner_dim=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, 8, 0, "train")
    make_corpus(folder, 3, 1, "dev")
    return folder


@pytest.fixture(scope="module")
def parent(corpus: Path) -> Path:
    """A small model with attention in a variant of its own, trained for two steps."""
    asrkit(
        "train-backbone", "--manifest", corpus / "train.jsonl.gz", "--out",
        corpus / "parent", "--max-duration", 10,
        *quick(*SHAPE, "training.steps=2", "tokenizer.vocab_size=18", "model.attention_dropout.probability=0.5"),
    )  # fmt: skip
    return corpus / "parent"


def recipe_of(stage: str, corpus: Path, parent: Path, out: Path) -> TaskRecipe:
    """The recipe that the stage trains by, for a run directory that has no more than a tokenizer."""
    manifest = corpus / "train.jsonl.gz"
    train_tokenizer(map(text_of, open_cuts(manifest)), "bpe", 18, out / TOKENIZER)
    common = ["data.max_duration=10", "loss.backend=torch"]
    settings: Any
    if stage == "pretrain":
        encoder = [setting for setting in SHAPE if "predictor" not in setting and "joiner" not in setting]
        settings = resolve(
            PretrainConfig, None, ["data.max_duration=10", "contexts.train=[full,'chunk=4,left=8']", *encoder]
        )
        build: Any = partial(pretrain.build_task, settings, None, out)
        return TaskRecipe(build, out, (manifest,), settings, 2, partial(masked_batches, settings.mask))
    if stage == "train-backbone":
        settings = resolve(train_backbone.TrainBackboneConfig, None, [*common, *SHAPE])
        build = partial(train_backbone.build_task, settings, None, out)
    elif stage == "add-submodel":
        settings = resolve(add_submodel.AddSubModelConfig, None, [*common, "submodel.init=random"])
        build = partial(add_submodel.build_task, settings, parent, "attention")
    elif stage == "prune":
        settings = resolve(prune.PruneConfig, None, common)
        build = partial(prune.build_task, settings, parent, parent)
    elif stage == "qat":
        settings = resolve(qat.QatConfig, None, [*common, "from_scratch=true", "quantization.activations.bits=8"])
        build = partial(qat.build_task, settings, parent, parent, out)
    elif stage == "sequence-train":
        settings = resolve(SequenceTrainConfig, None, [*common, "search_every=2", "l2=0.1", "hypotheses.unit=token"])
        build = partial(sequence_train.build_task, settings, parent, out)
    else:
        settings = resolve(distill.DistillConfig, None, [*common, *SHAPE, "model.dim=24", "teacher.encoder_scale=0.1"])
        build = partial(distill.build_task, settings, {"*": [parent]}, None, None, out, None)
    return TaskRecipe(build, out, (manifest,), settings, slices=2)


def gradients_digest(recipe: TaskRecipe) -> str:
    """The SHA-256 of the gradients of the second step's two batches."""
    task = recipe.rebuild()
    batches = {number: (task.batches[number], 0.0) for number in (2, 3)}
    result = compute_gradients(task, task.model, batches, [2, 3], 5, Arithmetic(torch.device("cpu")))
    digest = hashlib.sha256()
    for gradient in result.gradients:
        digest.update(b"none" if gradient is None else gradient.numpy().tobytes())
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in result.gradients)
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["pretrain", "train-backbone", "add-submodel", "prune", "qat", "distill", "sequence-train"]
)
def test_a_task_is_made_again_in_another_process_bit_for_bit(
    stage: str, corpus: Path, parent: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(stage, corpus, parent, tmp_path)
    (tmp_path / "recipe").write_bytes(pickle.dumps(recipe))
    program = (
        "import pickle, sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[2])\n"
        "from training.test_session import gradients_digest\n"
        "print(gradients_digest(pickle.load(open(sys.argv[1], 'rb'))))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "recipe"), str(Path(__file__).parents[1])]
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode == 0, other.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert other.stdout.strip() == gradients_digest(recipe)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(corpus: Path, tmp_path: Path) -> None:
    """Two processes are stopped and one goes on with the batches of both: the weights are those of either alone, dropout and all."""

    def words(out: Path, *more: str) -> list[str]:
        settings = quick(*SHAPE, "tokenizer.vocab_size=18", "training.steps=6", "training.log_every=1", *more)
        manifest = corpus / "train.jsonl.gz"
        return ["train-backbone", "--manifest", str(manifest), "--max-duration", "5", "--out", str(out), *settings]

    launched(TWO, *words(tmp_path / "two"))
    asrkit(*words(tmp_path / "one", "training.accumulate=2"))
    with subprocess.Popen([*TWO, *words(tmp_path / "mixed")], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 3/"):
                process.terminate()
                break
        process.stderr.read()
    assert not (tmp_path / "mixed" / "done").exists()
    assert "resuming after step" in asrkit(*words(tmp_path / "mixed"))
    for name in ("one", "mixed"):
        assert weights_equal(tmp_path / name, tmp_path / "two"), name


@pytest.mark.slow
def test_processes_that_cannot_share_the_batches_are_refused(corpus: Path, tmp_path: Path) -> None:
    words = ["train-backbone", "--manifest", corpus / "train.jsonl.gz", "--max-duration", 5, "--out", tmp_path / "run"]
    settings = quick(*SHAPE, "tokenizer.vocab_size=18", "training.steps=2", "training.accumulate=3")
    asrkit(*words, *settings)
    (tmp_path / "run" / "done").unlink()
    said = launched(TWO, *words, *settings, code=1)
    assert "3 batches per step, which 2 processes cannot share" in said


@given(st.integers(0, 4), st.integers(1, 3), st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 2), (6, 3)]))
def test_every_batch_is_computed_by_one_process(start: int, steps: int, shares: tuple[int, int]) -> None:
    slices, processes = shares
    worlds = [World(rank, processes, torch.device("cpu")) for rank in range(processes)]
    lists = [list(OwnNumbers(start, start + steps, slices, world)) for world in worlds]
    assert sorted(number for numbers in lists for number in numbers) == list(
        range(start * slices, (start + steps) * slices)
    )
    for numbers in lists:
        assert numbers == sorted(numbers) and len(numbers) == steps * slices // processes


@given(st.integers(0, 700), st.integers(1, 600))
def test_a_subset_has_the_number_asked_for(count: int, most: int) -> None:
    subset = even_subset(range(count), most)  # type: ignore[arg-type]
    assert len(subset) == min(count, most) == len(set(subset)) and subset == sorted(subset)  # type: ignore[type-var]
    if count > most:
        gaps = [after - before for before, after in pairwise(subset)]  # type: ignore[operator]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_what_a_stopped_run_recorded_under_a_digest_cannot_be_replaced(tmp_path: Path) -> None:
    world = World(0, 1, torch.device("cpu"))
    run = RunWriter(tmp_path, "stage", "0" * 64, fresh=False, finished=False, world=world)
    run.recorded = {"denominator_sha256": "a" * 64, "notes": 1}
    run.state({"denominator_sha256": "a" * 64, "notes": 2, "masks_sha256": "c" * 64})
    assert run.facts["notes"] == 2
    with pytest.raises(UserError, match="the denominator is not the one it was trained with before it was stopped"):
        run.state({"denominator_sha256": "b" * 64})
