"""Forced alignment: against every path there is, against k2, and on real runs; the decision tree of senones."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse.supervision import AlignmentItem

from asrkit.data.alignment import items_of
from asrkit.data.manifests import open_cuts, write_cuts
from asrkit.data.senones import SenoneConfig, cepstra_of, grow_tree, in_context, load_tree, save_tree
from asrkit.data.text.tokenizer import train_tokenizer
from asrkit.decoding.alignment import ctc_align, even_parts, fit_gaussians, forced_parts, spans_of, viterbi
from asrkit.errors import UserError
from helpers.aligned import make_aligned_corpus
from helpers.commands import asrkit, sets
from helpers.run_dirs import metrics


def collapse(labels: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(labels) if label]


def slow_best(log_probs: torch.Tensor, symbols: list[int]) -> float:
    """The best of all labelings of the frames that collapse to the symbols; -inf if there is none."""
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


@pytest.mark.slow
def test_words_are_found_where_they_are_said(corpus: Path, tmp_path: Path) -> None:
    """In the corpus every word takes 0.4 s; the CTC path is within two frames of it. Words lose nothing and part nothing."""
    out = tmp_path / "aligned.jsonl.gz"
    said = asrkit("align", "--from", corpus / "parent", "--manifest", corpus / "train.jsonl.gz", "--out", out)
    assert "24 cuts, aligned by word, bpe; mean word score 0." in said
    assert float(said.rsplit(maxsplit=1)[-1]) > 0.5
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--out", "x.json"], "ends in .jsonl.gz"),
        (["--set", "passes=9"], "passes: only with --phones gaussian"),
        (["--set", "senones.number=9"], "senones: says how a tree is grown, for --unit senone"),
        (["--senones", "nowhere.yaml"], "--senones: is only used with --unit senone; add that, or drop --senones"),
        (["--unit", "senone", "--senones", "nowhere.yaml"], "no such file of senones"),
        (["--unit", "syllable"], "units"),
        (["--from", "nowhere"], "no such run directory"),
        (["--set", "variant=other"], "no variant other"),
    ],
)
def test_wrong_options_of_align(corpus: Path, tmp_path: Path, words: list[str], complaint: str) -> None:
    files = ["--from", corpus / "parent", "--out", tmp_path / "out.jsonl.gz", "--manifest", corpus / "dev.jsonl.gz"]
    said = asrkit("align", *files, *words, code=1)  # of an option given twice the last counts
    assert complaint in said and said.startswith("error: ") and "Traceback" not in said


@pytest.mark.slow
def test_a_manifest_is_not_aligned_onto_itself(corpus: Path, tmp_path: Path) -> None:
    source = tmp_path / "dev.jsonl.gz"
    source.write_bytes((corpus / "dev.jsonl.gz").read_bytes())
    (tmp_path / "link.jsonl.gz").symlink_to(source)
    words = ["align", "--from", corpus / "parent", "--manifest", source, "--out", tmp_path / "link.jsonl.gz"]
    assert "is a file that this command reads" in asrkit(*words, code=1)
    assert source.read_bytes() == (corpus / "dev.jsonl.gz").read_bytes()


PITCH = {"a": 0.0, "b": 3.0, "c": -3.0, "d": 5.0}  # what stands for a phone's sound in these tests


def sing(items: list[AlignmentItem], shift: dict[int, float] | None = None) -> np.ndarray:
    """Log-mel features of phones, each a slope over the bins, somewhat noisy; ``shift`` is added to the item's slope."""
    random = np.random.default_rng(0)
    frames = []
    for number, item in enumerate(items):
        slope = PITCH[item.symbol] + (shift or {}).get(number, 0.0)
        frames += [
            np.linspace(-slope, slope, 80) + 0.3 * random.standard_normal(80) for _ in range(round(item.duration * 100))
        ]
    return np.array(frames)


