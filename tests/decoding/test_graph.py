"""Decoding graphs: what they accept and how likely, against sums over all paths; and their search."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from asrkit import extras
from asrkit.config import from_dict
from asrkit.data.features import fbank
from asrkit.data.manifests import make_cut, write_cuts
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import EncoderOutput
from asrkit.decoding.domain import Domain, make_search
from asrkit.decoding.fusion import FusionConfig, FusionRequest
from asrkit.decoding.graph_compiler import graph_of_pieces, graph_of_sentences, graph_of_words
from asrkit.decoding.graph_search import GraphOptions, GraphSearch, k2_for_graphs
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.lattices import graph_lattice
from asrkit.decoding.recognizer import load_recognizer
from asrkit.decoding.streaming import Endpoint, StreamingRecognizer
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.models.ctc_graph import RECORD, TENSORS, CtcGraph, load_graph
from asrkit.models.ngram.arpa import Arpa
from asrkit.models.ngram.automaton import automaton, symbols_of_pieces
from asrkit.models.ngram.kneser_ney import estimate
from asrkit.nn.context import parse_context
from asrkit.run_dir import TOKENIZER, read_yaml, write_yaml
from helpers.commands import asrkit
from helpers.small_runs import TEXTS, noise, write_run

WIDE = GraphOptions(search_beam=1000.0, output_beam=1000.0, max_active=100_000)


@pytest.fixture(scope="module")
def k2() -> ModuleType:
    module: ModuleType = pytest.importorskip("k2")
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("exp") / "run")


@pytest.fixture(scope="module")
def tokenizer(run: Path) -> Tokenizer:
    return Tokenizer.load(run / TOKENIZER)


def arpa_of(units: list[list[str]], order: int, vocabulary: list[str] | None = None) -> Arpa:
    words = sorted({unit for row in units for unit in row} | {*(vocabulary or ())})
    rows = [np.array([words.index(unit) for unit in row], dtype=np.int64) for row in units]
    return estimate(rows, words, order)[0]


def frames_of(tokens: list[list[int]], vocab: int, seed: int = 0, peak: float = 4.0) -> EncoderOutput:
    """Encoder output that rather says each of the texts, a blank after every token."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[label for token in text for label in (token, 0)] or [0] for text in tokens]
    lens = torch.tensor([len(row) for row in rows])
    scores = torch.randn(len(rows), int(lens.max()), vocab, generator=generator)
    for row, labels in enumerate(rows):
        scores[row, torch.arange(len(labels)), torch.tensor(labels)] += peak
    log_probs = scores.log_softmax(dim=2)
    for row, size in enumerate(lens.tolist()):
        log_probs[row, size:] = math.nan
    return EncoderOutput(torch.zeros(len(rows), log_probs.shape[1], 0), lens, log_probs)


def accepted(graph: CtcGraph, frames: int, vocab: int) -> dict[tuple[int, ...], tuple[int, float]]:
    """By walking the graph with every sequence of labels: how many it accepts of each text, and the best score of the text."""
    leaving: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
    for (source, target, label), score in zip(graph.arcs.tolist(), graph.scores.tolist(), strict=True):
        leaving[source].append((target, label, score))
    final = graph.num_states - 1
    found: dict[tuple[int, ...], tuple[int, float]] = {}
    for labels in itertools.product(range(vocab), repeat=frames):
        states = {0: 0.0}
        for label in (*labels, -1):
            after: dict[int, float] = {}
            for state, total in states.items():
                for target, other, score in leaving[state]:
                    if other == label:
                        after[target] = max(after.get(target, -math.inf), total + score)
            states = after
        if final in states:
            text = tuple(token for token, _ in itertools.groupby(labels) if token)
            count, best = found.get(text, (0, -math.inf))
            found[text] = (count + 1, max(best, states[final]))
    return found


def paths_of(text: tuple[int, ...], frames: int, vocab: int) -> int:
    """How many sequences of labels join to a text."""
    return sum(
        tuple(token for token, _ in itertools.groupby(labels) if token) == text
        for labels in itertools.product(range(vocab), repeat=frames)
    )


class SmallTokenizer:
    """Four tokens: the blank, <unk>, a and b."""

    vocab_size, special_ids = 4, frozenset({0, 1})

    def id_to_piece(self, token: int) -> str:
        return ["<blk>", "<unk>", "a", "b"][token]


