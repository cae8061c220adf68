"""N-gram models: smoothing against a slow reference, ARPA files against KenLM, and files that nobody should trust."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.errors import UserError
from asrkit.models.ngram.arpa import read_arpa, write_arpa
from asrkit.models.ngram.automaton import Ngram, automaton, load_ngram
from asrkit.models.ngram.kneser_ney import estimate
from helpers.commands import asrkit

WORDS = [f"w{number}" for number in range(8)]
LOG10 = math.log(10)


def sentences(count: int, seed: int = 0) -> list[list[int]]:
    """Of words that are the rarer the higher their number, and of which each likes to follow the one before."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = rng.zipf(1.7, size=rng.integers(0, 8)).clip(1, len(WORDS)) - 1
        row[1::2] = (row[::2][: len(row[1::2])] + rng.integers(0, 2)) % len(WORDS)
        rows.append(row.tolist())
    return rows


def made(rows: Sequence[Sequence[int]], order: int, cutoffs: Sequence[int] = ()) -> Ngram:
    arpa, _ = estimate([np.array(row, dtype=np.int64) for row in rows], WORDS, order, cutoffs)
    return automaton(arpa, None, "test")


class SlowKneserNey:
    """Chen and Goodman's equations by dictionaries, for one history and word at a time, without cutoffs."""

    def __init__(self, rows: Sequence[Sequence[str]], order: int) -> None:
        self.order = order
        raw: Counter[tuple[str, ...]] = Counter()
        for row in rows:
            text = ["<s>", *row, "</s>"]
            raw.update(tuple(text[i : i + n]) for n in range(1, order + 1) for i in range(len(text) - n + 1))
        before: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for gram in raw:
            if len(gram) > 1:
                before[gram[1:]].add(gram[0])
        self.counts: dict[tuple[str, ...], int] = {
            gram: count if len(gram) == order or gram[0] == "<s>" else len(before[gram])
            for gram, count in raw.items()
            if gram != ("<s>",)
        }
        self.vocabulary = [*WORDS, "<unk>", "</s>"]
        self.discounts = {
            n: self._discounts([c for g, c in self.counts.items() if len(g) == n]) for n in range(1, order + 1)
        }

    @staticmethod
    def _discounts(counts: Sequence[int]) -> list[float]:
        n = [counts.count(k) for k in range(5)]
        if min(n[1:]) == 0:
            return [0, 0.5, 1, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        return [0, *found] if all(0 < d <= k for k, d in enumerate(found, 1)) else [0, 0.5, 1, 1.5]

    def prob(self, history: tuple[str, ...], word: str) -> float:
        history = history[-(self.order - 1) :]
        following = {g[-1]: c for g, c in self.counts.items() if len(g) == len(history) + 1 and g[:-1] == history}
        lower = self.prob(history[1:], word) if history else 1 / len(self.vocabulary)
        if not following:
            return lower
        discounts, total = self.discounts[len(history) + 1], sum(following.values())
        gamma = sum(discounts[min(c, 3)] for c in following.values()) / total
        count = following.get(word, 0)
        return (count - discounts[min(count, 3)]) / total + gamma * lower


@pytest.mark.parametrize(("order", "count"), [(2, 40), (3, 15), (4, 60)])
def test_the_estimates_are_those_of_the_equations(order: int, count: int) -> None:
    """For every history of up to three words, whether it occurs or not."""
    rows = sentences(count)
    model, slow = made(rows, order), SlowKneserNey([[WORDS[w] for w in row] for row in rows], order)
    for history in product(range(3), repeat=order - 1):
        scores = model.score(torch.tensor([state_after(model, history)]))
        expected = [slow.prob(("<s>", *(WORDS[w] for w in history)), symbol) for symbol in model.symbols]
        torch.testing.assert_close(scores[0].exp(), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def state_after(model: Ngram, words: Sequence[int]) -> int:
    state = torch.tensor([model.start_state])
    for word in words:
        state = model.advance(state, torch.tensor([word + 2]))
    return int(state)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 60), st.integers(2, 5), st.sampled_from([(), (0, 0, 1), (0, 1), (0, 1, 2, 3)]), st.integers(0, 99)
)
def test_what_may_follow_adds_up_to_one(count: int, order: int, cutoffs: tuple[int, ...], seed: int) -> None:
    """After every state, with and without cutoffs; and a row of scores is the scores of its symbols."""
    model = made(sentences(count, seed), order, cutoffs)
    states = torch.arange(model.num_states)
    rows = model.score(states)
    torch.testing.assert_close(
        rows.double().exp().sum(1), torch.ones(len(states), dtype=torch.float64), atol=1e-5, rtol=0
    )
    symbols = torch.arange(len(model.symbols)).repeat(len(states))
    pairs, _ = model.step(states.repeat_interleave(len(model.symbols)), symbols)
    assert torch.equal(pairs.view_as(rows), rows)