def spell(text: str, length: float = 0.1) -> list[AlignmentItem]:
    return [AlignmentItem(symbol, round(place * length, 2), length) for place, symbol in enumerate(text)]


def test_phones_are_found_within_their_words() -> None:
    """Evenly shared they are wrong; passes of forced alignment put them where their sound changes."""
    words, phones, truth = [], [], []
    for number in range(12):
        start, lengths = 0.4 * number, (0.1, 0.3) if number % 2 else (0.3, 0.1)
        said = ["a", "b"] if number % 3 else ["d", "c"]
        words.append(AlignmentItem("word", round(start, 2), 0.4))
        phones.append(said)
        times = (start, start + lengths[0])
        truth += [AlignmentItem(p, round(t, 2), n) for p, t, n in zip(said, times, lengths, strict=True)]
    log_mel = sing(truth)
    found = [item for word, said in zip(words, phones, strict=True) for item in even_parts(word, said)]
    assert sum(abs(one.start - true.start) > 0.05 for one, true in zip(found, truth, strict=True)) == 12
    for _ in range(4):
        found = forced_parts(words, phones, log_mel, fit_gaussians([(found, log_mel)]))
    assert [item.symbol for item in found] == [item.symbol for item in truth]
    assert max(abs(one.start - true.start) for one, true in zip(found, truth, strict=True)) <= 0.02
    # A word of more phones than frames is shared evenly, beside others that are not.
    short = [AlignmentItem("word", 0.0, 0.02), words[1]]
    parts = forced_parts(short, [["a", "b", "c"], phones[1]], log_mel, fit_gaussians([(found, log_mel)]))
    assert [part.duration for part in parts[:3]] == pytest.approx([0.0067] * 3, abs=2e-4) and len(parts) == 5


def likelihood(frames: np.ndarray) -> float:
    """Of frames under their own diagonal Gaussian, without the constants, by the book."""
    variance = np.maximum(frames.var(axis=0), 1e-4)
    return float(-0.5 * (np.log(variance) + np.square(frames - frames.mean(axis=0)) / variance - 1).sum())


def test_the_tree_asks_what_tells_most() -> None:
    """a sounds otherwise after d. The first split is of a, by a question that parts d from all others on its left; every
    question is compared with likelihoods of the frames themselves."""
    text = "abacabdacadabacdabacada" * 3
    items = spell(text)
    after_d = {place: 4.0 for place in range(1, len(text)) if text[place] == "a" and text[place - 1] == "d"}
    log_mel = sing(items, after_d)
    tree = grow_tree([(items, log_mel)], SenoneConfig(number=5, smallest=20))
    assert len(tree.senones) == 5 and tree.roots["a"][0]["side"] == "left" and "senone" in tree.roots["b"][0]
    (root,) = tree.roots["a"]
    members = set(tree.questions[root["question"]])
    assert ("d" in members) != bool({"b", "c"} & members)
    cepstra = cepstra_of(log_mel)

    def gain(side: str, question: list[str]) -> float:
        yes, no = [], []  # type: tuple[list[np.ndarray], list[np.ndarray]]
        for place, (left, phone, right) in enumerate(in_context(list(text))):
            if phone == "a":
                (yes if (left if side == "left" else right) in question else no).append(
                    cepstra[10 * place : 10 * place + 10]
                )
        if not yes or not no:
            return -np.inf
        halves = [np.concatenate(half) for half in (yes, no)]
        if min(map(len, halves)) < 20:
            return -np.inf
        return sum(map(likelihood, halves)) - likelihood(np.concatenate(halves))

    best = max(gain(side, question) for side in ("left", "right") for question in tree.questions)
    assert gain(root["side"], tree.questions[root["question"]]) == pytest.approx(best)
    senones = tree.senones_of(list("dabcab"))
    assert senones[1] != senones[4]


