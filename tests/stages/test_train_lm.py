"""Language models: what they may know, what they learn, and train-lm as a user meets it."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.config import from_dict
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.text.units import Inventory, write_inventory
from asrkit.errors import UserError
from asrkit.losses.language_model import sequence_nll
from asrkit.models import load_model
from asrkit.models.lm import LanguageModel
from asrkit.models.registry import load_lm
from asrkit.models.spec import LmSpec
from asrkit.run_dir import open_run
from helpers.commands import TWO, asrkit, launched, sets
from helpers.run_dirs import metrics, weights_equal

SMALL = ["model.dim=16", "model.num_layers=1", "vocab_size=30", "training.tensorboard=false", "training.precision=float32",
         "training.optimizer.warm_up_steps=5", "training.optimizer.learning_rate=0.01"]  # fmt: skip
WORDS = ["alpha", "bravo", "carol", "delta"]


def lines(count: int = 60) -> list[str]:
    """Every word is followed by the next in the alphabet: the first says all."""
    return [" ".join(WORDS[(start + i) % 4] for i in range(2 + start % 5)) for start in range(count)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join(lines()) + "\n")
    (path.parent / "dev.txt").write_text("\n".join(lines(8)) + "\n")
    return path


def make_lm(architecture: str, vocab_size: int = 9) -> LanguageModel:
    torch.manual_seed(0)
    shape = {"architecture": architecture, "dim": 8, "num_layers": 2, "heads": 2}
    return LanguageModel(from_dict(LmSpec, {"unit": "phone", "vocab_size": vocab_size, "shape": shape}, "test")).eval()


@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(0, 11), st.integers(0, 10**6))
def test_nothing_is_known_of_what_comes(architecture: str, length: int, place: int, seed: int) -> None:
    """What follows n symbols depends on these n alone: not on later ones, nor on padding."""
    model, place = make_lm(architecture), place % length
    torch.manual_seed(seed)
    symbols = torch.randint(1, 9, (2, length))
    changed = symbols.clone()
    changed[:, place:] = torch.randint(1, 9, (2, length - place))
    with torch.no_grad():
        one, other, short = model(symbols), model(changed), model(symbols[:, :place])
    assert one.shape == (2, length + 1, 9)
    torch.testing.assert_close(one[:, : place + 1], other[:, : place + 1])
    torch.testing.assert_close(one[:, : place + 1], short)


def test_what_came_before_matters() -> None:
    for architecture in ("lstm", "transformer"):
        with torch.no_grad():
            one, other = make_lm(architecture)(torch.tensor([[1, 2, 3], [4, 2, 3]]))
        assert not torch.allclose(one[3], other[3])


@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_the_probabilities_of_all_sequences_sum_to_one(architecture: str) -> None:
    """Of all sequences of at most 3 symbols out of 2, and all that begin like those of 3 and go on."""
    model = make_lm(architecture, 3)
    total = 0.0
    for length in range(4):
        for symbols in itertools.product([1, 2], repeat=length):
            tensor = torch.tensor([symbols], dtype=torch.int64).view(1, length)
            with torch.no_grad():
                logits = model(tensor)
                nll = sequence_nll(logits, tensor, torch.tensor([length]))
                if length == 3:  # whatever comes after: without the end
                    nll = nll + logits[0, -1].log_softmax(-1)[0]
            total += math.exp(-float(nll))
    assert total == pytest.approx(1.0, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 10**6))
def test_sequence_nll_is_the_sum_over_symbols_and_end(lens: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    longest = max(lens)
    logits, symbols = torch.randn(len(lens), longest + 1, 5), torch.zeros(len(lens), longest, dtype=torch.int64)
    expected = []
    for row, length in enumerate(lens):
        symbols[row, :length] = torch.randint(1, 5, (length,))
        log_probs = logits[row].log_softmax(-1)
        expected.append(-sum(float(log_probs[n, s]) for n, s in enumerate([*symbols[row, :length].tolist(), 0])))
    torch.testing.assert_close(sequence_nll(logits, symbols, torch.tensor(lens)), torch.tensor(expected))


def test_an_inventory_keeps_its_symbols(tmp_path: Path) -> None:
    """Phones that a normalization would take for others, and senones; numbered the same in any order of occurrence."""
    symbols = ["d", "dʲ", "dj", "kː", "k", "ə.0.12", "ə.0.1", "s"]
    inventory = write_inventory(reversed(symbols), tmp_path / "tokenizer.model")
    ids = Inventory.of(inventory, "phone").ids(symbols)
    assert sorted(ids) == list(range(2, len(symbols) + 2)) and inventory.vocab_size == len(symbols) + 2
    assert inventory.encode(" ".join(symbols)) == ids
    again = write_inventory(symbols, tmp_path / "again" / "tokenizer.model")
    assert Inventory.of(again, "phone").ids(symbols) == ids
    assert "x" not in Inventory.of(inventory, "phone") and "<unk>" not in Inventory.of(inventory, "phone")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_a_model_learns_what_follows(text: Path, tmp_path: Path, architecture: str) -> None:
    run = tmp_path / "lm"
    asrkit("train-lm", "--text", text, "--dev", text.parent / "dev.txt", "--out", run,
           *sets(*SMALL, "training.steps=120", "training.evaluate_every=40", f"model.architecture={architecture}"))  # fmt: skip
    opened = open_run(run)
    perplexity = opened.lineage[-1]["metrics"]["perplexity"]
    assert perplexity < 3.0
    model, tokenizer = load_lm(opened), Tokenizer(opened.tokenizer_path)
    symbols = tokenizer.encode("alpha bravo")
    with torch.no_grad():
        logits = model(torch.tensor([symbols]))
    assert logits.shape[-1] == tokenizer.vocab_size
    # The published weights are those the perplexity was measured with.
    total, count = 0.0, 0
    for line in lines(8):
        ids = torch.tensor([tokenizer.encode(line)])
        with torch.no_grad():
            total += float(sequence_nll(model(ids), ids, torch.tensor([ids.shape[1]])))
        count += ids.shape[1] + 1
    assert math.exp(total / count) == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(text: Path, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    words = ["train-lm", "--text", text, *sets(*SMALL, "training.save_every=3", "training.log_every=1")]
    asrkit(*words, "--out", whole, *sets("training.steps=8"))
    launched([sys.executable, "-c", INTERRUPTED], *words, "--out", parted, *sets("training.steps=8"), code=143)
    assert not (parted / "done").exists()
    asrkit(*words, "--out", parted, *sets("training.steps=8"))
    assert weights_equal(whole, parted)
    losses = [[row["loss"] for row in metrics(path) if "loss" in row] for path in (whole, parted)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


# The command with SIGTERM sent in its fifth step.
INTERRUPTED = """
import os, signal, sys
from asrkit.stages import train_lm
from asrkit.cli import app
plain = train_lm.lm_loss
def lm_loss(model, batch, step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(model, batch, step)
train_lm.lm_loss = lm_loss
sys.argv[0] = 'asrkit'
app()
"""


@pytest.mark.slow
def test_two_processes_train_the_same_model(text: Path, tmp_path: Path) -> None:
    """A step's sentences are shared out, as among the parts of one process."""
    words = ["train-lm", "--text", text, *sets(*SMALL, "training.steps=6", "model.dropout=0", "max_symbols=100")]
    asrkit(*words, "--out", tmp_path / "one", *sets("training.accumulate=2"))
    launched(TWO, *words, "--out", tmp_path / "two", "--device", "cpu")
    one, two = (open_run(tmp_path / name).weights() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-5)


def test_phones_of_a_text(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    from asrkit.data.text.phones import phones_of

    run = tmp_path / "lm"
    asrkit(
        "train-lm",
        "--text",
        text,
        "--unit",
        "phone",
        "--language",
        "en",
        "--out",
        run,
        *sets(*SMALL, "training.steps=2"),
    )
    inventory = Inventory.of(Tokenizer(run / "tokenizer.model"), "phone")
    phones = {phone for word in phones_of(" ".join(WORDS), "en") for phone in word}
    assert all(phone in inventory for phone in phones) and inventory.size == len(phones) + 2
    assert load_lm(open_run(run)).spec.unit == "phone"


@pytest.mark.parametrize("language", ["en", "es", "fr", "it", "ru"])
def test_espeak_pronounces_five_languages(language: str) -> None:
    pytest.importorskip("espeakng_loader")
    from asrkit.data.text.phones import phones_of

    said = {
        "en": ("cat", "kæt"),
        "es": ("niño", "niɲo"),
        "fr": ("chat", "ʃa"),
        "it": ("gnocchi", "ɲokːɪ"),
        "ru": ("как", "kɑk"),
    }
    word, phones = said[language]
    assert "".join(phones_of(f"{word} {word}", language)[1]) == phones
    assert not set("ˈˌ_-()") & set("".join(phones_of(word, language)[0]))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "--text, --manifest: give one of them"),
        (["--text", "{text}", "--manifest", "{text}"], "--text, --manifest: give one of them"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file (--text)"),
        (["--text", "{text}", "--unit", "syllable"], "unit"),
        (["--text", "{text}", "--unit", "phone"], "--language en"),
        (["--text", "{text}", "--language", "en"], "--language: works with the phones or senones of a text only"),
        (["--text", "{text}", "--unit", "senone", "--language", "en"], "--senones"),
        (["--text", "{text}", "--dev", "{text}", "--set", "held_out=0.3"], "held_out: with --dev no sentence is held out"),
        (["--text", "{text}", "--senones", "{text}"], "--senones: works with --unit senone only"),
        (["--text", "{text}", "--set", "model.architecture=transformer", "--set", "model.dim=18"], "multiple of heads"),
    ],
)  # fmt: skip
def test_wrong_options_end_in_a_line(text: Path, tmp_path: Path, words: list[str], complaint: str) -> None:
    out = tmp_path / "lm"
    said = asrkit("train-lm", "--out", out, *(word.format(text=text) for word in words), code=1)
    assert complaint in said and "Traceback" not in said and said.startswith("error: ")
    assert not (out / "config.yaml").exists()


