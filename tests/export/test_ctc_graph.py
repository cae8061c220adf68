"""Graphs in exports: sherpa-onnx finds the tokens that the search over the same graph finds here."""

from __future__ import annotations

from pathlib import Path

import kaldifst
import numpy as np
import pytest
import soundfile
import torch

from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.domain import Domain, make_search
from asrkit.decoding.graph_search import GraphOptions
from asrkit.decoding.recognizer import load_recognizer
from asrkit.export.directory import open_exported
from asrkit.export.openfst import GRAPH_FST, write_graph
from asrkit.export.readme import tail_seconds
from asrkit.models.ctc_graph import CtcGraph, load_graph
from asrkit.run_dir import TOKENIZER
from helpers.commands import asrkit
from helpers.sherpa_client import client
from helpers.small_runs import TEXTS, noise, write_run

SPEC = {"variants": {"backbone": {"submodels": [], "contexts": ["full", "chunk=4,left=0"]}}, "variant": "backbone"}
SCALE = 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, two graphs of its tokens, and recordings."""
    folder, random = tmp_path_factory.mktemp("graphs"), np.random.default_rng(2)
    write_run(folder / "run", SPEC)
    for number, seconds in enumerate((2.3, 1.4, 3.1)):
        soundfile.write(folder / f"{number}.wav", noise(random, int(16000 * seconds)), 16000)
    (folder / "text.txt").write_text("\n".join(TEXTS * 5))
    pytest.importorskip("k2")
    common = ["--kind", "ngram", "--set", "held_out=0", "--set", "ngram.order=3"]
    asrkit(
        "train-lm",
        "--text",
        folder / "text.txt",
        *common,
        "--tokenizer",
        folder / "run" / TOKENIZER,
        "--out",
        folder / "lm",
    )
    asrkit("graph", "--from", folder / "run", "--lm", folder / "lm", "--out", folder / "graph")
    return folder


@pytest.mark.parametrize("streams", [False, True])
def test_sherpa_finds_our_tokens_over_a_graph(folder: Path, tmp_path: Path, streams: bool) -> None:
    streaming = ["--streaming", "--chunk", "4"] if streams else []
    asrkit(
        "export",
        "--from",
        folder / "run",
        *streaming,
        "--graph",
        folder / "graph",
        "--graph-scale",
        SCALE,
        "--out",
        tmp_path / "onnx",
    )
    exported = open_exported(tmp_path / "onnx")
    assert GRAPH_FST in exported.files
    readme = (tmp_path / "onnx/README.md").read_text()
    assert f'ctc_graph="{GRAPH_FST}"' in readme and f"--ctc-graph={GRAPH_FST}" in readme
    audio = [folder / f"{number}.wav" for number in range(3)]
    theirs = client(tmp_path / "onnx", audio, "ctc", ctc_graph=str(tmp_path / "onnx" / GRAPH_FST))
    plain = client(tmp_path / "onnx", audio, "ctc")
    # Of the exported files and with the silence that the client appends, so that only the search differs.
    recognizer = load_recognizer(tmp_path / "onnx", methods=["ctc-graph"])
    options = GraphOptions(scale=SCALE, search_beam=50.0)
    search = make_search(recognizer, "ctc-graph", 1, Domain(folder / "graph", options))
    from asrkit.data.augment import pad
    from asrkit.data.features import fbank

    tail = tail_seconds(4) if streams else 0.0
    samples = [
        torch.cat([torch.from_numpy(soundfile.read(path, dtype="float32")[0]), torch.zeros(round(tail * 16000))])
        for path in audio
    ]
    features, lens = pad([fbank(sound) for sound in samples])
    expected = [alternatives[0].tokens for alternatives in search.run(recognizer.model.encode(features, lens))]
    if streams:  # the client decodes whole chunks only, so the last frames are not its own
        assert all(
            mine[: len(other)] == other and len(mine) - len(other) <= 2
            for mine, (other, _) in zip(expected, theirs, strict=True)
        )
    else:
        assert expected == [tokens for tokens, _ in theirs]
    assert any(expected) and [tokens for tokens, _ in theirs] != [tokens for tokens, _ in plain]


def test_the_file_is_the_graph(tmp_path: Path) -> None:
    arcs = torch.tensor([[0, 1, 5], [0, 2, 0], [1, 2, 3], [1, 3, -1], [1, 3, -1], [2, 3, -1]], dtype=torch.int32)
    graph = CtcGraph(arcs, torch.tensor([-1.0, -0.5, -2.0, -4.0, -3.0, -0.25]))
    write_graph(tmp_path / "graph.fst", graph, 0.5)
    fst = kaldifst.StdConstFst.read(str(tmp_path / "graph.fst"))
    assert fst.start == 0 and fst.num_states == 3
    found = [
        (state, arc.nextstate, arc.ilabel, arc.olabel, arc.weight.value)
        for state in range(3)
        for arc in kaldifst.ArcIterator(fst, state)
    ]
    assert found == [(0, 1, 6, 0, 0.5), (0, 2, 1, 0, 0.25), (1, 2, 4, 0, 1.0)]
    assert [fst.final(state).value for state in range(3)] == [float("inf"), 1.5, 0.125]


def test_a_graph_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other")
    other = tmp_path / "other" / TOKENIZER
    assert Tokenizer.load(other).vocab_size and load_graph(folder / "graph", Tokenizer.load(folder / "run" / TOKENIZER))
    for words, complaint in (
        (["--graph", folder / "lm"], "holds no decoding graph"),
        (["--graph-scale", "2"], "no effect without --graph"),
        (["--graph", folder / "graph", "--graph-scale", "inf"], "--graph-scale inf: must be a number of 0 or more"),
        (["--graph", folder / "graph", "--format", "torchscript"], "drop --format"),
    ):
        said = asrkit("export", "--from", folder / "run", *words, "--out", tmp_path / "out", code=1)
        assert complaint in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