@pytest.mark.parametrize("order", [2, 3])
def test_a_graph_of_pieces_has_every_alignment_and_the_scores_of_the_model(k2: ModuleType, order: int) -> None:
    """Back-off may only raise a score, where it is likelier than the n-gram that is there."""
    small: Any = SmallTokenizer()
    arpa = arpa_of([list("ab"), list("aab"), list("ba"), list("abab")], order)
    lm = automaton(arpa, symbols_of_pieces(small), "a test")
    graph = graph_of_pieces(k2, lm, small)
    assert graph.findings(4) == []
    found, frames = accepted(graph, 3, 4), 3
    wanted = [text for size in range(4) for text in itertools.product((2, 3), repeat=size)]
    assert set(found) == {text for text in wanted if paths_of(text, frames, 4)}
    for text, (count, score) in found.items():
        assert count == paths_of(text, frames, 4)
        direct = float(lm.sequence_log_probs([text]).double().sum())
        assert score >= direct - 1e-4
        assert score == pytest.approx(direct, abs=1e-4) or score == pytest.approx(
            best_by_backing_off(lm, text), abs=1e-4
        )


def best_by_backing_off(lm: Any, text: tuple[int, ...]) -> float:
    """The best score where any state may back off before any symbol, with or without need."""
    states = {lm.start_state: 0.0}
    for token in (*text, 0):
        word, after = int(lm.words[token]), dict[int, float]()
        for state, total in list(states.items()):
            while True:
                at = (lm.keys == state * lm.num_words + word).nonzero().flatten().tolist()
                arcs = [(int(lm.targets[arc]), float(lm.log_probs[arc])) for arc in at]
                for target, score in arcs:
                    after[target] = max(after.get(target, -math.inf), total + score)
                if state == 0:
                    break
                state, total = int(lm.chains[state, 1]), total + float(lm.weights[state, 1])
        states = after
    return max(states.values())


def test_a_graph_of_words_says_words_of_its_list_with_their_scores(k2: ModuleType, tokenizer: Tokenizer) -> None:
    """Words that begin like others, and a word of one piece, are kept apart."""
    sentences = ["one two", "on one", "o two one", "two on o"]
    lm = automaton(arpa_of([text.split() for text in sentences], 2), None, "a test")
    spelled = {n: tokenizer.encode(word) for n, word in enumerate(lm.symbols) if n > 0 and word != "<unk>"}
    graph = graph_of_words(k2, lm, spelled, tokenizer)
    assert graph.findings(tokenizer.vocab_size) == []
    for text in ("on two o", "one one on"):
        encoded = frames_of([tokenizer.encode(text)], tokenizer.vocab_size, peak=14.0)
        ((best, *_),) = GraphSearch(graph, WIDE)(encoded)
        assert tokenizer.decode(best.tokens) == text
        assert encoded.ctc_log_probs is not None
        acoustic = float(encoded.ctc_log_probs[0].max(dim=1).values.sum())
        ids = [list(lm.symbols).index(word) for word in text.split()]
        states: Any = best_by_backing_off(lm, tuple(ids))
        assert best.score == pytest.approx(acoustic + states, abs=1e-3)