def test_lines_that_cannot_be_spelled_are_named(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "lm"
    asrkit("train-lm", "--text", text, "--out", run, *sets(*SMALL, "training.steps=1"))
    strange = tmp_path / "strange.txt"
    strange.write_text("\n".join([*lines(20), "žluť", "alpha"]))
    words = ["train-lm", "--text", strange, "--tokenizer", run / "tokenizer.model", "--out", tmp_path / "other",
             *sets(*SMALL, "training.steps=1")]  # fmt: skip
    said = asrkit(*words, code=1)
    assert f"{strange}:21" in said and "bad_lines=skip" in said and not (tmp_path / "other" / "config.yaml").exists()
    said = asrkit(*words, "--set", "bad_lines=skip")
    assert f"left out: {strange}:21" in said


def test_a_line_longer_than_a_step_and_a_dev_text_without_lines_are_refused(text: Path, tmp_path: Path) -> None:
    long, blank = tmp_path / "long.txt", tmp_path / "blank.txt"
    long.write_text("ab " * 5000)
    blank.write_text("\n \n")
    said = asrkit("train-lm", "--text", long, "--out", tmp_path / "run", "--set", "vocab_size=8", code=1)
    assert f"{long}:1: has " in said and "symbols, more than a step takes; split it, or raise max_symbols" in said
    said = asrkit(
        "train-lm", "--text", text, "--dev", blank, "--out", tmp_path / "run", "--set", "vocab_size=30", code=1
    )
    assert f"{blank}: no sentence is left to measure perplexity on" in said
    assert not (tmp_path / "run").exists()


def test_a_language_model_is_no_recognizer(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "lm"
    asrkit("train-lm", "--text", text, "--out", run, *sets(*SMALL, "training.steps=1"))
    with pytest.raises(UserError, match="is a language model"):
        load_model(open_run(run))
    asrkit("train-lm", "--kind", "ngram", "--unit", "word", "--text", text, "--out", tmp_path / "ngram")
    for path, kind in ((run, "is a language model"), (tmp_path / "ngram", "is an n-gram model")):
        assert kind in asrkit("evaluate", "--from", path, "--manifest", text, code=1)
        assert kind in asrkit("transcribe", "--from", path, text, code=1)
    said = asrkit("info", run)
    assert "train-lm" in said and "embedding" in said and "variants" not in said