@settings(deadline=None, max_examples=15)
@given(st.text("abcd", min_size=8, max_size=40), st.integers(1, 30), st.integers(1, 3))
def test_trees_name_every_context(text: str, number: int, states: int) -> None:
    """Seen or not, every phone in every context is a senone, among as many as were asked for at most; states share a phone's time."""
    items = spell(text)
    tree = grow_tree([(items, sing(items))], SenoneConfig(number=number, smallest=5, states=states))
    phones = sorted(set(text))
    assert len(tree.senones) == len(set(tree.senones)) <= max(number, len(phones) * states)
    for left, phone, right in itertools.product(phones, repeat=3):
        named = tree.senones_of([left, phone, right])
        assert len(named) == 3 * states and set(named) <= set(tree.senones)
        assert all(name.startswith(f"{phone}.{state}.") for state, name in enumerate(named[states : 2 * states]))
    aligned = tree.align(items)
    assert [item.symbol for item in aligned] == tree.senones_of(list(text))
    assert sum(item.duration for item in aligned) == pytest.approx(0.1 * len(text), abs=1e-3)
    with pytest.raises(UserError, match="no phone x"):
        tree.senones_of(["x"])


def test_a_tree_is_kept(tmp_path: Path) -> None:
    items = spell("abcdabcadcbdacbd")
    tree = grow_tree([(items, sing(items))], SenoneConfig(number=8, smallest=5))
    save_tree(tree, tmp_path / "tree.yaml")
    assert load_tree(tmp_path / "tree.yaml") == tree
    phone, nodes = next(iter(tree.roots.items()))
    leaf, node = {"senone": "x"}, {"side": "left", "question": 0, "yes": {"senone": "x"}, "no": {"senone": "y"}}
    damaged = [
        replace(tree, states=0, roots={}), replace(tree, states=10**9), replace(tree, roots={}),
        *(replace(tree, roots={**tree.roots, phone: [bad] * len(nodes)}) for bad in (
            {}, {"senone": 3}, {**node, "question": 10**9}, {**node, "question": -1}, {**node, "side": "up"}, {**node, "yes": None},
            {**node, "no": {**node, "yes": [1]}}, {**leaf, **node},
        )),
        replace(tree, roots={**tree.roots, phone: [*nodes, leaf]}),
    ]  # fmt: skip
    for other in damaged:
        save_tree(other, tmp_path / "damaged.yaml")
        with pytest.raises(UserError, match="not a tree of senones"):
            load_tree(tmp_path / "damaged.yaml")
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match="not a tree of senones"):
        load_tree(tmp_path / "other.yaml")


@pytest.mark.slow
def test_phones_and_senones_of_a_manifest(corpus: Path, tmp_path: Path) -> None:
    """Phones fill their words, senones their phones; and a text read by the tree is what the alignment says."""
    pytest.importorskip("espeakng_loader")
    from asrkit.data.text.phones import phones_of

    out = tmp_path / "aligned.jsonl.gz"
    said = asrkit("align", "--from", corpus / "parent", "--manifest", corpus / "train.jsonl.gz", "--out", out,
                  "--unit", "phone", "--unit", "senone", "--phones", "gaussian",
                  *sets("senones.number=30", "senones.smallest=5", "senones.states=2"))  # fmt: skip
    assert str(tmp_path / "aligned.senones.yaml") in said
    tree = load_tree(tmp_path / "aligned.senones.yaml")
    assert 26 <= len(tree.senones) <= 30
    for cut in open_cuts(out):
        words, phones, senones = (items_of(cut, unit) for unit in ("word", "phone", "senone"))
        assert words is not None and phones is not None and senones is not None and items_of(cut, "bpe") is None
        spelled = phones_of(cut.supervisions[0].text, "en")
        assert [item.symbol for item in phones] == [phone for word in spelled for phone in word]
        place = 0
        for word, mine in zip(words, spelled, strict=True):
            parts = phones[place : place + len(mine)]
            # Words begin and end between two of the 10 ms frames that phones are found in.
            assert parts[0].start == pytest.approx(word.start, abs=5.1e-3)
            assert parts[-1].end == pytest.approx(word.end, abs=5.1e-3)
            place += len(mine)
        assert [item.symbol for item in senones] == tree.senones_of([item.symbol for item in phones])
    # Another manifest by the same tree, and one whose phones it does not know.
    again = ["align", "--from", corpus / "parent", "--unit", "senone", "--senones", tmp_path / "aligned.senones.yaml"]
    asrkit(*again, "--manifest", corpus / "dev.jsonl.gz", "--out", tmp_path / "dev.jsonl.gz")
    cuts = list(open_cuts(corpus / "dev.jsonl.gz"))
    cuts[0].supervisions[0].language = "ru"
    write_cuts(tmp_path / "strange.jsonl.gz", cuts)
    said = asrkit(*again, "--manifest", tmp_path / "strange.jsonl.gz", "--out", tmp_path / "x.jsonl.gz", code=1)
    assert f"cut {cuts[0].id}: phones: the senones know no phone" in said and not (tmp_path / "x.jsonl.gz").exists()


