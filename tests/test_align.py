"""Forced alignment: against every path there is, against k2, and on real runs; the decision tree of senones."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_runs import asrkit, make_aligned_corpus

from asrkit.data.alignment import items_of
from asrkit.data.manifests import open_cuts, write_cuts
from asrkit.decoding.alignment import ctc_align, spans_of, viterbi


def collapse(labels: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(labels) if label]


def slow_best(log_probs: torch.Tensor, symbols: list[int]) -> float:
    """The best of all labellings of the frames that collapse to the symbols; -inf if there is none."""
    num_frames, vocab = log_probs.shape
    scores = [
        sum(float(log_probs[t, label]) for t, label in enumerate(labels))
        for labels in itertools.product(range(vocab), repeat=num_frames)
        if collapse(labels) == symbols
    ]
    return max(scores, default=-np.inf)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=3))
def test_ctc_alignment_is_the_best_of_all_paths(seed: int, shapes: list[tuple[int, int]]) -> None:
    """Of batches of other lengths, repeats and impossible texts included."""
    generator = torch.Generator().manual_seed(seed)
    frames, count = max(t for t, _ in shapes), max(u for _, u in shapes)
    log_probs = torch.randn(len(shapes), frames, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    symbols = torch.zeros(len(shapes), count, dtype=torch.int64)
    for row, (_, u) in enumerate(shapes):
        symbols[row, :u] = torch.randint(1, 3, (u,), generator=generator)
    lens, symbol_lens = (torch.tensor(each) for each in zip(*shapes, strict=True))
    paths, scores = ctc_align(log_probs, lens, symbols, symbol_lens)
    for row, (t, u) in enumerate(shapes):
        said = symbols[row, :u].tolist()
        assert float(scores[row]) == pytest.approx(slow_best(log_probs[row, :t], said))
        if torch.isinf(scores[row]):
            assert (paths[row] == -1).all()
            continue
        labels = [said[place] if place >= 0 else 0 for place in paths[row, :t].tolist()]
        assert sum(float(log_probs[row, i, label]) for i, label in enumerate(labels)) == pytest.approx(
            float(scores[row])
        )
        places = [place for place in paths[row].tolist() if place >= 0]
        assert places == sorted(places) and set(places) == set(range(u))
        assert (paths[row, t:] == -1).all()


def test_k2_finds_the_same_paths() -> None:
    """Its CTC graphs, intersected with the posteriors; best path by path."""
    k2 = pytest.importorskip("k2")
    torch.manual_seed(1)
    lens, texts = [30, 22, 9], [[3, 3, 5, 1], [2, 4, 4, 4, 2], [1, 2]]
    log_probs = torch.randn(3, 30, 6).log_softmax(-1)
    symbols = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    paths, scores = ctc_align(log_probs, torch.tensor(lens), symbols, torch.tensor([len(text) for text in texts]))
    segments = torch.tensor([[row, 0, length] for row, length in enumerate(lens)], dtype=torch.int32)
    dense = k2.DenseFsaVec(log_probs, segments)
    best = k2.shortest_path(k2.intersect_dense(k2.ctc_graph(texts, modified=False), dense, 1e6), use_double_scores=True)
    torch.testing.assert_close(best.get_tot_scores(True, False).float(), scores)
    for row, length in enumerate(lens):
        labels = torch.where(paths[row] >= 0, symbols[row][paths[row].clamp(min=0)], 0)[:length]
        assert best[row].labels[:-1].tolist() == labels.tolist()


def test_states_that_may_not_be_left_out() -> None:
    """Without optional states every state is passed, in order, and each frame's place is the best."""
    emissions = torch.tensor([[[0.0, -1, -9], [-1, 0, -9], [-9, 0, -1], [-9, -9, 0]]])
    states, score = viterbi(emissions, torch.tensor([4]), torch.tensor([3]), torch.zeros(1, 3, dtype=torch.bool))
    assert states.tolist() == [[0, 1, 1, 2]] and float(score) == 0.0
    few, score = viterbi(emissions, torch.tensor([2]), torch.tensor([3]), torch.zeros(1, 3, dtype=torch.bool))
    assert few.tolist() == [[-1] * 4] and float(score) == -np.inf


