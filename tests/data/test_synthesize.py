"""data synthesize, with the real espeak-ng where the extra is installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from asrkit.data.checks import decodable_cuts, find_bad_cuts
from asrkit.data.corpora.channel import through_a_device
from asrkit.data.corpora.synthesize import VARIANTS, Draw, _Espeak, all_voices, chain_sentences, read_texts, synthesize
from asrkit.data.manifests import make_cut, open_cuts, text_of, write_cuts
from asrkit.errors import UserError
from helpers.commands import ONE, asrkit
from helpers.outside import piper_voice

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
    (warning,) = decodable_cuts(tmp_path / "out" / "train.jsonl.gz")[1]  # it is no test set
    assert f"holds synthetic speech, such as cut {cuts[0].id}" in warning
    assert synthesize([(texts, "en")], tmp_path / "out", minutes=0.5, exclude=[test]) is None
    (tmp_path / "out" / "train.jsonl.gz").unlink()
    assert synthesize([(texts, "en")], tmp_path / "out", minutes=0.5, exclude=[test]) is not None
    with pytest.raises(UserError, match="is a file that this command reads"):
        synthesize([(tmp_path / "out" / "train.jsonl.gz", "en")], tmp_path / "out", minutes=0.5)
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


def test_a_manifest_is_read_in_its_language_by_whatever_tag(tmp_path):
    cuts = [
        make_cut(
            f"c{n}", tmp_path / "x.wav", sampling_rate=16000, num_samples=16000, text=f"word {n}", language=tag or None
        )
        for n, tag in enumerate(("en-US", "eng", "", "fr"))
    ]
    write_cuts(tmp_path / "all.jsonl.gz", cuts)
    assert read_texts(tmp_path / "all.jsonl.gz", "en") == (["word zero", "word one", "word two"], 0)
    assert read_texts(tmp_path / "all.jsonl.gz", "en-GB")[0] == ["word zero", "word one", "word two"]


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


def test_nothing_is_replaced_that_another_command_made(texts, tmp_path):
    """Neither speech of other options nor a manifest of whoever; what was interrupted is made anew."""
    out = tmp_path / "out"
    command = ["data", "synthesize", "--text", texts, "--lang", "en", "--minutes", 0.05, "--out", out]
    asrkit(*command)
    made = (out / "train.jsonl.gz").read_bytes()
    said = asrkit(*command, "--seed", 1, "--band", "telephone", code=1)
    assert (
        "already holds what other texts or options made (band, seed); give another --out, or remove the folder" in said
    )
    assert "already complete" in asrkit(*command)

    (out / "synthesis.json").unlink()
    assert "this command has not made it" in asrkit(*command, code=1)
    assert (out / "train.jsonl.gz").read_bytes() == made
    (out / "train.jsonl.gz").unlink()
    assert "already complete" not in asrkit(*command)


@pytest.mark.slow
def test_natural_voices(texts, tmp_path):
    """Piper by its command: drawn anew for each utterance, at 16 kHz, some as devices record; and what it refuses."""
    voice = piper_voice()
    command = ["data", "synthesize", "--engine", "piper", "--text", texts, "--minutes", 0.12, "--device-share", 0.5]
    shown = asrkit(*command, "--voice", voice, "--lang", "en", "--out", tmp_path / "out")
    assert "from 5 sentences" in shown
    cuts = list(open_cuts(tmp_path / "out" / "train.jsonl.gz"))
    assert find_bad_cuts(cuts, None, True) == [] and {cut.sampling_rate for cut in cuts} == {16000}
    draws = [cut.supervisions[0].custom["synthetic"] for cut in cuts]
    assert {draw["voice"] for draw in draws} == {voice.stem} and len({draw["length_scale"] for draw in draws}) == len(
        cuts
    )
    assert all(0.8 <= draw["length_scale"] <= 1.3 and 0.3 <= draw["noise_scale"] <= 1 for draw in draws)
    assert 0 < sum("device" in cut.supervisions[0].custom for cut in cuts) < len(cuts)
    assert "already complete" in asrkit(*command, "--voice", voice, "--lang", "en", "--out", tmp_path / "out")
    again = synthesize([(texts, "en")], tmp_path / "again", minutes=0.03, piper=[voice], device=0.5)
    assert again is not None and [drawn(cut) for cut in again.cuts] == [drawn(cut) for cut in cuts[: len(again.cuts)]]

    # Either of a voice's files, changed, is another voice; files that do not fit each other are none.
    own = tmp_path / "own.onnx"
    own.symlink_to(voice)
    facts = json.loads(Path(f"{voice}.json").read_text())
    brief = [
        "data",
        "synthesize",
        "--engine",
        "piper",
        "--text",
        texts,
        "--minutes",
        0.02,
        "--voice",
        own,
        "--lang",
        "en",
    ]
    Path(f"{own}.json").write_text(json.dumps(facts))
    asrkit(*brief, "--out", tmp_path / "other")
    Path(f"{own}.json").write_text(json.dumps(facts | {"num_symbols": facts["num_symbols"] + 1}))
    assert "already holds what other texts or options made (piper)" in asrkit(
        *brief, "--out", tmp_path / "other", code=1
    )
    for change in ({"num_speakers": 5}, {"num_speakers": 0}, {"espeak": {"voice": "en-zz"}}):
        Path(f"{own}.json").write_text(json.dumps(facts | change))
        said = asrkit(*brief, "--out", tmp_path / "new", code=1)
        assert "is not a voice for Piper" in said and said.count("\n") == 1
    assert (tmp_path / "other" / "train.jsonl.gz").is_file() and not (tmp_path / "new").exists()

    out = ["--out", tmp_path / "no"]
    assert "no voice is of this language, only en_US-joe-medium (en-us)" in asrkit(
        *command, "--voice", voice, "--lang", "fr", *out, code=1
    )
    assert "is given twice" in asrkit(*command, "--voice", voice, "--voice", voice, "--lang", "en", *out, code=1)
    assert "needs a voice; add --voice FILE.onnx" in asrkit(*command, "--lang", "en", *out, code=1)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for content, reason in (
        (None, "no file"),
        ("{}", "is not a voice for Piper"),
        (json.dumps({"espeak": {"voice": "en"}}), "is not a voice"),
    ):
        if content is not None:
            (tmp_path / "bad.onnx.json").write_text(content)
        assert reason in asrkit(*command, "--voice", tmp_path / "bad.onnx", "--lang", "en", *out, code=1)
    assert "add --engine piper" in asrkit(
        "data", "synthesize", "--text", texts, "--voice", voice, "--lang", "en", *out, code=1
    )
    assert not (tmp_path / "no").exists()


def test_a_device_keeps_the_words_where_they_were():
    """Loud and soft halves stay where they were, and the length is the same."""
    random = np.random.default_rng(0)
    samples = (np.repeat([0.02, 0.5], 8000) * random.uniform(-1, 1, 16000)).astype(np.float32)
    kinds = set()
    for _ in range(12):
        changed, how = through_a_device(samples, random)
        assert changed.shape == samples.shape and changed.dtype == np.float32 and np.isfinite(changed).all()
        first, second = np.abs(changed[:7500]).mean(), np.abs(changed[8500:]).mean()
        assert second > 3 * first and not np.allclose(changed, samples, atol=1e-4)
        kinds.add((how["codec"], "gain_db" in how))
    assert len(kinds) > 3


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


def test_ctrl_c_while_espeak_speaks_is_not_lost():
    """Python would raise it in the callback that takes the samples, which prints it and goes on."""
    engine = _Espeak()
    draw = Draw("en-us", 175, 50, 50, 0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores the signal
    timer = threading.Timer(0.05, partial(os.kill, os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            engine.say("many words " * 500, draw)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert len(engine.say("a word", draw)[0]) > 1000


@pytest.mark.slow
def test_ctrl_c_while_espeak_speaks_ends_the_command(texts, tmp_path):
    """Nearly all its time is spent within the library; the same command then makes all anew."""
    out = tmp_path / "out"
    words = ["data", "synthesize", "--text", texts, "--lang", "en", "--minutes", 10000, "--out", out]
    heeding = ["env", "--default-signal=INT", *ONE]  # what runs in the background ignores the signal
    process = subprocess.Popen([*heeding, *map(str, words)], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (out / "synthesis.json").exists():  # it speaks from here on
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "stopped; run the same command again to finish\n")
    assert not (out / "train.jsonl.gz").exists()
    words[words.index(10000)] = 0.05
    assert "already" not in asrkit(*words)