@pytest.mark.parametrize("cutoffs", [(), (0, 0, 1, 2)])
def test_scores_are_those_of_kenlm(tmp_path: Path, cutoffs: tuple[int, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """Word by word, of sentences that the model was made of and of others, with words it does not know."""
    kenlm = pytest.importorskip("kenlm")
    rows, path = sentences(300), tmp_path / "lm.arpa"
    arpa, _ = estimate([np.array(row, dtype=np.int64) for row in rows], WORDS, 4, cutoffs)
    write_arpa(arpa, path)
    model, reference = load_ngram(path, ["</s>", "<unk>", *WORDS, "elsewhere"]), kenlm.Model(str(path))
    capfd.readouterr()  # its progress
    rng = np.random.default_rng(1)
    texts = [*rows[:50], *(rng.integers(0, 9, size=rng.integers(0, 9)).tolist() for _ in range(50))]
    scores = model.sequence_log_probs([[word + 2 for word in text] for text in texts])
    for row, text in zip(scores, texts, strict=True):
        words = " ".join([*WORDS, "elsewhere"][word] for word in text)
        expected = [log_prob * LOG10 for log_prob, _, _ in reference.full_scores(words)]
        torch.testing.assert_close(row[: len(text) + 1], torch.tensor(expected), atol=1e-5, rtol=1e-5)
        assert not row[len(text) + 1 :].any()


def test_an_arpa_file_comes_back(tmp_path: Path) -> None:
    arpa, _ = estimate([np.array(row, dtype=np.int64) for row in sentences(50)], WORDS, 3)
    write_arpa(arpa, tmp_path / "lm.arpa")
    back = read_arpa(tmp_path / "lm.arpa")
    assert back.vocabulary == arpa.vocabulary and back.counts == arpa.counts
    for one, other in zip(arpa.sections, back.sections, strict=True):
        assert (one.words == other.words).all()
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-6)
        np.testing.assert_allclose(one.backoffs, other.backoffs, atol=1e-6)


def test_a_model_whose_middle_is_pruned_backs_off_further(tmp_path: Path) -> None:
    """Other toolkits leave out an n-gram but not a longer one that ends like it; by hand."""
    path = tmp_path / "lm.arpa"
    path.write_text(GOOD.replace("ngram 2=3", "ngram 2=2").replace("-0.3\tb a\t-0.1\n", ""))
    model = load_ngram(path)
    a, b = model.symbols.index("a"), model.symbols.index("b")
    state = torch.tensor([model.start_state])
    for word, expected in ((a, -0.2), (b, -0.4), (a, -0.1), (b, -0.4)):
        scores, state = model.step(state, torch.tensor([word]))
        assert float(scores) == pytest.approx(expected * LOG10, abs=1e-6)


GOOD = """made by hand
\\data\\
ngram 1=5
ngram 2=3
ngram 3=1

\\1-grams:
-99\t<s>\t-0.5
-0.7\t</s>
-2\t<unk>
-0.6 a -0.3
-0.5\tb\t-0.2

\\2-grams:
-0.2\t<s> a\t0
-0.4\ta b\t-0.7
-0.3\tb a\t-0.1

\\3-grams:
-0.1\ta b a

\\end\\
"""
BAD = {
    "it has the 3-gram 'a b a' but not the 2-gram of its first 2 words": ("-0.4\ta b", "-0.4\tb b"),
    "the probabilities after 'a' add up to": ("a -0.3", "a 3"),
    "unigrams' probabilities add up to": ("-0.7\t</s>", "-0.01\t</s>"),
    "the same 2-gram stands there twice": ("-0.3\tb a", "-0.3\ta b"),
    "lm.arpa:21: only 0 of the 1 3-grams": ("-0.1\ta b a\n", ""),
    "4-grams after that of 2-grams": ("ngram 3=1", "ngram 4=1"),
    "more than the file has room for": ("ngram 3=1", "ngram 3=100000000000"),
    "where a log-probability has to stand": ("-0.4\ta b", "often\ta b"),
    "a log-probability of nan": ("-0.4\ta b", "nan\ta b"),
    "a log-probability of 0.4": ("-0.4\ta b", "0.4\ta b"),
    "where a back-off weight has to stand": ("a b\t-0.7", "a b\tc"),
    "'c' is not among the unigrams": ("-0.4\ta b", "-0.4\ta c"),
    "the word 'a' a second time": ("-0.5\tb\t-0.2", "-0.5\ta\t-0.2"),
    "6 columns in a line of 3-grams": ("-0.1\ta b a", "-0.1\ta b a b 0"),
    "the file ends before": ("\\end\\\n", ""),
    "where \\2-grams: has to stand": ("-0.5\tb\t-0.2", "-0.5\tb\t-0.2\n-0.5\tc"),
}


@pytest.mark.parametrize("message", BAD)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, message: str) -> None:
    path = tmp_path / "lm.arpa"
    path.write_text(GOOD)
    assert load_ngram(path).order == 3
    old, new = BAD[message]
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_ngram(path)
    assert message in str(caught.value) and str(caught.value).count("\n") == 0