def test_units_grow_into_the_silence_around_them() -> None:
    path = torch.tensor([-1, -1, -1, 0, -1, -1, -1, 1, 1, -1, -1, -1, -1, -1, -1, 2, -1])
    assert spans_of(path, 3, 17, 0).tolist() == [[3, 4], [7, 9], [15, 16]]
    # Three frames are shared as two and one; of six each takes two, and two are left.
    assert spans_of(path, 3, 17, 2).tolist() == [[1, 6], [6, 11], [13, 17]]
    assert spans_of(path, 3, 17, 99).tolist() == [[0, 6], [6, 12], [12, 17]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("align")
    make_aligned_corpus(folder)
    return folder


def test_words_are_found_where_they_are_said(corpus: Path, tmp_path: Path) -> None:
    """In the corpus every word takes 0.4 s; the CTC path is within two frames of it. Words lose nothing and part nothing."""
    out = tmp_path / "aligned.jsonl.gz"
    said = asrkit("align", "--from", corpus / "parent", "--manifest", corpus / "train.jsonl.gz", "--out", out)
    assert "24 cuts, aligned by word, bpe" in said
    before = {cut.id: cut for cut in open_cuts(corpus / "train.jsonl.gz")}
    off = []
    for cut in open_cuts(out):
        words, pieces = items_of(cut, "word"), items_of(cut, "bpe")
        assert words is not None and pieces is not None
        assert [word.symbol for word in words] == before[cut.id].supervisions[0].text.split()
        assert "".join(piece.symbol for piece in pieces).replace("\u2581", " ").split() == [w.symbol for w in words]
        for items in (words, pieces):
            assert all(one.end <= other.start + 1e-6 for one, other in itertools.pairwise(items))
            assert all(item.duration > 0 and 0 < (item.score or 0) <= 1 for item in items)
        assert pieces[0].start == words[0].start and pieces[-1].end == words[-1].end
        off += [abs(word.start - 0.4 * place) for place, word in enumerate(words)]
    assert np.mean(off) < 0.08 and cut.supervisions[0].alignment.keys() == {"word", "bpe"}


def test_supervisions_of_one_cut_get_their_own_words(corpus: Path, tmp_path: Path) -> None:
    cut = next(iter(open_cuts(corpus / "train.jsonl.gz")))
    words = cut.supervisions[0].text.split()
    first, second = (
        type(cut.supervisions[0])(f"s{number}", cut.id, 0.8 * number, 0.8, text=" ".join(part), language="en")
        for number, part in enumerate((words[:2], words[2:]))
    )
    cut.supervisions = [second, first]
    write_cuts(tmp_path / "in.jsonl.gz", [cut])
    out = tmp_path / "out.jsonl.gz"
    asrkit("align", "--from", corpus / "parent", "--manifest", tmp_path / "in.jsonl.gz", "--out", out)
    (aligned,) = open_cuts(out)
    found = {s.id: [item.symbol for item in s.alignment["word"]] for s in aligned.supervisions}
    assert found == {"s0": words[:2], "s1": words[2:]}
    pieces = {s.id: "".join(item.symbol for item in s.alignment["bpe"]) for s in aligned.supervisions}
    assert pieces["s0"].replace("\u2581", " ").split() == words[:2]


def test_cuts_that_cannot_be_aligned_are_named(corpus: Path, tmp_path: Path) -> None:
    cuts = list(open_cuts(corpus / "train.jsonl.gz"))
    cuts[1].supervisions[0].text = "zulu"
    cuts[2].supervisions[0].text = " ".join(["alpha"] * 40)
    manifest, out = tmp_path / "bad.jsonl.gz", tmp_path / "out.jsonl.gz"
    write_cuts(manifest, cuts)
    words = ["align", "--from", corpus / "parent", "--manifest", manifest, "--out", out]
    said = asrkit(*words, code=1)
    assert f"cut {cuts[1].id}: characters" in said and f"cut {cuts[2].id}: alignment" in said
    assert not out.exists() and all(line.startswith("error: ") for line in said.splitlines())
    said = asrkit(*words, "--set", "bad_cuts=skip")
    assert f"left out: cut {cuts[1].id}" in said and "22 cuts" in said
    assert {cut.id for cut in open_cuts(out)} == {cut.id for cut in cuts} - {cuts[1].id, cuts[2].id}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--out", "x.json"], "ends in .jsonl.gz"),
        (["--senones", "nowhere.yaml"], "--senones: is for --unit senone"),
        (["--unit", "senone", "--senones", "nowhere.yaml"], "no such file of senones"),
        (["--unit", "syllable"], "units"),
        (["--from", "nowhere"], "no such run directory"),
        (["--set", "configuration=other"], "no configuration other"),
    ],
)
def test_wrong_options_of_align(corpus: Path, tmp_path: Path, words: list[str], complaint: str) -> None:
    files = ["--from", corpus / "parent", "--out", tmp_path / "out.jsonl.gz", "--manifest", corpus / "dev.jsonl.gz"]
    said = asrkit("align", *files, *words, code=1)  # of an option given twice the last counts
    assert complaint in said and said.startswith("error: ") and "Traceback" not in said
