"""Searches against slow references that keep every hypothesis in a dictionary or enumerate every path."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asrkit.decoding.acoustic import AcousticModel, EncoderOutput
from asrkit.decoding.ctc import ctc_beam_n_best
from asrkit.decoding.hypothesis import NBest, append_hash
from asrkit.decoding.search import METHODS, Method, decode, search
from asrkit.decoding.transducer import beam_n_best, beam_search, greedy_search, sampled_paths
from asrkit.errors import UserError
from helpers.small_transducer import BLANK, SPECIAL, SmallModel, frame_log_probs, random_batch


def reference_greedy(model: AcousticModel, frames: Tensor, max_symbols: int) -> tuple[list[int], list[int], float]:
    tokens: list[int] = []
    at: list[int] = []
    score = 0.0
    for t, frame in enumerate(frames):
        for _ in range(max_symbols):
            log_probs = frame_log_probs(model, frame, tuple(tokens))
            token = max(range(len(log_probs)), key=log_probs.__getitem__)
            score += log_probs[token]
            if token == BLANK:
                break
            tokens.append(token)
            at.append(t)
    return tokens, at, score


def reference_beam(model: AcousticModel, frames: Tensor, beam: int) -> tuple[list[int], list[int], float]:
    kept: dict[tuple[int, ...], tuple[float, list[int]]] = {(): (0.0, [])}
    for t, frame in enumerate(frames):
        grown = []
        for prefix, (score, at) in kept.items():
            for token, log_prob in enumerate(frame_log_probs(model, frame, prefix)):
                emits = token != BLANK
                grown.append((score + log_prob, (*prefix, token) if emits else prefix, [*at, t] if emits else at))
        kept = {}
        for score, prefix, at in sorted(grown, key=lambda entry: -entry[0])[:beam]:
            if prefix in kept:
                kept[prefix] = (
                    float(torch.tensor([kept[prefix][0], score]).double().logsumexp(0)),
                    kept[prefix][1],
                )
            else:
                kept[prefix] = (score, at)
    tokens, (score, at) = max(kept.items(), key=lambda entry: entry[1][0] / (len(entry[0]) + 2))
    return list(tokens), at, score


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(lens=lengths, seed=st.integers(0, 1000), max_symbols=st.integers(1, 3))
def test_greedy_equals_one_utterance_at_a_time(lens: list[int], seed: int, max_symbols: int) -> None:
    model, (frames, frame_lens) = SmallModel(seed=seed), random_batch(lens, seed)
    for row, found in enumerate(greedy_search(model, frames, frame_lens, max_symbols, SPECIAL)):
        tokens, at, score = reference_greedy(model, frames[row, : lens[row]], max_symbols)
        assert (found.tokens, found.frames) == (tokens, at)
        assert found.score == pytest.approx(score)


@settings(max_examples=30, deadline=None)
@given(lens=lengths, seed=st.integers(0, 1000), beam=st.integers(1, 6))
def test_beam_equals_the_dictionary_of_hypotheses(lens: list[int], seed: int, beam: int) -> None:
    model, (frames, frame_lens) = SmallModel(seed=seed), random_batch(lens, seed)
    for row, found in enumerate(beam_search(model, frames, frame_lens, beam, SPECIAL)):
        tokens, at, score = reference_beam(model, frames[row, : lens[row]], beam)
        assert (found.tokens, found.frames) == (tokens, at)
        assert found.score == pytest.approx(score)


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_that_holds_everything_sums_every_path(seed: int) -> None:
    """All V ** T' paths: the winner's score is the log of the sum over the paths with its tokens."""
    steps, model = 4, SmallModel(vocab_size=5, seed=seed, sharpness=1.0)
    frames, frame_lens = random_batch([steps], seed)
    totals: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product((BLANK, 2, 4), repeat=steps):
        prefix: tuple[int, ...] = ()
        log_prob = 0.0
        for frame, token in zip(frames[0], path, strict=True):
            log_prob += frame_log_probs(model, frame, prefix)[token]
            prefix = prefix if token == BLANK else (*prefix, token)
        totals[prefix] += math.exp(log_prob)
    assert sum(totals.values()) == pytest.approx(1.0)
    tokens, total = max(totals.items(), key=lambda entry: math.log(entry[1]) / (len(entry[0]) + 2))
    (found,) = beam_search(model, frames, frame_lens, beam=4 * 31, special_ids=SPECIAL)
    assert tuple(found.tokens) == tokens
    assert found.score == pytest.approx(math.log(total))


def test_a_beam_of_one_is_greedy() -> None:
    model, (frames, lens) = SmallModel(seed=3), random_batch([12, 7, 0, 1], 3)
    for one, greedy in zip(beam_search(model, frames, lens, 1), greedy_search(model, frames, lens), strict=True):
        assert (one.tokens, one.frames) == (greedy.tokens, greedy.frames)
        assert one.score == pytest.approx(greedy.score)


@pytest.mark.parametrize("method", METHODS)
def test_padding_and_company_change_nothing(method: Method) -> None:
    model = SmallModel(seed=5)
    lens = [43, 7, 30, 3, 6]
    features = torch.randn(len(lens), 60, 80)
    together = decode(model, features, torch.tensor(lens), method)
    for row, length in enumerate(lens):
        (alone,) = decode(model, features[row : row + 1, : max(length, 7)], torch.tensor([length]), method)
        assert (alone.tokens, alone.frames) == (together[row].tokens, together[row].frames)
        assert alone.score == pytest.approx(together[row].score)
    assert together[3].tokens == [] and together[3].score == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_special_tokens_are_never_emitted(method: Method) -> None:
    """Wherever they are in a vocabulary, however likely a model finds them; what else it finds is emitted."""
    model, features = SmallModel(seed=1), torch.randn(2, 120, 80)
    with torch.no_grad():
        for layer in (model.output, model.ctc):
            layer.bias[[1, 3]] += 3.0
    lens = torch.tensor([120, 80])
    freely = {token for found in decode(model, features, lens, method) for token in found.tokens}
    assert freely & {1, 3}
    for special_ids in (SPECIAL, [3], {6, 1, 2}):
        found = decode(model, features, lens, method, special_ids=special_ids)
        emitted = {token for hypothesis in found for token in hypothesis.tokens}
        assert emitted and not emitted & set(special_ids)
        assert all(math.isfinite(hypothesis.score) for hypothesis in found)


def test_the_predictor_runs_only_for_new_tokens() -> None:
    model, (frames, lens) = SmallModel(seed=2), random_batch([40, 40], 2)
    found = greedy_search(model, frames, lens)
    assert model.predicted_rows == 2 + sum(len(hypothesis.tokens) for hypothesis in found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=12), st.integers(1, 12))
def test_ctc_joins_repeats_and_drops_blanks(path: list[int], length: int) -> None:
    path = [max(token, BLANK) for token in path]  # half of the frames are blank
    length = min(length, len(path))
    log_probs = torch.full((1, len(path), 4), -5.0)
    log_probs[0, range(len(path)), path] = -0.25
    encoded = EncoderOutput(torch.zeros(1, len(path), 8), torch.tensor([length]), log_probs)
    (found,) = search(SmallModel(), encoded, "ctc")
    runs = [(token, next(run)[0]) for token, run in itertools.groupby(enumerate(path[:length]), key=lambda e: e[1])]
    assert found.tokens == [token for token, _ in runs if token != BLANK]
    assert found.frames == [frame for token, frame in runs if token != BLANK]
    assert found.score == pytest.approx(-0.25 * length)


def test_ctc_without_a_head_says_so() -> None:
    encoded = EncoderOutput(torch.zeros(1, 3, 8), torch.tensor([3]), None)
    with pytest.raises(UserError, match="no CTC head"):
        search(SmallModel(), encoded, "ctc")


def test_no_frames_at_all() -> None:
    model = SmallModel()
    for method in METHODS:
        empty = EncoderOutput(torch.zeros(2, 0, 8).double(), torch.tensor([0, 0]), torch.zeros(2, 0, 7))
        assert [found.tokens for found in search(model, empty, method)] == [[], []]


def test_hashes_of_all_short_sequences_differ() -> None:
    hashes = torch.zeros(1, dtype=torch.int64)
    everything = [hashes]
    for _ in range(4):
        hashes = torch.cat([append_hash(hashes, torch.full_like(hashes, token)) for token in range(1, 21)])
        everything.append(hashes)
    flat = torch.cat(everything)
    assert len(flat.unique()) == len(flat)


def rows_of(found: NBest, row: int) -> dict[tuple[int, ...], float]:
    """The hypotheses of an utterance, the likeliest first, with their scores."""
    sized = zip(found.tokens[row].tolist(), found.lens[row].tolist(), found.scores[row].tolist(), strict=True)
    return {tuple(tokens[:length]): score for tokens, length, score in sized if math.isfinite(score)}


def test_the_n_best_list_holds_what_the_beam_search_ends_with() -> None:
    model, (frames, lens) = SmallModel(seed=3, sharpness=1.0), random_batch([9, 5, 0, 1], 3)
    found = beam_n_best(model, frames, lens, 6, SPECIAL)
    assert found.tokens.shape[:2] == found.lens.shape == found.scores.shape == (4, 6)
    for row, best in enumerate(beam_search(model, frames, lens, 6, SPECIAL)):
        hypotheses = rows_of(found, row)
        assert hypotheses[tuple(best.tokens)] == pytest.approx(best.score)
        assert list(hypotheses.values()) == sorted(hypotheses.values(), reverse=True)
        by_length = {tokens: score / (len(tokens) + 2) for tokens, score in hypotheses.items()}
        assert tuple(best.tokens) == max(by_length, key=by_length.__getitem__)
        assert len(hypotheses) == int(found.scores[row].isfinite().sum())  # no two alike
    assert len(rows_of(found, 0)) > 3 and rows_of(found, 2) == {(): 0.0}


def ctc_texts(log_probs: Tensor, symbols: Sequence[int]) -> dict[tuple[int, ...], float]:
    """The probability of every text by every path of log_probs (T, V), written out."""
    totals: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(symbols, repeat=len(log_probs)):
        text = tuple(token for token, _ in itertools.groupby(path) if token != BLANK)
        totals[text] += math.exp(sum(float(frame[token]) for frame, token in zip(log_probs, path, strict=True)))
    return totals


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4))
def test_a_wide_ctc_beam_finds_every_text_with_its_probability(seed: int, first: int, second: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(2, max(first, second), 4, dtype=torch.float64, generator=generator).log_softmax(-1)
    found = ctc_beam_n_best(log_probs, torch.tensor([first, second]), 40, BLANK, [BLANK, 3])
    for row, length in enumerate((first, second)):
        expected = ctc_texts(log_probs[row, :length], (BLANK, 1, 2))
        hypotheses = rows_of(found, row)
        assert hypotheses.keys() == expected.keys()
        for text, score in hypotheses.items():
            assert score == pytest.approx(math.log(expected[text]))
        assert list(hypotheses.values()) == sorted(hypotheses.values(), reverse=True)


def test_a_narrow_ctc_beam_never_has_a_text_twice_nor_too_likely() -> None:
    log_probs = 3 * torch.randn(1, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_probs = log_probs.log_softmax(-1)
    expected = ctc_texts(log_probs[0], range(4))
    found = ctc_beam_n_best(log_probs, torch.tensor([6]), 4)
    hypotheses = rows_of(found, 0)
    assert len(hypotheses) == 4
    assert all(score <= math.log(expected[text]) + 1e-9 for text, score in hypotheses.items())
    assert next(iter(hypotheses)) == max(expected, key=lambda text: expected[text])


def test_sampled_paths_have_the_frequencies_of_the_model() -> None:
    model, (frames, lens) = SmallModel(vocab_size=5, seed=1, sharpness=1.0), random_batch([2, 1], 1)
    torch.manual_seed(0)
    emitted = sampled_paths(model, frames, lens, 4000, SPECIAL)
    assert emitted.shape == (2, 4000, 2) and bool((emitted[1, :, 1] == BLANK).all())
    for first, second in itertools.product((BLANK, 2, 4), repeat=2):
        log_probs = frame_log_probs(model, frames[0][0], ())
        prefix = () if first == BLANK else (first,)
        probability = math.exp(log_probs[first] + frame_log_probs(model, frames[0][1], prefix)[second])
        seen = float((emitted[0] == torch.tensor([first, second])).all(1).double().mean())
        assert seen == pytest.approx(probability, abs=0.03)