def test_a_graph_of_one_sentence_decodes_only_that_sentence(k2: ModuleType, tokenizer: Tokenizer) -> None:
    said = [tokenizer.encode(text) for text in (*TEXTS, "a mouse sat on the mats of the house")]
    encoded = frames_of(said, tokenizer.vocab_size)
    only = tokenizer.encode("one two three")
    for options in (WIDE, GraphOptions(search_beam=1000.0, output_beam=1000.0, paths=20)):
        for alternatives in GraphSearch(graph_of_sentences(k2, [only], tokenizer.vocab_size), options)(encoded):
            assert [hypothesis.tokens for hypothesis in alternatives] == [only]
    several = graph_of_sentences(k2, [tokenizer.encode(text) for text in TEXTS], tokenizer.vocab_size)
    found = GraphSearch(several, WIDE)(encoded)
    assert [tokenizer.decode(rows[0].tokens) for rows in found][: len(TEXTS)] == TEXTS
    # Too few frames for the sentence: no path, an empty text, and it is known.
    short = EncoderOutput(encoded.joiner_in[:, :3], torch.full((5,), 3), encoded.ctc_log_probs[:, :3])  # type: ignore[index]
    for alternatives in GraphSearch(several, WIDE)(short):
        assert alternatives == [Hypothesis([], [], -math.inf)]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_posteriors_of_a_lattice_sum_to_one_at_every_frame(k2: ModuleType, seed: int) -> None:
    small: Any = SmallTokenizer()
    lm = automaton(arpa_of([list("ab"), list("aab"), list("ba")], 2), symbols_of_pieces(small), "a test")
    encoded = frames_of([[2, 3, 3], [3], [2, 2, 2, 3]], 4, seed)
    assert encoded.ctc_log_probs is not None
    log_probs = encoded.ctc_log_probs.nan_to_num(0.0)
    fsa = graph_of_pieces(k2, lm, small).fsa(k2, 0.7, torch.device("cpu"))
    lattice = graph_lattice(k2, fsa, log_probs, encoded.lens, 1.0, GraphOptions())
    scored, shape = lattice.scored(log_probs, 1.0), log_probs.shape
    sums = sum(lattice.posteriors(scored, torch.full(shape[:2], token)) for token in range(shape[2]))
    assert isinstance(sums, torch.Tensor)
    for row, size in enumerate(encoded.lens.tolist()):
        torch.testing.assert_close(sums[row, :size], torch.ones(size, dtype=torch.float64), atol=1e-5, rtol=0)
        assert not sums[row, size:].any()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_a_token_is_as_sure_as_the_paths_that_have_it_at_its_time(k2: ModuleType, seed: int) -> None:
    """The highest, over the frames from a token's begin to the next one's, of the share of all paths that have it there."""
    texts, frames = [[2], [3], [2, 3], [2, 2], [3, 2, 3]], 6
    encoded = frames_of([[2, 3, 2]], 4, seed, peak=1.0)
    assert encoded.ctc_log_probs is not None
    log_probs = encoded.ctc_log_probs[0].double()
    at = torch.zeros(frames, 4, dtype=torch.float64)
    for labels in itertools.product((0, 2, 3), repeat=frames):
        if [token for token, _ in itertools.groupby(labels) if token] in texts:
            likelihood = log_probs[torch.arange(frames), torch.tensor(labels)].sum().exp()
            at[torch.arange(frames), torch.tensor(labels)] += likelihood
    at /= at.sum(dim=1, keepdim=True)
    ((best,),) = GraphSearch(graph_of_sentences(k2, texts, 4), WIDE)(encoded)
    ends = [*best.frames[1:], frames]
    spans = zip(best.tokens, best.frames, ends, strict=True)
    expected = [float(at[begin:end, token].max()) for token, begin, end in spans]
    assert best.posteriors == pytest.approx(expected, abs=1e-4) and best.tokens in texts


def test_beginnings_of_what_a_graph_accepts(k2: ModuleType) -> None:
    graph = graph_of_sentences(k2, [[2, 3], [2, 2, 3]], 4).prefixes()
    assert graph.findings(4) == []
    assert set(accepted(graph, 3, 4)) == {(), (2,), (2, 3), (2, 2)} and not graph.scores.any()


@pytest.mark.parametrize("kind", ["text-graph", "pieces-graph"])
def test_a_stream_over_a_graph_ends_in_the_text_of_the_whole(run: Path, graphs: Path, kind: str) -> None:
    """However the sound is parted; its running texts begin sentences of the graph."""
    recognizer = load_recognizer(run, "cpu", context=parse_context("chunk=4,left=0"))
    search = make_search(recognizer, "ctc-graph", 1, Domain(graphs / kind, replace(WIDE, scale=0.5)), stream=True)
    samples = torch.from_numpy(noise(np.random.default_rng(0), 32000))
    features = fbank(samples)[None]
    ((whole, *_),) = search.run(recognizer.model.encode(features, torch.tensor([features.shape[1]])))
    assert whole.tokens
    for size in (3000, 7777):
        stream = StreamingRecognizer(
            recognizer.model, recognizer.tokenizer, search.run, Endpoint(30, 30), search.unfinished
        )
        events = [event for block in samples.split(size) for event in stream.accept(block)]
        events += stream.finish()
        assert [event.final for event in events] == [False] * (len(events) - 1) + [True] and len(events) > 1
        assert events[-1].text == recognizer.tokenizer.decode(whole.tokens)
        if kind == "text-graph":
            assert all(any(text.startswith(event.text) for text in TEXTS) for event in events)


