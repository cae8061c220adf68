"""Beam search with language models and hotwords, against slow references that score whole strings."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asrkit.config import from_dict
from asrkit.data.text.tokenizer import Tokenizer, train_tokenizer
from asrkit.decoding.acoustic import EncoderOutput
from asrkit.decoding.fusion import (
    Fusion,
    FusionConfig,
    HotwordScorer,
    NeuralScorer,
    NgramScorer,
    TokenScorer,
    sequence_scores,
)
from asrkit.decoding.hotwords import build_hotwords, read_hotwords
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.nbest import alternatives
from asrkit.decoding.search import search_n_best
from asrkit.decoding.transducer import beam_hypotheses, beam_n_best, beam_search
from asrkit.errors import UserError
from asrkit.models.lm import LanguageModel
from asrkit.models.ngram.automaton import Ngram, automaton
from asrkit.models.ngram.kneser_ney import estimate
from asrkit.models.spec import LmSpec
from helpers.pretend_gpu import GPU, pretend_gpu
from helpers.small_transducer import BLANK, SPECIAL, SmallModel, frame_log_probs, random_batch

V = 5


def ngram(order: int = 3, seed: int = 0) -> Ngram:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, V - 2, size=rng.integers(0, 9)) for _ in range(60)]
    arpa, _ = estimate(rows, [f"t{number}" for number in range(2, V)], order)
    return automaton(arpa, ["</s>", "<unk>", *(f"t{number}" for number in range(2, V))], "test")


def network(architecture: str, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    shape = {"architecture": architecture, "dim": 8, "num_layers": 2, "heads": 2}
    model = LanguageModel(from_dict(LmSpec, {"unit": "bpe", "vocab_size": V, "shape": shape}, "test")).eval()
    with torch.no_grad():
        model.out.weight *= 6  # sharp enough to matter
    return model


def scorer(kind: str) -> TokenScorer:
    return NgramScorer(ngram()) if kind == "ngram" else NeuralScorer(network(kind))


KINDS = ("ngram", "lstm", "transformer")


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(st.lists(st.lists(st.integers(2, V - 1), max_size=6), min_size=1, max_size=5))
def test_step_by_step_is_the_whole_sequence(kind: str, rows: list[list[int]]) -> None:
    """The sum of a scorer's steps is the log-probability that the model gives the sequence at once."""
    lens = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lens.max()), dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    found = sequence_scores(scorer(kind), tokens, lens)
    if kind == "ngram":
        expected = ngram().sequence_log_probs(rows).sum(1)
    else:
        with torch.no_grad():
            log_probs = network(kind)(tokens).log_softmax(-1)
        targets = [[*row, 0] for row in rows]
        expected = torch.stack(
            [sum(log_probs[n, at, token] for at, token in enumerate(row)) for n, row in enumerate(targets)]
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_0_changes_no_bit(kind: str) -> None:
    model, (frames, lens) = SmallModel(vocab_size=V, seed=4), random_batch([9, 4, 0, 12], 4)
    nothing = FusionConfig(lm_scale=0.0, lodr_scale=0.0)
    fusion = Fusion(nothing, scorer(kind), NgramScorer(ngram(2)))
    for beam in (1, 4):
        plain, fused = (beam_n_best(model, frames, lens, beam, SPECIAL, each) for each in (None, fusion))
        assert all(torch.equal(one, other) for one, other in zip(plain, fused, strict=True))
        assert beam_search(model, frames, lens, beam, SPECIAL) == beam_search(
            model, frames, lens, beam, SPECIAL, fusion
        )


@pytest.mark.slow
@pytest.mark.parametrize("use", ["fusion", "rescore"])
@pytest.mark.parametrize("kind", KINDS)
def test_fusion_equals_a_brute_force_over_all_strings(kind: str, use: str) -> None:
    """A beam that holds everything: every string's score is that of all its paths, and what the parts say of the string."""
    model, steps = SmallModel(vocab_size=V, seed=1, sharpness=1.0), 4
    frames, frame_lens = random_batch([steps], 1)
    how = from_dict(
        FusionConfig,
        {
            "lm_scale": 0.7,
            "lm_use": use,
            "lodr_scale": 0.3,
            "length_bonus": 0.4,
            "blank_penalty": 0.5,
            "temperature": 1.5,
        },
        "test",
    )
    phrases = {(2, 4): 1.5, (4, 4, 2): 0.7}
    fusion = Fusion(how, scorer(kind), NgramScorer(ngram(2)), HotwordScorer(build_hotwords(phrases, V)))
    totals: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product((BLANK, 2, 4), repeat=steps):
        prefix: tuple[int, ...] = ()
        log_prob = 0.0
        for frame, token in zip(frames[0], path, strict=True):
            log_prob += penalized(model, frame, prefix, how)[token]
            prefix = prefix if token == BLANK else (*prefix, token)
        totals[prefix] += math.exp(log_prob)
    expected = {}
    for string, total in totals.items():
        lm, lodr = (string_score(part, string, use == "rescore") for part in (scorer(kind), NgramScorer(ngram(2))))
        extra = how.lm_scale * lm - how.lodr_scale * lodr + how.length_bonus * len(string)
        expected[string] = math.log(total) + extra + complete_phrases(string, phrases)
    (found,) = beam_hypotheses(model, frames, frame_lens, 3**steps, SPECIAL, fusion)
    assert {tuple(hypothesis.tokens): pytest.approx(hypothesis.score, abs=1e-4) for hypothesis in found} == expected
    best = max(expected, key=lambda string: expected[string] / (len(string) + 2))
    assert tuple(found[0].tokens) == best
    assert tuple(beam_search(model, frames, frame_lens, 3**steps, SPECIAL, fusion)[0].tokens) == best


def on_gpu(model: LanguageModel) -> LanguageModel:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                del tensors[name]
                setattr(module, name, tensor if tensor is None else tensor.detach().to(GPU))
    return model


@pytest.mark.parametrize("use", ["fusion", "rescore"])
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_gpu_finds_what_the_cpu_finds(kind: str, use: str) -> None:
    """Bonus alone, language models and hotwords, in the prefix beam search and on its texts; sequences meet the device they are on."""
    how = from_dict(FusionConfig, {"lm_scale": 0.5, "lm_use": use, "length_bonus": 0.3, "blank_penalty": 0.2}, "test")
    log_probs = torch.randn(2, 6, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(2)
    lens, hotwords = torch.tensor([6, 4]), build_hotwords({(2, 3): 1.5}, V)
    model = SmallModel()

    def fusion(device: torch.device) -> Fusion:
        if kind == "none":
            return Fusion(how)
        gpu = device == GPU
        lm = network(kind) if kind != "ngram" else None
        part = NgramScorer(ngram().to(device)) if lm is None else NeuralScorer(on_gpu(lm) if gpu else lm)
        return Fusion(how, lm=part, hotwords=HotwordScorer(hotwords.to(device)))

    expected = search_n_best(model, EncoderOutput(log_probs, lens, log_probs), "ctc-beam", 3, (), fusion(lens.device))
    with pretend_gpu():
        there = EncoderOutput(log_probs.to(GPU), lens.to(GPU), log_probs.to(GPU))
        found = search_n_best(model, there, "ctc-beam", 3, (), fusion(GPU))
    for row, others in zip(found, expected, strict=True):
        assert [(one.tokens, one.frames) for one in row] == [(one.tokens, one.frames) for one in others]
        assert [one.score for one in row] == pytest.approx([one.score for one in others], abs=1e-4)


def penalized(model: SmallModel, frame: Tensor, prefix: tuple[int, ...], how: FusionConfig) -> list[float]:
    """The log-probabilities of a frame with blank penalty and temperature."""
    logits = torch.tensor(frame_log_probs(model, frame, prefix), dtype=torch.float64) / how.temperature
    logits[BLANK] -= how.blank_penalty
    return logits.log_softmax(0).tolist()


def string_score(part: TokenScorer, string: Sequence[int], ends: bool) -> float:
    state, total = part.start(1), 0.0
    for token in string:
        score, state = part.step(state, torch.tensor([token]))
        total += float(score)
    return total + float(part.end(state)) * ends


def complete_phrases(string: Sequence[int], phrases: dict[tuple[int, ...], float]) -> float:
    """The bonus of the phrases in a string, from left to right, each token in at most one; no phrase begins like another."""
    total, at = 0.0, 0
    while at < len(string):
        for phrase, score in phrases.items():
            if tuple(string[at : at + len(phrase)]) == phrase:
                total, at = total + score * len(phrase), at + len(phrase)
                break
        else:
            at += 1
    return total


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 4), max_size=12))
def test_hotwords_count_only_where_they_are_whole(string: list[int]) -> None:
    """Whatever was added for a phrase that broke off is taken back, also where a suffix of it begins another one."""
    phrases = {(1, 2, 1, 3): 1.0, (2, 1, 1): 2.0, (4,): 0.5}
    words = HotwordScorer(build_hotwords(phrases, 5))
    assert string_score(words, string, True) == pytest.approx(complete_phrases(string, phrases))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 4), max_size=8))