@settings(deadline=None, max_examples=100)
@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=3))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, place: int, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged-{os.getpid()}.arpa"
    whole = GOOD.encode()
    path.write_bytes(whole[:place] + junk + whole[place + len(junk) :])
    try:
        model = load_ngram(path)
    except UserError:
        return
    assert torch.isfinite(model.score(torch.arange(model.num_states))).all()


def test_a_model_of_other_units_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(GOOD)
    with pytest.raises(UserError, match="none of its words, such as a b, is among the units"):
        load_ngram(tmp_path / "lm.arpa", ["</s>", "<unk>", "▁c", "d"])


def test_train_lm_makes_an_n_gram_model(tmp_path: Path) -> None:
    """Of words and of pieces; what is measured is what KenLM would say; a second run has nowhere to go."""
    from asrkit.run_dir import open_run

    text, dev, out = tmp_path / "corpus.txt", tmp_path / "dev.txt", tmp_path / "lm"
    rows = [" ".join(WORDS[word] for word in row) for row in sentences(200) if row]
    text.write_text("\n".join(rows))
    dev.write_text("w0 w1\nw2 nowhere w0\n")
    words = ["train-lm", "--text", text, "--kind", "ngram", "--unit", "word", "--order", 3, "--out", out]
    assert "20.00 % of their words do not occur" in asrkit(*words, "--dev", dev)
    run = open_run(out)
    assert run.kind == "ngram" and run.model_spec["order"] == 3 and (out / "done").is_file()
    model = load_ngram(out / "lm.arpa")
    ids = [[model.symbols.index(word) for word in line.split()] for line in ("w0 w1", "w2 <unk> w0")]
    scores = model.sequence_log_probs(ids)
    scores[1, 1] = 0.0
    perplexity = run.lineage[-1]["metrics"]["perplexity"]
    assert perplexity == pytest.approx(math.exp(-float(scores.sum()) / 6), rel=1e-3)
    assert "3-grams" in asrkit("info", out)
    assert "is not empty" in asrkit(*words, code=1)
    cut = ["--set", "vocab_size=20", "--set", "ngram.cutoffs=[0,0,1]"]
    asrkit("train-lm", "--text", text, "--kind", "ngram", "--out", tmp_path / "bpe", *cut)
    spec = open_run(tmp_path / "bpe").model_spec
    assert spec["unit"] == "bpe" and spec["order"] == 4 and spec["counts"][0] == spec["vocab_size"] + 1
    (out / "lm.arpa").write_text(GOOD)
    with pytest.raises(UserError, match=r"lm.arpa: digest .* differs"):
        open_run(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "lstm", "--order", "3"], "--order: works with --kind ngram only"),
        (["--unit", "word"], "--unit word: works with --kind ngram only"),
        (["--kind", "ngram", "--unit", "phone"], "--unit phone: an n-gram model is of bpe or word units"),
        (["--kind", "ngram", "--order", "11"], "ngram.order"),
        (["--kind", "ngram", "--set", "ngram.cutoffs=[1,0]"], "cutoffs must begin with 0"),
        (
            ["--kind", "ngram", "--set", "training.optimizer.learning_rate=1e-4", "--set", "model.dim=64"],
            "training.optimizer.learning_rate: has no effect on an n-gram model",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "corpus.txt").write_text("a b\n")
    assert message in asrkit("train-lm", "--text", tmp_path / "corpus.txt", "--out", tmp_path / "lm", *options, code=1)
    assert not (tmp_path / "lm").exists()