def test_a_running_text_is_the_beginning_that_was_said(run: Path, graphs: Path, tokenizer: Tokenizer) -> None:
    recognizer = load_recognizer(run, "cpu", context=parse_context("chunk=4,left=0"))
    search = make_search(recognizer, "ctc-graph", 1, Domain(graphs / "text-graph", WIDE), stream=True)
    said = tokenizer.encode(TEXTS[0])[:3]
    frames = frames_of([said], tokenizer.vocab_size, peak=12.0)
    assert search.unfinished is not None
    ((beginning,),), ((whole, *_),) = search.unfinished(frames), search.run(frames)
    assert beginning.tokens == said != whole.tokens


def test_a_running_text_is_searched_as_the_final_one_is(run: Path, graphs: Path) -> None:
    """With the same temperature, which also says how much the graph counts."""
    recognizer = load_recognizer(run, "cpu", context=parse_context("chunk=4,left=0"))
    features = fbank(torch.from_numpy(noise(np.random.default_rng(0), 32000)))[None]
    encoded = recognizer.model.encode(features, torch.tensor([features.shape[1]]))
    assert encoded.ctc_log_probs is not None
    cooled = encoded._replace(ctc_log_probs=(encoded.ctc_log_probs / 2).log_softmax(dim=2))
    request = FusionRequest(from_dict(FusionConfig, {"temperature": 2.0}, "test"))
    plain, warm = (
        make_search(recognizer, "ctc-graph", 1, Domain(graphs / "pieces-graph", WIDE, fusion), stream=True)
        for fusion in (None, request)
    )
    assert plain.unfinished is not None and warm.unfinished is not None
    for one, other in ((plain.unfinished, warm.unfinished), (plain.run, warm.run)):
        assert other(encoded) == one(cooled) != one(encoded)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 2.0))
def test_best_path_and_n_best_are_those_of_all_paths(k2: ModuleType, seed: int, scale: float) -> None:
    small: Any = SmallTokenizer()
    lm = automaton(arpa_of([list("ab"), list("aab"), list("ba")], 2), symbols_of_pieces(small), "a test")
    graph, frames = graph_of_pieces(k2, lm, small), 4
    encoded = frames_of([[2, 3]], 4, seed, peak=1.0)
    assert encoded.ctc_log_probs is not None
    log_probs = encoded.ctc_log_probs[0]
    text_scores = {text: scale * score for text, (_, score) in accepted(graph, frames, 4).items()}
    best: tuple[float, tuple[int, ...]] = (-math.inf, ())
    sums: dict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
    for labels in itertools.product((0, 2, 3), repeat=frames):
        text = tuple(token for token, _ in itertools.groupby(labels) if token)
        acoustic = float(log_probs[torch.arange(frames), torch.tensor(labels)].sum())
        best = max(best, (acoustic + text_scores[text], text))
        sums[text] = float(torch.logaddexp(torch.tensor(sums[text]), torch.tensor(acoustic)))
    options = GraphOptions(scale=scale, search_beam=1000.0, output_beam=1000.0, paths=3000)
    (found,) = GraphSearch(graph, options)(encoded)
    assert tuple(found[0].tokens) == best[1]
    ((one,),) = GraphSearch(graph, GraphOptions(scale=scale))(encoded)
    assert one.tokens == found[0].tokens and one.score == pytest.approx(best[0], abs=1e-3)
    assert len({tuple(h.tokens) for h in found}) == len(found)
    for hypothesis in found:
        text = tuple(hypothesis.tokens)
        assert hypothesis.score <= sums[text] + text_scores[text] + 1e-3
        assert [int(token) for token in hypothesis.tokens] == list(text) and len(hypothesis.frames) == len(text)
    likeliest = max(sums, key=lambda text: sums[text] + text_scores[text])
    assert likeliest in {tuple(h.tokens) for h in found}
    assert [h.score for h in found[1:]] == sorted((h.score for h in found[1:]), reverse=True)
    assert found == GraphSearch(graph, options)(encoded)[0]  # no randomness


