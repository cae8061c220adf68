"""data check, and the check that training makes before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import Fbank, FbankConfig, NumpyFilesWriter, SupervisionSegment
from lhotse.cut import MultiCut

from asrkit.data.checks import alignment_need, coverage, encoder_frames, find_bad_cuts, find_overlap, survey
from asrkit.data.cut_audio import CutError, cut_features, read_samples
from asrkit.data.manifests import make_cut, write_cuts
from asrkit.data.text.tokenizer import train_tokenizer
from helpers.commands import asrkit

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


def kinds(cuts, tokenizer=None, read_audio=False, sound=False):
    return [(f.cut_id, f.kind) for f in find_bad_cuts(cuts, tokenizer, read_audio, sound=sound)]


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
    printed = asrkit(*command, "--json", tmp_path / "report.json", code=1)
    assert f"{tmp_path / 'train.jsonl.gz'}: cut gone: unreadable: no file" in printed
    assert printed.splitlines()[-1] == "1 unusable cuts"
    report = json.loads((tmp_path / "report.json").read_text())
    assert [f["cut_id"] for f in report["findings"]] == ["gone"]
    assert report["manifests"][str(tmp_path / "train.jsonl.gz")]["cuts"] == 2
    assert report["overlaps"][0]["speakers"] == ["x"]
    assert asrkit(*command, "--no-audio").splitlines()[-1] == "every cut can be read"
    manifest = (tmp_path / "test.jsonl.gz").read_bytes()
    said = asrkit("data", "check", "--json", tmp_path / "test.jsonl.gz", tmp_path / "train.jsonl.gz", code=1)
    assert "its name does not end in .json" in said and (tmp_path / "test.jsonl.gz").read_bytes() == manifest


def test_a_manifest_against_itself_is_an_error(tmp_path):
    write_cuts(tmp_path / "all.jsonl.gz", [cut(tmp_path, "one", noise())])
    path = tmp_path / "all.jsonl.gz"
    assert "1 of 1 cuts" in asrkit("data", "check", path, "--test", path, "--no-audio", code=1)


def test_a_recording_on_both_sides_is_an_error(tmp_path):
    one = cut(tmp_path, "one", noise())
    write_cuts(tmp_path / "train.jsonl.gz", [one])
    write_cuts(tmp_path / "test.jsonl.gz", [one.with_id("renamed")])
    paths = [str(tmp_path / f"{name}.jsonl.gz") for name in ("train", "test")]
    printed = asrkit("data", "check", paths[0], "--test", paths[1], code=1)
    assert "recordings in both: 1 of 1 cuts: renamed" in printed


def test_a_cut_without_sound_is_named(tmp_path):
    """A manifest of texts alone can train a language model, and nothing else."""
    silent = cut(tmp_path, "silent")
    silent.recording = None
    write_cuts(tmp_path / "all.jsonl.gz", [cut(tmp_path, "good", noise()), silent])
    assert "cut silent: unreadable: it has no recording" in asrkit("data", "check", tmp_path / "all.jsonl.gz", code=1)


def test_stretches_of_one_recording_are_told_from_each_other(tmp_path):
    """What overlaps, by whatever name and in whatever cut, is on both sides; neighbors are not."""
    one = cut(tmp_path, "one", noise())
    (tmp_path / "link.wav").symlink_to(tmp_path / "one.wav")
    again = cut(tmp_path, "link").with_id("again").truncate(offset=0.25, duration=0.25)
    mixed = cut(tmp_path, "other", noise()).mix(one.truncate(duration=0.1), snr=10)
    first, second = one.truncate(duration=0.5), one.truncate(offset=0.5, duration=0.5)
    faster = one.perturb_speed(2.0)  # half a second of it is all of the recording
    babble = [cut(tmp_path, name, noise()).mix(one.drop_supervisions(), snr=10) for name in ("x", "y")]
    for train, held_out, there in (
        ([one], again, True),
        ([first, second], again, True),
        ([first], second, False),
        ([second], first, False),
        ([second], again, False),
        ([first], mixed, True),
        ([second], mixed, False),
        ([second], faster.truncate(duration=0.2), False),
        ([second], faster.truncate(offset=0.3, duration=0.1), True),
        ([babble[0]], babble[1], False),  # noise that both were mixed with
    ):
        assert bool(find_overlap(train, [held_out]).same_audio) == there


def features_of(cut, folder, **changes):
    """The cut with stored features, computed by lhotse, and other facts about them if wanted."""
    fbank = Fbank(FbankConfig(num_filters=80, sampling_rate=RATE))
    stored = cut.compute_and_store_features(fbank, NumpyFilesWriter(folder / "features"))
    for name, value in changes.items():
        setattr(stored.features, name, value)
    return stored


def test_recordings_are_checked_where_they_are_heard_in_place_of_features(tmp_path):
    """By external recognizers."""
    cuts = [features_of(cut(tmp_path, name, noise()), tmp_path) for name in ("whole", "gone", "bare")]
    Path(cuts[1].recording.sources[0].source).unlink()
    cuts[2].recording = None
    assert kinds(cuts, read_audio=True) == []
    assert kinds(cuts, read_audio=True, sound=True) == [("gone", "unreadable"), ("bare", "audio")]


def test_stored_features_are_checked_as_training_reads_them(tmp_path):
    """The recordings of all of these are whole, and nobody would hear them."""

    def stored(name, **changes):
        return features_of(cut(tmp_path, name, noise()), tmp_path, **changes)

    gone, wide, short, broken, silent = (stored(name) for name in ("gone", "wide", "short", "broken", "silent"))
    for one, content in ((wide, np.zeros((100, 40))), (short, np.ones((50, 80))), (silent, np.full((100, 80), -15.9))):
        np.save(tmp_path / "features" / one.features.storage_key, content.astype(np.float32))
    for name, one in (("gone", gone), ("broken", broken)):
        file = tmp_path / "features" / one.features.storage_key
        file.unlink() if name == "gone" else file.write_bytes(b"\x93NUMPY" + bytes(100))
    values = stored("values")
    np.save(tmp_path / "features" / values.features.storage_key, np.full((100, 80), np.nan, dtype=np.float32))
    cuts = [
        stored("good"), gone, wide, short, broken, silent, values,
        stored("mfcc", type="kaldi-mfcc"), stored("bins", num_features=40), stored("shift", frame_shift=0.0125),
        stored("rate", sampling_rate=8000),
    ]  # fmt: skip
    assert kinds(cuts) == []
    assert kinds(cuts, read_audio=True) == [
        ("gone", "unreadable"), ("wide", "features"), ("short", "truncated"), ("broken", "unreadable"),
        ("silent", "silent"), ("values", "values"), ("mfcc", "features"), ("bins", "features"), ("shift", "features"),
        ("rate", "features"),
    ]  # fmt: skip
    for one in cuts[1:]:
        if one.id != "silent":
            with pytest.raises(CutError):  # what the check says is what training would meet
                cut_features(one)


def test_the_channel_that_a_cut_points_to_is_the_one_that_is_checked(tmp_path):
    soundfile.write(tmp_path / "two.wav", np.stack([noise() * 0, noise()], axis=1), RATE)
    left = make_cut("left", tmp_path / "two.wav", sampling_rate=RATE, num_samples=RATE, channels=2, text="a word")
    right = left.with_id("right")
    right.channel = 1
    both = MultiCut("both", 0, 1.0, [0, 1], left.supervisions, recording=left.recording)
    (finding,) = find_bad_cuts([left, right, both], read_audio=True)
    assert (finding.cut_id, finding.kind) == ("left", "silent")
    assert finding.detail.endswith("in channel 0, the one this cut points to, of 2")
    right.channel = 2
    assert kinds([right], read_audio=True) == [("right", "unreadable")]


def test_every_supervision_of_a_cut_is_checked(tmp_path, letters):
    one = cut(tmp_path, "talk", noise(), text="abc")
    one.supervisions[0].duration = 0.5
    one.supervisions.append(SupervisionSegment("second", "talk", 0.5, 0.5, text="zzz" + "abcd" * 10))
    assert kinds([one], letters) == [("talk", "characters"), ("talk", "alignment")]
    one.supervisions[1] = SupervisionSegment("second", "talk", 1.5, 0.5, text="abc")
    assert kinds([one], letters) == [("talk", "range")]


def test_a_cut_has_one_language_of_the_model(tmp_path):
    one, two, other = (cut(tmp_path, name, noise()) for name in ("one", "two", "other"))
    two.supervisions.append(SupervisionSegment("second", "two", 0.5, 0.5, text="un mot", language="fr"))
    other.supervisions[0].language = "it"
    findings = find_bad_cuts([one, two, other], languages=["en", "fr"])
    assert [(finding.cut_id, finding.kind) for finding in findings] == [("two", "language"), ("other", "language")]
    assert findings[0].detail == "its supervisions are of en, fr; the model takes one at a time"
    assert find_bad_cuts([one, two, other]) == []


def test_a_supervision_of_a_small_part_is_told(tmp_path):
    part, whole, two = (cut(tmp_path, name, noise()) for name in ("part", "whole", "two"))
    part.supervisions[0].duration = 0.3
    two.supervisions[0].duration = 0.4
    two.supervisions.append(SupervisionSegment("more", "two", 0.3, 0.4, text="more"))
    assert [round(coverage(one), 3) for one in (part, whole, two)] == [0.3, 1.0, 0.7]
    assert survey([part, whole, two]).sparse == ["part"]
    write_cuts(tmp_path / "m.jsonl.gz", [part, whole, two])
    printed = asrkit("data", "check", tmp_path / "m.jsonl.gz")
    assert "less than half of the audio, all of which is trained on, in 1 of 3 cuts: part" in printed


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".wav", {"subtype": "PCM_U8"}), (".mp3", {}), (".flac", {}), (".ogg", {"format": "OGG", "subtype": "OPUS"})],
)
@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_lengths_of_other_formats(tmp_path, suffix, options, rate):
    """A cut that is too short gets a plain message; otherwise the samples are those that lhotse reads."""
    path = tmp_path / f"a{suffix}"
    soundfile.write(path, np.resize(noise(), rate + 1), rate, **options)
    facts = {"sampling_rate": rate, "text": "a word"}
    whole = make_cut("whole", path, num_samples=soundfile.info(path).frames, **facts)
    for one in (whole, whole.truncate(duration=0.5), whole.truncate(offset=0.25, duration=0.5)):
        assert kinds([one], read_audio=True) == []
        assert torch.equal(read_samples(one), torch.from_numpy(one.load_audio()[0]))
    early = make_cut("early", path, num_samples=2 * rate, **facts)
    (finding,) = find_bad_cuts(
        [early, make_cut("near", path, num_samples=rate + rate // 100, **facts)], read_audio=True
    )
    assert finding.kind == "truncated" and "ends 1.00 s early; restore the file or import again" in finding.detail
    for one in (early.perturb_volume(0.5), early.perturb_speed(1.1)):  # these lhotse reads
        (finding,) = find_bad_cuts([one], read_audio=True)
        assert (finding.kind, finding.detail) == (
            "unreadable", "its length is not what the manifest says; import it again",
        )  # fmt: skip
