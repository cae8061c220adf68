"""CTC prefix beam search with an n-gram, n-best lists and confidences, against slow references."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asrkit.data.text.tokenizer import Tokenizer, train_tokenizer
from asrkit.decoding.ctc import CtcFusion, ctc_beam_n_best, ctc_beam_search
from asrkit.decoding.fusion import NgramScorer
from asrkit.decoding.hypothesis import Hypothesis, rescored
from asrkit.decoding.nbest import Agreement, calibrate, distinct, word_confidence
from asrkit.models.ngram.automaton import Ngram, automaton
from asrkit.models.ngram.kneser_ney import estimate
from asrkit.reporting.confidence import expected_calibration_error, summarize_confidence

VOCAB, FRAMES = 4, 4


def small_lm(seed: int, order: int = 3) -> Ngram:
    """Over tokens 1 to 3, estimated from random sentences."""
    random = np.random.default_rng(seed)
    sentences = [random.integers(0, VOCAB - 1, size=random.integers(1, 6)) for _ in range(12)]
    arpa, _ = estimate(sentences, ["a", "b", "c"], order)
    return automaton(arpa, ["</s>", "a", "b", "c"], "a test")


def random_frames(seed: int, batch: int = 1, frames: int = FRAMES, vocab: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, vocab, dtype=torch.float64, generator=generator).log_softmax(dim=2)


def all_texts(log_probs: Tensor) -> dict[tuple[int, ...], float]:
    """log P of every text: the sum over all V ** T' paths, by joining repeats and dropping blanks."""
    totals: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        text = tuple(token for token, _ in itertools.groupby(path) if token != 0)
        totals[text] += math.exp(sum(float(frame[token]) for frame, token in zip(log_probs, path, strict=True)))
    return {text: math.log(total) for text, total in totals.items()}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 2.0), st.floats(-1.0, 1.0))
def test_with_a_language_model_it_is_the_brute_force_over_all_strings(seed: int, scale: float, bonus: float) -> None:
    lm, log_probs = small_lm(seed), random_frames(seed)
    expected = {}
    for text, acoustic in all_texts(log_probs[0]).items():
        language = float(lm.sequence_log_probs([text]).double().sum())
        expected[text] = acoustic + scale * language + bonus * len(text)
    ranked = sorted(expected, key=lambda text: -expected[text])
    (found,) = ctc_beam_search(
        log_probs, torch.tensor([FRAMES]), 200, fusion=CtcFusion([(NgramScorer(lm), scale)], bonus)
    )
    assert len(found) == len(expected) and {tuple(h.tokens) for h in found} == set(expected)
    assert tuple(found[0].tokens) == ranked[0]
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(expected[tuple(hypothesis.tokens)], abs=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 8), min_size=2, max_size=4))
def test_a_batch_is_its_utterances_one_by_one(seed: int, sizes: list[int]) -> None:
    fusion, lens = (
        CtcFusion([(NgramScorer(small_lm(seed)), 0.7), (NgramScorer(small_lm(seed + 1, 2)), -0.2)], 0.2),
        torch.tensor(sizes),
    )
    log_probs = random_frames(seed, len(sizes), 8, VOCAB)
    for row, size in enumerate(sizes):
        log_probs[row, size:] = math.nan
    together = ctc_beam_search(log_probs, lens, 3, fusion=fusion)
    for row, size in enumerate(sizes):
        (alone,) = ctc_beam_search(log_probs[row : row + 1, :size], lens[row : row + 1], 3, fusion=fusion)
        assert [h.tokens for h in together[row]] == [h.tokens for h in alone]
        assert [h.score for h in together[row]] == pytest.approx([h.score for h in alone])


@pytest.mark.parametrize("beam", [1, 4])
def test_a_scale_of_zero_changes_no_bit(beam: int) -> None:
    log_probs, lens = random_frames(3, 3, 20, 9).float(), torch.tensor([20, 11, 0])
    plain = ctc_beam_n_best(log_probs, lens, beam, special_ids=[0, 5])
    for fusion in (None, CtcFusion([(NgramScorer(small_lm(1)), 0.0)])):
        for row, found in enumerate(ctc_beam_search(log_probs, lens, beam, 0, [0, 5], fusion)):
            kept = [n for n in range(beam) if n == 0 or plain.scores[row, n] > -math.inf]
            assert [h.score for h in found] == plain.scores[row, kept].tolist()
            assert [h.tokens for h in found] == [plain.tokens[row, n, : plain.lens[row, n]].tolist() for n in kept]
            assert all(len(h.frames) == len(h.tokens) and h.frames == sorted(h.frames) for h in found)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(["one two three four", "the cat sat on the mat"], "char", 100, path)