@pytest.fixture(scope="module")
def graphs(k2: ModuleType, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its n-gram models and their graphs."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "text.txt").write_text("\n".join(TEXTS * 5))
    (folder / "words.txt").write_text("\n".join(TEXTS * 5) + "\nthe Qat\n")
    common = ["--kind", "ngram", "--set", "held_out=0"]
    asrkit(
        "train-lm", "--text", folder / "text.txt", *common, "--tokenizer", run / TOKENIZER, "--out", folder / "pieces"
    )
    asrkit("train-lm", "--text", folder / "words.txt", *common, "--unit", "word", "--out", folder / "words")
    for kind in ("pieces", "words"):
        said = asrkit("graph", "--from", run, "--lm", folder / kind, "--out", folder / f"{kind}-graph")
        assert ("cannot spell Qat" in said) == (kind == "words")
    asrkit("graph", "--from", run, "--text", folder / "text.txt", "--out", folder / "text-graph")
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    cuts = []
    for number, seconds in enumerate((2.0, 1.2, 3.0)):
        samples = noise(random, int(16000 * seconds))
        soundfile.write(folder / f"{number}.wav", samples, 16000)
        cuts.append(
            make_cut(
                str(number), folder / f"{number}.wav", sampling_rate=16000, num_samples=len(samples), text=TEXTS[number]
            )
        )
    write_cuts(folder / "cuts.jsonl.gz", cuts)
    return folder / "cuts.jsonl.gz"


def objects(said: str) -> list[dict[str, Any]]:
    """The lines that are JSON, among warnings."""
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_evaluate_and_transcribe_over_a_graph(run: Path, graphs: Path, manifest: Path, tmp_path: Path) -> None:
    common = ["evaluate", "--from", run, "--manifest", manifest, "--out", tmp_path, "--json"]
    (result,) = objects(asrkit(*common, "--graph", graphs / "text-graph"))
    assert result["method"] == "ctc-graph" and result["graph"]["path"] == str(graphs / "text-graph")
    assert result["confidence"]["temperature"] == 1 and result["graph"]["paths"] == 0
    wide = [
        "--graph",
        graphs / "pieces-graph",
        "--graph-scale",
        "0.5",
        "--calibrate",
        manifest,
        "--format",
        "ctm",
        "--format",
        "json",
    ]
    (result,) = objects(asrkit(*common, *wide))
    assert any("fitted to these very cuts" in line for line in result["warnings"])
    assert result["graph"]["paths"] == 0 and result["confidence"]["calibrated_on"] == str(manifest)
    for changed in (["--search-beam", "10", "--output-beam", "4"], ["--confidence-temperature", "2"]):
        asrkit(*common, *wide[:4], *changed)  # has a directory of its own
    folders = list(tmp_path.glob("cuts-*-ctc-graph-pieces-graph-0.5-*"))
    (folder,) = (folder for folder in folders if (folder / "hypotheses.ctm").is_file())
    assert len(folders) == 3 and folder.name.rpartition("-calibrated-")[2] in folder.name.split("-")[1]
    rows = [json.loads(line) for line in (folder / "hypotheses.json").read_text().splitlines()]
    lines = (folder / "utterances.jsonl").read_text().splitlines()
    for row, line in zip(rows, map(json.loads, lines), strict=True):
        assert row["text"] == line["hyp"] and [word["confidence"] for word in row["words"]] == line["confidence"]
    assert (folder / "hypotheses.ctm").read_text().count("\n") == sum(len(row["words"]) for row in rows)

    audio = manifest.parent / "0.wav"
    words = ["transcribe", "--from", run, "--graph", graphs / "words-graph", audio, "--nbest", "3", "--format", "json"]
    (row,) = objects(asrkit(*words, "--lm", graphs / "pieces", "--lm-scale", "0.2"))
    alternatives = row["nbest"][0]["texts"]
    assert all(0 <= word["confidence"] <= 1 for word in row["words"])
    assert 1 <= len(alternatives) <= 3 and alternatives[0]["text"] == row["text"]
    assert alternatives == sorted(alternatives, key=lambda entry: -entry["score"])
    spoken = {word for text in TEXTS for word in text.split()} | {"the"}
    assert {word for entry in alternatives for word in entry["text"].split()} <= spoken
    asrkit(
        "transcribe",
        "--from",
        run,
        "--graph",
        graphs / "words-graph",
        audio,
        "--format",
        "srt",
        "--out",
        tmp_path / "srt",
    )
    assert [path.name for path in (tmp_path / "srt").iterdir()] == ["0.srt"]
    words = ["transcribe", "--from", run, "--stream", "--fast", "--json", "--chunk", "4", "--left", "0", audio]
    words += ["--pause", "30", "--search-beam", "1000", "--output-beam", "1000", "--graph", graphs / "text-graph"]
    *running, last = objects(asrkit(*words))
    assert last["final"] and last["text"] in TEXTS and running and not any(event["final"] for event in running)


def test_tune_of_a_graph_writes_what_evaluate_uses(run: Path, graphs: Path, manifest: Path, tmp_path: Path) -> None:
    """The dev errors of the best settings are those that evaluate counts; the graph is compared, unless another is given."""
    out, graph = tmp_path / "decoding.yaml", tmp_path / "graph"
    shutil.copytree(graphs / "pieces-graph", graph)
    over = "graph-scale=0.2:2,max-active=50:10000,temperature=1:2,lm-scale=0:1"
    words = ["tune", "--from", run, "--graph", graph, "--lm", graphs / "pieces", "--over", over, "--paths", "10"]
    assert "settings were tried" in asrkit(*words, "--manifest", manifest, "--out", out)
    tuned = read_yaml(out)
    assert tuned["method"] == "ctc-graph" and tuned["graph_options"]["paths"] == 10
    common = ["evaluate", "--from", run, "--manifest", manifest, "--out", tmp_path / "out", "--json", "--decoding", out]
    (dev,) = objects(asrkit(*common))
    assert dev["total"]["wer"] == pytest.approx(tuned["wer"]) and any("tuned on" in line for line in dev["warnings"])
    assert dev["graph"]["scale"] == tuned["graph_options"]["scale"] and dev["graph"]["paths"] == 10
    (other,) = objects(asrkit(*common, "--graph", graphs / "text-graph", "--graph-scale", "3"))
    assert (other["graph"]["path"], other["graph"]["scale"]) == (str(graphs / "text-graph"), 3)
    for line, options in (
        ("--method: a graph has its own search", ["--method", "beam"]),
        ("a graph takes none", ["--hotwords", out]),
    ):
        assert line in asrkit(*common, *options, code=1)
    write_yaml(out, tuned | {"graph": {**tuned["graph"], "sha256": "0" * 64}})
    said = asrkit(*common, code=1)
    assert f"--graph {graph}: is not the one that the decoding was tuned with" in said and said.count("\n") == 1
    said = asrkit("export", "--from", run, "--decoding", out, "--out", tmp_path / "onnx", code=1)
    assert "was tuned for a graph; give its --graph" in said and said.count("\n") == 1
    said = asrkit(*words[:5], "--over", "beam", "--manifest", manifest, "--out", out, code=1)
    assert "--over beam: has no effect with --graph" in said and said.count("\n") == 1


REFUSED: list[tuple[list[str], str]] = [
    (["--method", "ctc", "--graph", "text-graph"], "drop --method"),
    (["--graph-scale", "2"], "no effect without --graph"),
    (["--method", "ctc", "--lm", "pieces"], "--method ctc: uses no language model"),
    (["--graph", "text-graph", "--hotwords", "text.txt"], "a graph takes none"),
    (["--method", "ctc-beam", "--lm", "words"], "is of word units"),
    (["--method", "ctc-beam", "--lm", "text-graph"], "not a complete run directory"),
    (["--graph", "pieces"], "holds no decoding graph; make one with `asrkit graph"),
    (["--graph", "text-graph", "--search-beam", "0"], "search_beam"),
    (["--calibrate", "pieces"], "--calibrate: --method greedy has no alternatives"),
    (["--method", "beam", "--confidence-temperature", "0"], "must be a number above 0"),
    (["--method", "beam", "--confidence-temperature", "inf"], "must be a number above 0"),
    (["--confidence-temperature", "2"], "--confidence-temperature: --method greedy has no alternatives"),
    (["--method", "beam", "--calibrate", "pieces", "--confidence-temperature", "2"], "drop one of them"),
]


@pytest.mark.parametrize(("words", "complaint"), REFUSED)
def test_refusals_are_one_line(
    run: Path, graphs: Path, manifest: Path, tmp_path: Path, words: list[str], complaint: str
) -> None:
    words = [str(graphs / word) if (graphs / word).exists() else word for word in words]
    said = asrkit("evaluate", "--from", run, "--manifest", manifest, "--out", tmp_path / "out", *words, code=1)
    assert complaint in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_graph_of_another_tokenizer_and_a_forged_one(
    run: Path, graphs: Path, manifest: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other")
    (other / TOKENIZER).write_bytes((other / TOKENIZER).read_bytes() + b"\0")
    shutil.copytree(graphs / "text-graph", tmp_path / "graph")
    record = read_yaml(tmp_path / "graph" / RECORD)
    write_yaml(tmp_path / "graph" / RECORD, record | {"tokenizer_sha256": "0" * 64})
    with pytest.raises(UserError, match="was edited or is damaged"):
        load_graph(tmp_path / "graph", tokenizer)

    def forge(arcs: Tensor, scores: Tensor) -> None:
        from asrkit.config import digest

        save_file({"arcs": arcs.contiguous(), "scores": scores.contiguous()}, tmp_path / "graph" / TENSORS)
        changed = record | {"sha256": sha256_of(tmp_path / "graph" / TENSORS)}
        changed |= {"own": digest({key: value for key, value in changed.items() if key != "own"})}
        write_yaml(tmp_path / "graph" / RECORD, changed)

    tensors = load_file(graphs / "text-graph" / TENSORS)
    arcs, scores = tensors["arcs"], tensors["scores"]
    last = int(arcs[:, 1].max())
    forge(arcs, scores)
    load_graph(tmp_path / "graph", tokenizer)
    far, jump, turned = arcs.clone(), arcs.clone(), arcs.flip(0)
    vast = torch.where(arcs == last, 2_000_000_000, arcs)  # k2 has memory for every state up to the last
    far[5, 2] = tokenizer.vocab_size
    jump[5, 1] = last
    for bad, said in (
        (far, "a label is no token"),
        (jump, "into the final state"),
        (turned, "not sorted"),
        (-arcs, "negative"),
        (vast, "no arcs into it"),
    ):
        forge(bad, scores)
        with pytest.raises(UserError, match=said):
            load_graph(tmp_path / "graph", tokenizer)
    for bad_scores in (scores * math.nan, scores[1:], scores.double()):
        forge(arcs, bad_scores)
        with pytest.raises(UserError, match="scores are not"):
            load_graph(tmp_path / "graph", tokenizer)
    (tmp_path / "graph" / TENSORS).write_bytes(b"")
    with pytest.raises(UserError, match="not the one that was written"):
        load_graph(tmp_path / "graph", tokenizer)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--lm", "pieces", "--text", "text.txt"], "a graph is made from one of them"),
        (["--lm", "text.txt"], "no such run directory"),
        (["--text", "missing.txt"], "cannot read"),
        (["--text", "bad.txt"], "bad.txt:2: the tokenizer has no 'Q'"),
        (["--text", "empty.txt"], "has no sentence"),
        (["--text", "/dev/zero"], "is larger than 8 MiB"),
        ([], "has no denominator graph"),
    ],
)
def test_what_no_graph_is_made_of(run: Path, graphs: Path, tmp_path: Path, words: list[str], complaint: str) -> None:
    (graphs / "bad.txt").write_text("one two\nthe Qat\n")
    (graphs / "empty.txt").write_text("\n\n")
    words = [word if word.startswith("--") else str(graphs / word) for word in words]
    said = asrkit("graph", "--from", run, *words, "--out", tmp_path / "out", code=1)
    assert complaint in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_without_k2_one_line_says_what_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = extras.EXTRAS["k2"]._replace(module="no_such_k2")
    monkeypatch.setitem(extras.EXTRAS, "k2", missing)
    with pytest.raises(UserError, match="doctor.*use --method ctc-beam --lm") as caught:
        k2_for_graphs()
    assert len(caught.value.lines) == 1