@pytest.mark.slow
def test_without_espeak_it_says_so_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asrkit.data.espeak import load_espeak
    from asrkit.data.text.phones import _phones_of_word

    for kept in (load_espeak, _phones_of_word):
        kept.cache_clear()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    files = ["--manifest", corpus / "dev.jsonl.gz", "--out", tmp_path / "out.jsonl.gz"]
    said = asrkit("align", "--from", corpus / "parent", "--unit", "phone", *files, code=1)
    assert said.splitlines() == [
        "error: synthetic speech and phones: needs espeak-ng, which is not installed; run: pip install 'asrkit[synth]' (GPL-3)"
    ]


@pytest.mark.slow
def test_pieces_of_another_tokenizer(corpus: Path, tmp_path: Path) -> None:
    """They share the time of their word evenly."""
    tokenizer = train_tokenizer(["alpha bravo carol delta"] * 3, "char", 30, tmp_path / "tokenizer.model")
    out = tmp_path / "out.jsonl.gz"
    asrkit(
        "align",
        "--from",
        corpus / "parent",
        "--manifest",
        corpus / "dev.jsonl.gz",
        "--tokenizer",
        tokenizer.path,
        "--out",
        out,
    )
    for cut in open_cuts(out):
        words, pieces = items_of(cut, "word"), items_of(cut, "bpe")
        assert words is not None and pieces is not None
        count = len(pieces) // len(words)  # every word has five letters
        for number, word in enumerate(words):
            mine = pieces[count * number : count * number + count]
            assert "".join(piece.symbol for piece in mine) == "\u2581" + word.symbol
            assert [piece.duration for piece in mine] == pytest.approx([word.duration / count] * count, abs=2e-4)


@pytest.mark.slow
def test_the_senones_of_a_text_and_of_an_alignment_are_the_same(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    aligned = tmp_path / "aligned.jsonl.gz"
    asrkit("align", "--from", corpus / "parent", "--manifest", corpus / "train.jsonl.gz", "--out", aligned,
           "--unit", "senone", *sets("senones.number=30", "senones.smallest=5"))  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text("\n".join(cut.supervisions[0].text for cut in open_cuts(aligned)))
    brief = sets("model.dim=8", "model.num_layers=1", "training.steps=3", "training.tensorboard=false", "training.precision=float32",
                 "training.log_every=1", "held_out=0")  # fmt: skip
    losses = []
    for name, source in (("text", ["--text", text, "--language", "en"]), ("cuts", ["--manifest", aligned])):
        tree = ["--senones", tmp_path / "aligned.senones.yaml"]
        asrkit("train-lm", "--unit", "senone", *source, *tree, "--out", tmp_path / name, *brief)
        losses.append([row["loss"] for row in metrics(tmp_path / name)])
    assert losses[0] == losses[1]
