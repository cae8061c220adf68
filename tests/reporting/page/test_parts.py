"""The parts of a report by themselves: what they read, and how they say it."""

from __future__ import annotations

import io
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from lhotse.supervision import AlignmentItem

from asrkit.data.manifests import make_cut
from asrkit.reporting.wer import Scored, align, count

pytest.importorskip("jinja2")

from asrkit.reporting.page.chain import changed_settings, stage_trees
from asrkit.reporting.page.curves import STALENESS, mean_staleness
from asrkit.reporting.page.errors import emitted, encode
from asrkit.reporting.page.figures import panel, svg
from asrkit.reporting.page.sounds import embed, file_of, said_words, to_embed
from asrkit.reporting.page.systems import Model, short_names

WORDS = st.lists(st.sampled_from("abc"), max_size=8)


def model(name: str, *weights: str, stage: str = "qat") -> Model:
    return Model(name, Path(name), stage, [{"stage": stage, "weights_sha256": one} for one in weights], {}, None)


@given(WORDS, WORDS)
def test_an_encoded_alignment_holds_the_hypothesis_and_its_errors(ref: list[str], hyp: list[str]) -> None:
    pairs = align(ref, hyp)
    coded = encode(pairs)
    words = iter(ref)
    heard: list[str] = []
    for one in coded:
        if isinstance(one, list):
            heard += one
            continue
        word = next(words)
        if one != 0:
            heard.append(word if one == 1 else one)
    assert heard == hyp and next(words, None) is None
    assert sum(one != 1 for one in coded) == count(pairs).errors


def test_pieces_stand_where_their_frames_are() -> None:
    utterance = Scored("a", "x", "x", pieces=("▁x", "y"), frames=(0, 10))
    assert emitted(utterance) == [("▁x", 0.035), ("y", 0.435)]


def test_a_figure_has_the_colors_of_the_page_and_says_what_it_shows() -> None:
    name = "a < $\\frac{$ & b"
    with panel(name) as (figure, axes):
        axes.plot([1, 2], [1, 2], color="#0072b2", gid="line", label=name)
        axes.legend()
        drawn = svg(figure, name, {"line": name})
    assert "stroke: var(--series-0)" in drawn and "var(--ink)" in drawn and "#010203" not in drawn
    assert "<title>a &lt; $\\frac{$ &amp; b</title>" in drawn and 'aria-label="a &lt; $' in drawn
    assert "<metadata" not in drawn and " a < $" not in drawn


def test_stages_that_models_share_stand_in_the_tree_once() -> None:
    models = [model("a", "1"), model("b", "1", "2"), model("c", "1", "3", "4")]
    (root,) = stage_trees(models, lambda stage: None, lambda run: {})
    assert [(stage.model and stage.model.name, len(stage.children)) for stage in root.walk()] == [
        ("a", 2), ("b", 0), (None, 1), ("c", 0)
    ]  # fmt: skip


def test_settings_other_than_the_defaults() -> None:
    plain = {"seed": 1, "training": {"steps": 9, "rate": None}, "flag": True}
    config: dict[str, Any] = {
        "stage": "qat", "from": "exp/a", "seed": 2, "training": {"steps": 9, "rate": 0.1}, "flag": False,
        "inputs": {"manifest": {"path": "x"}},
    }  # fmt: skip
    assert changed_settings(config, plain) == [
        ("from", "", "exp/a"), ("seed", "1", "2"), ("training.rate", "null", "0.1"), ("flag", "true", "false")
    ]  # fmt: skip


def test_the_mean_age_of_gradients() -> None:
    curves = {
        "timing.staleness.0": [(10, 3.0), (20, 1.0)], "timing.staleness.2": [(10, 1.0)], "timing.staleness.x": [(10, 9.0)],
        "loss": [(10, 1.0)],
    }  # fmt: skip
    curves |= {f"{STALENESS}{'9' * 400}": [(10, 1.0)]}  # a stranger's
    assert mean_staleness(curves) == [(10, 0.5), (20, 0.0)] and mean_staleness({"loss": [(1, 1.0)]}) == []


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names([Path("exp/a"), Path("exp/b/")]) == ["a", "b"]
    assert short_names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]


def test_the_worst_of_each_system_are_embedded_and_others_at_random() -> None:
    errors = [[0, 9, 8, 0, 0, 0, 0, 0], [7, 9, 0, 0, 0, 0, 0, 0]]
    chosen = to_embed(errors, 3)
    assert chosen[:3] == [1, 2, 0] and len(chosen) == len(set(chosen)) == 6 and to_embed(errors, 3) == chosen
    assert sorted(to_embed(errors, 20)) == list(range(8)) and to_embed(errors, 0) == to_embed([], 3) == []


def test_a_sound_is_embedded_as_it_sounds(tmp_path: Path) -> None:
    time = np.arange(24000) / 16000
    soundfile.write(tmp_path / "a.wav", 0.3 * np.sin(2 * np.pi * 440 * time), 16000)
    cut = make_cut("a", tmp_path / "a.wav", sampling_rate=16000, num_samples=24000, text="x")
    gone = make_cut("gone", tmp_path / "gone.wav", sampling_rate=16000, num_samples=16000, text="x")
    embedded, problems = embed([cut, gone])
    assert list(embedded) == ["a"] and len(problems) == 1 and "cut gone: unreadable" in problems[0]
    heard, rate = soundfile.read(io.BytesIO(b64decode(embedded["a"]["audio"])))
    assert rate == 16000 and abs(len(heard) - 24000) < 3000
    loudest = np.abs(np.fft.rfft(heard)).argmax() * rate / len(heard)
    assert abs(loudest - 440) < 3
    assert b64decode(embedded["a"]["picture"]).startswith(b"\x89PNG")
    assert file_of(cut) == {"path": str(tmp_path / "a.wav"), "uri": (tmp_path / "a.wav").as_uri() + "#t=0.000,1.500"}
    assert file_of(gone) == {"path": str(tmp_path / "gone.wav")} and said_words(cut) == []


def test_words_stand_where_they_are_said_in_the_cut() -> None:
    cut = make_cut("a", Path("a.wav"), sampling_rate=16000, num_samples=48000, text="x y").truncate(offset=1.0)
    items = [AlignmentItem("y", 2.0, 0.5), AlignmentItem("", 1.5, 0.5), AlignmentItem("x", 1.25, 0.25)]
    cut.supervisions[0].alignment = {"word": items}
    assert said_words(cut) == [("x", 0.25, 0.5), ("y", 1.0, 1.5)]
