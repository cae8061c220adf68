"""data check, and the check that training makes before it starts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from asrkit.cli import app
from asrkit.data.checks import alignment_need, encoder_frames, find_bad_cuts, find_overlap, survey
from asrkit.data.manifests import make_cut, write_cuts
from asrkit.data.text.tokenizer import train_tokenizer

RATE = 16000


def noise(seconds=1.0):
    return (np.random.default_rng(0).standard_normal(round(seconds * RATE)) * 0.1).astype(np.float32)


def cut(folder, name, samples=None, rate=RATE, text="a word", speaker="x", suffix=".wav", **changes):
    """A cut over a file written here; ``samples`` is what the file holds, one second is what the manifest says."""
    path = folder / f"{name}{suffix}"
    if samples is not None:
        soundfile.write(path, samples, rate, subtype="FLOAT" if suffix == ".wav" else None)
    facts = {"sampling_rate": RATE, "num_samples": RATE, "text": text, "speaker": speaker, "language": "en"}
    return make_cut(name, path, **(facts | changes))


def kinds(cuts, tokenizer=None, read_audio=False):
    return [(f.cut_id, f.kind) for f in find_bad_cuts(cuts, tokenizer, read_audio)]


def test_audio_that_cannot_be_used(tmp_path):
    not_finite = noise()
    not_finite[100] = np.nan
    cuts = [
        cut(tmp_path, "good", noise()),
        cut(tmp_path, "flac", noise(), suffix=".flac"),
        cut(tmp_path, "silent", noise() * 1e-4),
        cut(tmp_path, "zeros", noise() * 0),
        cut(tmp_path, "nan", not_finite),
        cut(tmp_path, "none", noise()[:0]),
        cut(tmp_path, "gone"),
        cut(tmp_path, "slower", noise(), rate=8000),
        cut(tmp_path, "shorter", noise(0.5)),
        cut(tmp_path, "cut", noise()),
        cut(tmp_path, "torn", noise(), suffix=".flac"),
        cut(tmp_path, "garbage", noise()),
    ]
    for name, length in (("cut.wav", 20_000), ("torn.flac", 5000), ("garbage.wav", 10)):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:length])
    assert kinds(cuts) == []
    assert kinds(cuts, read_audio=True) == [
        ("silent", "silent"),
        ("zeros", "silent"),
        ("nan", "values"),
        ("none", "unreadable"),
        ("gone", "unreadable"),
        ("slower", "rate"),
        ("shorter", "truncated"),
        ("cut", "truncated"),
        ("torn", "unreadable"),
        ("garbage", "unreadable"),
    ]


def test_cuts_that_start_within_a_recording(tmp_path):
    whole = cut(tmp_path, "long", noise(3.0), num_samples=3 * RATE)
    part = whole.truncate(offset=1.0, duration=1.5)
    assert kinds([part], read_audio=True) == []
    part.duration = 2.5
    assert kinds([part]) == [("long", "range")] or kinds([part]) == [(part.id, "range")]


@pytest.fixture
def letters(tmp_path):
    return train_tokenizer(["abcdefgh ijklmno"] * 20, "char", 30, tmp_path / "tokenizer.model")


def test_text_and_lengths(tmp_path, letters):
    frames = encoder_frames(1.0)
    assert frames == (100 - 3) // 4
    fits = "abcd" * 5 + "abc"  # one piece more, the space that starts a sentence
    assert alignment_need(letters.encode(fits)) == frames
    cuts = [
        cut(tmp_path, "fits", text=fits),
        cut(tmp_path, "long", text=fits + "d"),
        cut(tmp_path, "repeats", text="aa" + fits[2:]),
        cut(tmp_path, "foreign", text="abc żz"),
        cut(tmp_path, "blank", text=" "),
        cut(tmp_path, "short", text="a", num_samples=RATE // 20),
    ]
    assert kinds(cuts, letters) == [
        ("long", "alignment"),
        ("repeats", "alignment"),
        ("foreign", "characters"),
        ("blank", "text"),
        ("short", "short"),
        ("short", "alignment"),
    ]


def test_survey_and_overlap(tmp_path):
    train = [cut(tmp_path, f"{n}", text="same words" if n < 3 else f"words {n}", speaker=f"s{n % 2}") for n in range(6)]
    other = [cut(tmp_path, "5", text="Same  words!", speaker="s1"), cut(tmp_path, "new", text="other", speaker="s9")]
    found = survey(train)
    assert (found.cuts, found.seconds, found.words, found.repeated_texts, found.speakers) == (6, 6.0, 12, 2, 2)
    assert found.sampling_rates == {RATE: 6}
    assert sum(found.histogram.values()) == 6
    overlap = find_overlap(train, other)
    assert (overlap.same_id, overlap.same_audio, overlap.same_text) == (["5"], ["5"], ["5"])
    assert overlap.speakers == ["s1"]


def test_command(tmp_path):
    write_cuts(tmp_path / "train.jsonl.gz", [cut(tmp_path, "good", noise()), cut(tmp_path, "gone")])
    write_cuts(tmp_path / "test.jsonl.gz", [cut(tmp_path, "fine", noise(), text="other")])
    command = ["data", "check", str(tmp_path / "train.jsonl.gz"), "--test", str(tmp_path / "test.jsonl.gz")]
    result = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 1
    assert f"{tmp_path / 'train.jsonl.gz'}: cut gone: unreadable: no file" in result.output
    assert result.output.splitlines()[-1] == "1 unusable cuts"
    report = json.loads((tmp_path / "report.json").read_text())
    assert [f["cut_id"] for f in report["findings"]] == ["gone"]
    assert report["manifests"][str(tmp_path / "train.jsonl.gz")]["cuts"] == 2
    assert report["overlaps"][0]["speakers"] == ["x"]
    result = CliRunner().invoke(app, [*command, "--no-audio"])
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == "every cut can be used"


def test_a_recording_on_both_sides_is_an_error(tmp_path):
    one = cut(tmp_path, "one", noise())
    write_cuts(tmp_path / "train.jsonl.gz", [one])
    write_cuts(tmp_path / "test.jsonl.gz", [one.with_id("renamed")])
    paths = [str(tmp_path / f"{name}.jsonl.gz") for name in ("train", "test")]
    result = CliRunner().invoke(app, ["data", "check", paths[0], "--test", paths[1]])
    assert result.exit_code == 1
    assert "recordings in both: 1 of 1 cuts: renamed" in result.output