def test_the_gains_of_all_tokens_are_those_of_each(string: list[int]) -> None:
    words = build_hotwords({(1, 2, 1, 3): 1.0, (2, 1, 1): 2.0, (4,): 0.5}, 5)
    state = torch.zeros(1, dtype=torch.int64)
    for token in string:
        state = words.step(state, torch.tensor([token]))[1]
    states = torch.cat([state, torch.zeros(1, dtype=torch.int64)])
    for token in range(1, 5):
        gains, _ = words.step(states, torch.tensor([token, token]))
        torch.testing.assert_close(words.all_gains(states)[:, token], gains)


class Frames:
    """A transducer whose frames are the logits."""

    vocab_size, context_size, blank = 4, 2, 0

    def predict(self, contexts: Tensor) -> Tensor:
        return torch.zeros(len(contexts), 4)

    def join(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        return encoded.clone()


def test_early_hotwords_bring_into_the_beam_what_late_ones_do_not() -> None:
    frames = torch.tensor([[[3.0, 2.5, 1.0, 2.0], [3.0, 2.5, 2.0, 1.0]]])
    model: Any = Frames()
    for use, tokens in (("early", [2]), ("late", [])):
        how = from_dict(FusionConfig, {"hotwords_use": use}, "test")
        fusion = Fusion(how, hotwords=HotwordScorer(build_hotwords({(2,): 4.0}, 4)))
        (found,) = beam_search(model, frames[:, :1], torch.tensor([1]), 2, (), fusion)
        assert found.tokens == tokens
        plain = Fusion(how, hotwords=HotwordScorer(build_hotwords({(2,): 0.0}, 4)))
        assert beam_search(model, frames, torch.tensor([2]), 2, (), plain) == beam_search(
            model, frames, torch.tensor([2]), 2
        )


def test_a_broken_phrase_leaves_nothing_behind() -> None:
    words = HotwordScorer(build_hotwords({(1, 2, 3, 4): 1.5}, 6))
    state, scores = words.start(1), []
    for token in (1, 2, 3, 5, 1, 2, 3, 4, 5):
        score, state = words.step(state, torch.tensor([token]))
        scores.append(float(score))
    assert scores == [1.5, 1.5, 1.5, -4.5, 1.5, 1.5, 1.5, 1.5, 0.0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["new york", "newark", "york town", "a new town", "boston"]
    return train_tokenizer(texts, "bpe", 30, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_hotwords_are_read_from_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "hotwords.txt"
    path.write_text("new york :2.5\n\nboston\n")
    words = HotwordScorer(read_hotwords(path, tokenizer, 1.0))
    for text, score in (("new york", 2.5), ("boston", 1.0), ("newark", 0.0)):
        tokens = tokenizer.encode(text)
        assert string_score(words, tokens, True) == pytest.approx(score * len(tokens))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no word or phrase"),
        ("new york :often\n", ":1: 'often' is not a score"),
        ("boston\nnew york :nan\n", ":2: 'nan' is not a score"),
        ("boston\nüber\n", ":2: the tokenizer has no"),
    ],
)
def test_hotwords_that_cannot_be_used_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, content: str, message: str
) -> None:
    path = tmp_path / "hotwords.txt"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_hotwords(path, tokenizer, 1.0)
    assert len(caught.value.lines) == 1 and message in caught.value.lines[0]


