"""data synthesize, with the real espeak-ng where the extra is installed."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest

from asrkit.data.checks import find_bad_cuts
from asrkit.data.corpora.synthesize import VARIANTS, all_voices, chain_sentences, synthesize
from asrkit.data.manifests import make_cut, open_cuts, text_of, write_cuts
from asrkit.errors import UserError
from helpers.commands import asrkit

TEXTS = ["press one to go on", "please hang up", "you have 2 messages", "please go on", "in 1984", "hang up to go home"]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "en.txt").write_text("\n".join(TEXTS) + "\n\n")
    return tmp_path / "en.txt"


def held_out(folder, *said):
    cuts = [
        make_cut(f"{n}", folder / "x.wav", sampling_rate=16000, num_samples=16000, text=text, language="en")
        for n, text in enumerate(said)
    ]
    write_cuts(folder / "test.jsonl.gz", cuts)
    return folder / "test.jsonl.gz"


def drawn(cut):
    return cut.supervisions[0].text, cut.supervisions[0].custom


def test_speech_of_the_texts(texts, tmp_path):
    pytest.importorskip("espeakng_loader")
    test = held_out(tmp_path, "Please hang up.")
    made = synthesize([(texts, "en")], tmp_path / "out", minutes=0.5, exclude=[test])
    cuts = list(open_cuts(tmp_path / "out" / "train.jsonl.gz"))
    assert made is not None and cuts == made.cuts
    assert (made.texts, made.unusable, made.excluded) == (4, 1, 1)
    assert {text_of(cut) for cut in cuts} == {
        "press one to go on", "you have two messages", "please go on", "hang up to go home"
    }  # fmt: skip
    assert 30 <= sum(cut.duration for cut in cuts) < 40
    assert {cut.sampling_rate for cut in cuts} == {16000}
    assert len({cut.supervisions[0].speaker for cut in cuts}) > 5
    assert find_bad_cuts(cuts, None, True) == []
    assert synthesize([(texts, "en")], tmp_path / "out", minutes=0.5, exclude=[test]) is None
    again = synthesize([(texts, "en")], tmp_path / "again", minutes=0.5, exclude=[test])
    # Not the samples: the phase espeak-ng starts with is where it stopped before. A new process gives those too.
    assert again is not None
    assert [drawn(cut) for cut in again.cuts] == [drawn(cut) for cut in cuts]
    other = synthesize([(texts, "en")], tmp_path / "other", minutes=0.1, seed=1)
    assert other is not None and drawn(other.cuts[0]) != drawn(cuts[0])


def test_telephone_band_has_nothing_above_4_khz(texts, tmp_path):
    pytest.importorskip("espeakng_loader")

    def share_above(cut, limit):
        energy = np.abs(np.fft.rfft(cut.load_audio()[0])) ** 2
        return energy[np.fft.rfftfreq(cut.num_samples, 1 / 16000) > limit].sum() / energy.sum()

    for band, limits in (("telephone", (0, 1e-5)), ("wide", (1e-4, 1))):
        made = synthesize([(texts, "en")], tmp_path / band, minutes=0.1, band=band)
        assert made is not None
        assert all(limits[0] <= share_above(cut, 4100) <= limits[1] for cut in made.cuts)


def test_new_sentences_keep_word_pairs_and_avoid_the_held_out(texts, tmp_path):
    pytest.importorskip("espeakng_loader")
    test = held_out(tmp_path, "please go home", "press one to go home")
    made = synthesize([(texts, "en")], tmp_path / "out", minutes=1, chains=0.7, exclude=[test])
    assert made is not None
    said = {text_of(cut) for cut in made.cuts}
    assert said - {
        "press one to go on",
        "please hang up",
        "you have two messages",
        "please go on",
        "hang up to go home",
    }
    assert not said & {"please go home", "press one to go home"}


def test_chains_are_made_of_the_texts_word_pairs():
    texts = ["a b c", "b d", "c a"]
    pairs = {pair for text in texts for words in [["", *text.split(), ""]] for pair in pairwise(words)}
    chains = chain_sentences(texts, np.random.default_rng(0), max_words=8)
    for _ in range(200):
        words = next(chains).split()
        assert 1 <= len(words) <= 8
        assert all(pair in pairs for pair in pairwise(["", *words]))


def test_several_languages_in_turn(tmp_path):
    pytest.importorskip("espeakng_loader")
    (tmp_path / "en.txt").write_text("good morning\n")
    (tmp_path / "fr.txt").write_text("bonjour, 2 fois\n")
    command = ["data", "synthesize", "--out", str(tmp_path / "out"), "--minutes", "0.2", "--voices", "en-us+f2"]
    for language in ("en", "fr"):
        command += ["--text", str(tmp_path / f"{language}.txt"), "--lang", language]
    asrkit(*command)
    cuts = list(open_cuts(tmp_path / "out" / "train.jsonl.gz"))
    assert [cut.supervisions[0].language for cut in cuts][:4] == ["en", "fr", "en", "fr"]
    assert text_of(cuts[1]) == "bonjour deux fois"
    assert {cut.supervisions[0].speaker for cut in cuts} == {"en-us+f2"}


def test_voices():
    assert all_voices("it") == ["it" + variant for variant in VARIANTS]
    assert all_voices("it", ["it+f2"]) == ["it+f2"]


def test_mistakes(texts, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none\.txt: cannot read"):
        synthesize_or_skip([(tmp_path / "none.txt", "en")], tmp_path / "out")
    with pytest.raises(UserError, match="voice nobody"):
        synthesize_or_skip([(texts, "en")], tmp_path / "out", voices=["nobody"])
    (tmp_path / "bad.txt").write_text("1984\n[beep]\n")
    with pytest.raises(UserError, match=r"no usable text for language en \(2 lines"):
        synthesize_or_skip([(tmp_path / "bad.txt", "en")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "give one for each" in asrkit("data", "synthesize", "--lang", "en", "--out", tmp_path / "out", code=1)


def synthesize_or_skip(*arguments, **options):
    pytest.importorskip("espeakng_loader")
    return synthesize(*arguments, minutes=0.1, **options)


def test_without_the_extra(texts, tmp_path, monkeypatch):
    from asrkit.data.corpora import synthesize as module

    module.load_espeak.cache_clear()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"pip install 'asrkit\[synth\]'"):
        synthesize([(texts, "en")], tmp_path / "out", minutes=0.1)
