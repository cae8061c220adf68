"""Recordings of a human voice, from Debian's archive: four prompts learned by heart, and read back without an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from asrkit.data.manifests import open_cuts, text_of, write_cuts
from asrkit.run_dir import open_run
from helpers.commands import asrkit, sets

needs_apt = pytest.mark.skipif(
    shutil.which("apt-get") is None, reason="the recordings come through apt-get, and this machine has none"
)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of four English prompts of different lengths."""
    folder = tmp_path_factory.mktemp("prompts")
    cache = Path(__file__).parent.parent / ".cache" / "packages"
    asrkit("data", "prompts", "--lang", "en", "--out", folder, "--cache", cache)
    by_length = sorted(open_cuts(folder / "train.jsonl.gz"), key=lambda cut: len(text_of(cut).split()))
    spoken = [cut for cut in by_length if 3 <= len(text_of(cut).split()) <= 9]
    write_cuts(folder / "four.jsonl.gz", spoken[:: len(spoken) // 4][:4])
    return folder / "four.jsonl.gz"


@pytest.mark.slow
@needs_apt
def test_four_prompts_are_learned_without_an_error(four: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [
        "model.size=tiny", "model.num_layers=2", "model.dropout=0", "model.predictor_dropout=0",
        "tokenizer.vocab_size=40", "data.num_workers=0", "data.num_buckets=1", "data.augment.spec_augment=null",
        "data.augment.speed=0", "data.augment.volume_db=0", "loss.warm_up_steps=50", "training.steps=250",
        "training.optimizer.warm_up_steps=20", "training.average_decay=0.9", "training.evaluate_every=125",
        "training.tensorboard=false", "training.precision=float32",
    ]  # fmt: skip
    asrkit("train-backbone", "--manifest", four, "--dev", four, "--out", run, *sets(*settings))
    asrkit("evaluate", "--from", run, "--manifest", four, "--method", "all")
    for method in ("greedy", "beam4", "ctc"):
        (file,) = (run / "evaluation").glob(f"four-*-backbone-full-{method}/result.json")
        result = json.loads(file.read_text())
        assert result["total"]["words"] >= 12 and result["total"]["wer"] == 0, method
    cut = next(iter(open_cuts(four)))
    heard = asrkit("transcribe", "--from", run, cut.recording.sources[0].source)
    assert text_of(cut) in heard


@pytest.mark.slow
@needs_apt
def test_recordings_in_two_languages(four: Path, tmp_path: Path) -> None:
    """The encoder takes the language as an input; it does not matter that the words are English."""
    cuts = list(open_cuts(four))
    for cut, language in zip(cuts, ("en", "fr", "en", "fr"), strict=True):
        cut.supervisions[0].language = language
    manifest, run = tmp_path / "two.jsonl.gz", tmp_path / "run"
    write_cuts(manifest, cuts)
    settings = [
        "model.size=tiny", "model.num_layers=2", "model.languages=[en, fr]", "tokenizer.vocab_size=40", "data.num_workers=0",
        "data.num_buckets=1", "training.steps=10", "training.tensorboard=false", "training.precision=float32",
    ]  # fmt: skip
    asrkit("train-backbone", "--manifest", manifest, "--dev", manifest, "--out", run, *sets(*settings))
    assert bool(open_run(run).weights()["encoder.languages.weight"].any(dim=1).all())
    asrkit("evaluate", "--from", run, "--manifest", manifest)
    (file,) = (run / "evaluation").glob("two-*-backbone-full-greedy/result.json")
    result = json.loads(file.read_text())
    assert {language: found["utterances"] for language, found in result["languages"].items()} == {"en": 2, "fr": 2}
    audio = cuts[0].recording.sources[0].source
    assert asrkit("transcribe", "--from", run, "--language", "fr", audio).startswith(f"{audio}:")