def test_an_n_best_list_has_each_text_once(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("new york")
    letters = [tokenizer.piece_to_id(piece) for piece in ("▁", *"newyork")]
    spelled = [letters[0], *letters[1:4], letters[0], *letters[4:]]
    other = tokenizer.encode("newark")
    found = [
        Hypothesis(whole, [], math.log(0.5)),
        Hypothesis(other, [], math.log(0.3)),
        Hypothesis(spelled, [], math.log(0.1)),
    ]
    texts = alternatives(found, tokenizer, 5)
    assert [alternative.text for alternative in texts] == ["new york", "newark"]
    assert texts[0].score == pytest.approx(math.log(0.6)) and len(alternatives(found, tokenizer, 1)) == 1


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"lm_scale": math.nan}, "lm_scale"),
        ({"temperature": 0}, "temperature"),
        ({"blank_penalty": -1}, "blank_penalty"),
    ],
)
def test_scales_that_cannot_be_numbers_are_refused(content: dict[str, float], key: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(FusionConfig, content, "decoding.yaml")
    assert len(caught.value.lines) == 1 and f"decoding.yaml: {key}: " in caught.value.lines[0]


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
        st.sampled_from([0.5, 1.0, 3.0]),
        min_size=1,
        max_size=6,
    ),
    st.lists(st.integers(1, 6), min_size=1, max_size=12),
    st.integers(0, 10**6),
)
def test_what_incomplete_hotwords_added_is_taken_back_whatever_their_order(
    phrases: dict[tuple[int, ...], float], tokens: list[int], seed: int
) -> None:
    """Also where phrases that begin alike have different scores."""
    names = list(phrases)
    np.random.default_rng(seed).shuffle(names)
    other = {name: phrases[name] for name in names}
    sums = []
    for table in (phrases, other):
        words, states, total = build_hotwords(table, 8), torch.zeros(1, dtype=torch.int64), 0.0
        for token in [*tokens, 7]:  # 7 is in no phrase
            gain, states = words.step(states, torch.tensor([token]))
            total += float(gain)
        assert int(states) == 0
        sums.append(total)
    assert sums[0] == pytest.approx(sums[1])
    assert sums[0] >= -1e-5
