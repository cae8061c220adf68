"""Hidden spans and distractors: against loops, and what must hold of every draw."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.data.spans import drawn_distractors, hidden_frames, spans

lengths = st.lists(st.integers(2, 60), min_size=1, max_size=6).map(np.array)
seeds = st.integers(0, 10**6)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 40))
def test_spans_begin_at_their_starts(starts: list[bool], length: int) -> None:
    expected = [any(starts[max(0, frame - length + 1) : frame + 1]) for frame in range(len(starts))]
    assert spans(torch.tensor([starts]), length).tolist() == [expected]


@settings(deadline=None)
@given(lengths, st.floats(0.01, 0.9), st.integers(2, 12), seeds)
def test_each_row_has_as_many_hidden_frames_and_all_its_own(
    lens: np.ndarray, probability: float, length: int, seed: int
) -> None:
    hidden = hidden_frames(lens, probability, length, np.random.default_rng(seed))
    assert hidden.shape[0] == len(lens) and hidden.shape[1] >= 2
    assert bool((hidden[:, 1:] > hidden[:, :-1]).all()), "ascending, so no frame twice"
    assert bool((hidden >= 0).all()) and bool((hidden < torch.from_numpy(lens)[:, None]).all())
    assert torch.equal(hidden, hidden_frames(lens, probability, length, np.random.default_rng(seed)))


def runs(hidden: list[int], size: int) -> list[int]:
    """The lengths of the stretches of hidden frames."""
    is_hidden = np.isin(np.arange(size), hidden).tolist()
    return [len(list(group)) for one, group in groupby(is_hidden) if one]


@settings(deadline=None)
@given(st.integers(2, 80), st.floats(0.01, 0.9), st.integers(2, 12), seeds)
def test_a_row_by_itself_has_whole_spans(size: int, probability: float, length: int, seed: int) -> None:
    """None is cut off by the end, and of T' frames (probability T', up or down) are beginnings: so many spans at most."""
    (hidden,) = hidden_frames(np.array([size]), probability, length, np.random.default_rng(seed)).tolist()
    assert min(runs(hidden, size)) >= min(length, size)
    most = max(1, min(int(probability * size) + 1, size - length + 1))
    assert min(length, size) <= len(hidden) <= min(size, most * length)


@pytest.mark.parametrize(("probability", "length", "share", "mean"), [(0.065, 10, 0.487, 14.7), (0.13, 5, 0.50, 7.5)])
def test_about_half_of_a_long_utterance_is_hidden(probability: float, length: int, share: float, mean: float) -> None:
    """The paper's numbers for its frames of 20 ms, in 15.6 s, and ours for frames of 40 ms."""
    random, hidden, stretches = np.random.default_rng(0), 0, list[int]()
    size, rows = 3900 // length, 200
    for _ in range(rows):
        (row,) = hidden_frames(np.array([size]), probability, length, random).tolist()
        hidden, stretches = hidden + len(row), stretches + runs(row, size)
    assert hidden / (rows * size) == pytest.approx(share, abs=0.015)
    assert np.mean(stretches) == pytest.approx(mean, abs=0.5)


def test_surplus_frames_are_shown_again_at_random() -> None:
    """A long row beside a short one hides no more than that one, in no particular place."""
    lens, random = np.array([200, 20]), np.random.default_rng(0)
    shares = np.zeros(200)
    for _ in range(400):
        hidden = hidden_frames(lens, 0.13, 5, random)
        assert hidden.shape[1] <= 19
        shares[hidden[0]] += 1
    first, last = shares[10:100].mean(), shares[100:190].mean()
    assert first == pytest.approx(last, rel=0.1)


@settings(deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=4).map(np.array), st.integers(1, 20), seeds)
def test_a_frame_is_never_its_own_distractor(sizes: np.ndarray, count: int, seed: int) -> None:
    own = torch.from_numpy(np.random.default_rng(seed).integers(sizes[:, None], size=(len(sizes), 7)))
    distractors = drawn_distractors(own, sizes, count, np.random.default_rng(seed))
    assert distractors.shape == (len(sizes), 7, count)
    assert not bool((distractors == own.unsqueeze(-1)).any())
    assert bool((distractors >= 0).all()) and bool((distractors < torch.from_numpy(sizes)[:, None, None]).all())


def test_distractors_are_uniform_over_the_others() -> None:
    own = torch.arange(5)[None]
    distractors = drawn_distractors(own, np.array([5]), 20_000, np.random.default_rng(0))
    for frame in range(5):
        counts = distractors[0, frame].bincount(minlength=5).double() / 20_000
        expected = torch.tensor([0.0 if other == frame else 0.25 for other in range(5)]).double()
        torch.testing.assert_close(counts, expected, rtol=0, atol=0.015)


def test_rows_too_short_to_tell_two_frames_apart_are_a_mistake() -> None:
    for lens, length in ((np.array([9, 1]), 3), (np.array([9]), 1)):
        with pytest.raises(ValueError, match="two hidden frames"):
            hidden_frames(lens, 0.1, length, np.random.default_rng(0))