def spoken(tokenizer: Tokenizer, text: str, score: float) -> Hypothesis:
    tokens = tokenizer.encode(text)
    return Hypothesis(tokens, list(range(len(tokens))), score)


def test_no_text_stands_twice(tokenizer: Tokenizer) -> None:
    space = tokenizer.piece_to_id("\u2581")
    one, two = spoken(tokenizer, "one", math.log(0.5)), spoken(tokenizer, "two", math.log(0.2))
    again = Hypothesis([space, *one.tokens], [0, *one.frames], math.log(0.25))
    assert tokenizer.decode(again.tokens).strip() == "one"
    found = distinct([one, two, Hypothesis(one.tokens, [7] * len(one.tokens), math.log(0.25))], tokenizer)
    assert [h.tokens for h in found] == [one.tokens, two.tokens] and found[0].frames == one.frames
    assert math.exp(found[0].score) == pytest.approx(0.75)


def test_confidence_is_the_posterior_of_the_texts_with_the_word_in_its_place(tokenizer: Tokenizer) -> None:
    texts = {"one two three": 0.5, "one three": 0.3, "one two four": 0.15, "cat two three": 0.05}
    agreement = Agreement([spoken(tokenizer, text, math.log(p)) for text, p in texts.items()], tokenizer)
    assert agreement.words == ["one", "two", "three"]
    assert agreement.confidences().tolist() == pytest.approx([0.95, 0.7, 0.85])
    assert agreement.confidences(1e6).tolist() == pytest.approx([0.75, 0.75, 0.75], abs=1e-4)
    assert agreement.confidences(1e-6).tolist() == pytest.approx([1.0, 1.0, 1.0])
    nothing = Agreement([Hypothesis([], [], 0.0)], tokenizer)
    assert nothing.words == [] and nothing.confidences().tolist() == []


def test_a_word_is_as_sure_as_its_least_sure_token(tokenizer: Tokenizer) -> None:
    text = spoken(tokenizer, "one two", 0.0)
    begin = [tokenizer.id_to_piece(token).startswith("\u2581") for token in text.tokens].index(True, 1)
    posteriors = [0.9] * len(text.tokens)
    posteriors[1], posteriors[begin] = 0.6, 0.2
    sure = word_confidence([replace(text, posteriors=posteriors)], tokenizer)
    assert sure.words == ["one", "two"] and sure.confidences().tolist() == pytest.approx([0.6, 0.2])
    cooler = sure.confidences(0.5).tolist()  # odds of 1.5 and 0.25, squared
    assert cooler == pytest.approx([2.25 / 3.25, 0.0625 / 1.0625])


def test_calibration_finds_the_temperature_that_made_the_errors(tokenizer: Tokenizer) -> None:
    """Words that are right as often as scores at temperature 3 say: that is the temperature that fits."""
    random = np.random.default_rng(0)
    utterances, right = [], []
    for _ in range(1000):
        margin = float(random.exponential(6.0))
        utterances.append(Agreement([spoken(tokenizer, "one", margin), spoken(tokenizer, "two", 0.0)], tokenizer))
        right.append([bool(random.random() < 1 / (1 + math.exp(-margin / 3)))])
    assert calibrate(utterances, right) == pytest.approx(3.0, rel=0.2)
    assert calibrate([], []) == 1.0


def test_expected_calibration_error() -> None:
    confidences, right = [0.95, 0.95, 0.55, 0.55, 0.0, 1.0], [True, False, True, False, False, True]
    # Bins (0.9, 1]: 3 words, mean 0.9667, 2/3 right; (0.5, 0.6]: 0.55 and a half; [0, 0.1]: 0 and none.
    expected = (3 * abs(2.9 / 3 - 2 / 3) + 2 * 0.05 + 0) / 6
    assert expected_calibration_error(confidences, right) == pytest.approx(expected)
    summary = summarize_confidence(confidences, right, 2.0, "dev")
    assert (summary.words, summary.right) == (6, 0.5) and summary.ece == pytest.approx(expected)
    assert summarize_confidence([], [], 1.0, None).ece is None


def test_rescoring_orders_by_both_scores() -> None:
    n_best = [[Hypothesis([1], [0], -1.0), Hypothesis([2, 3], [0, 1], -2.0)], [Hypothesis([], [], -3.0)]]
    gains = {(1,): -5.0, (2, 3): -0.5, (): -2.5}

    def scorer(tokens: Tensor, lens: Tensor) -> Tensor:
        rows = zip(tokens.tolist(), lens.tolist(), strict=True)
        return torch.tensor([gains[tuple(row[:size])] for row, size in rows])

    found = rescored(n_best, scorer)
    assert [[(h.tokens, h.score) for h in row] for row in found] == [[([2, 3], -2.5), ([1], -6.0)], [([], -5.5)]]
