"""Manifests of strangers: nothing in them runs or is fetched, and every value of the wrong type is named."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import AudioSource, CutSet, Recording
from lhotse.cut import MonoCut
from lhotse.serialization import deserialize_item

from asrkit.data.checks import find_bad_cuts
from asrkit.data.cut_audio import CutError, read_samples
from asrkit.data.manifest_schema import ALLOW
from asrkit.data.manifests import make_cut, open_cuts
from asrkit.errors import UserError, clip
from helpers.commands import asrkit

FEATURES = {
    "type": "kaldi-fbank", "num_frames": 100, "num_features": 80, "frame_shift": 0.01, "sampling_rate": 16000, "start": 0,
    "duration": 1.0, "storage_type": "numpy_files", "storage_path": "features", "storage_key": "a.npy",
}  # fmt: skip


def cut(folder: Path, **changes: Any) -> dict[str, Any]:
    """The JSON of a cut over one second of sound, with the fields at these paths (a__0__b) changed."""
    audio = folder / "a.wav"
    if not audio.exists():
        soundfile.write(audio, 0.1 * np.sin(np.arange(16000) / 9), 16000)
    data = json.loads(json.dumps(make_cut("a", audio, sampling_rate=16000, num_samples=16000, text="x y").to_dict()))
    for path, value in changes.items():
        *folders, last = [int(part) if part.isdigit() else part for part in path.split("__")]
        node = data
        for part in folders:
            node = node[part]
        node[last] = value
    return data


def refusal(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(UserError) as error:
        open_cuts(path)
    assert (len(str(error.value)) < 3000 and str(error.value).isprintable()) or len(lines) > 1
    return str(error.value)


def rir(kind: str, source: str) -> list[dict[str, Any]]:
    recording = {"id": "r", "sources": [{"type": kind, "channels": [0], "source": source}], "sampling_rate": 16000}
    kwargs = {"rir": {**recording, "num_samples": 16000, "duration": 1.0}}
    return [{"name": "ReverbWithImpulseResponse", "kwargs": kwargs}]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recording__sources__0__type": "command"}, "recording.sources.0.source: a source of type command is not read"),
        ({"recording__sources__0__type": "url"}, "recording.sources.0.source: a source of type url is not read"),
        ({"recording__sources__0__type": "new"}, "a source of type new is not read"),
        ({"recording__sources__0__source": "https://example.org/a.wav"}, "does not name a file"),
        ({"recording__sources__0__source": "pipe:touch ran"}, "does not name a file"),
        ({"recording__sources__0__source": "-"}, "does not name a file"),
        ({"recording__transforms": rir("command", "touch ran")}, "a source of type command is not read"),
        ({"features": {**FEATURES, "storage_type": "memory_raw"}}, "features stored as memory_raw are not read"),
        ({"features": {**FEATURES, "storage_type": "kaldiio"}}, "features stored as kaldiio are not read"),
        ({"features": {**FEATURES, "storage_type": "lilcom_url"}}, "features stored as lilcom_url are not read"),
        ({"features": {**FEATURES, "storage_path": "s3://bucket"}}, "features.storage_path: 's3://bucket' does not name"),
        ({"features": {**FEATURES, "storage_path": "pipe:touch ran;"}}, "does not name a file"),
    ],
)  # fmt: skip
def test_nothing_is_run_or_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data = cut(tmp_path, **changes)
    if data["recording"]["sources"][0]["type"] == "command":
        data["recording"]["sources"][0]["source"] = "touch ran"
    for line in (data, {"type": "MixedCut", "id": "a", "tracks": [{"type": "MonoCut", "cut": data, "offset": 0.0}]}):
        complaint = refusal(tmp_path / "m.jsonl", json.dumps(line))
        assert complaint.startswith(f"{tmp_path / 'm.jsonl'}:1: cut a: ") and says in complaint
        asrkit("data", "check", tmp_path / "m.jsonl", code=1)
        assert not (tmp_path / "ran").exists()


def test_the_user_can_allow_a_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, and that one alone."""
    wav = tmp_path / "a.wav"
    data = cut(tmp_path, recording__sources__0__type="command", recording__sources__0__source=f"cat {wav}")
    (tmp_path / "m.jsonl").write_text(json.dumps(data))
    monkeypatch.setenv(ALLOW, "url")
    with pytest.raises(UserError, match="type command is not read"):
        open_cuts(tmp_path / "m.jsonl")
    monkeypatch.setenv(ALLOW, "url, command")
    (trusted,) = open_cuts(tmp_path / "m.jsonl")
    assert len(read_samples(trusted)) == 16000
    monkeypatch.delenv(ALLOW)
    with pytest.raises(CutError, match="type command is not read"):  # nor by what reads, if it comes by another way
        read_samples(trusted)


def test_a_sphere_file_is_read_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lhotse would call sph2pipe with the name of the file in a command line."""
    monkeypatch.chdir(tmp_path)
    name = "a;touch ran;.sph"
    soundfile.write(name, 0.1 * np.sin(np.arange(16000) / 9), 16000, format="NIST", subtype="PCM_16")
    plain = make_cut("a", Path(name), sampling_rate=16000, num_samples=16000, text="x")
    assert len(read_samples(plain)) == 16000
    assert len(read_samples(plain.perturb_volume(0.5))) == 16000  # with a transform, by way of lhotse
    Path(name).write_bytes(b"ajkg" + bytes(1000))  # shorten, which libsndfile does not know
    for one in (plain, plain.perturb_volume(0.5)):
        with pytest.raises(CutError, match="cut a.*: unreadable: .*(?i:format|file)"):
            read_samples(one)
    assert os.listdir() == [name]


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    waiting = make_cut("a", tmp_path / "pipe.wav", sampling_rate=16000, num_samples=16000, text="x")
    soundfile.write(tmp_path / "b.wav", np.full(16000, 0.1), 16000)
    other = make_cut("b", tmp_path / "b.wav", sampling_rate=16000, num_samples=16000, text="x")
    reverberated = deserialize_item(cut(tmp_path, recording__transforms=rir("file", str(tmp_path / "pipe.wav"))))
    noughts = deserialize_item(cut(tmp_path, custom={"shar_places": {"recording": ["/dev/zero", 0, 1 << 29, ".flac"]}}))
    for one in (waiting, other.mix(waiting, snr=5), reverberated, noughts):
        assert [finding.kind for finding in find_bad_cuts([one], read_audio=True)] == ["unreadable"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"supervisions__0__text": 3}, "cut a: supervisions.0.text: Input should be a valid string (got 3)"),
        ({"duration": float("nan")}, "cut a: duration: Input should be a finite number"),
        ({"duration": float("inf")}, "cut a: duration: Input should be a finite number"),
        ({"duration": None}, "cut a: duration: is missing"),
        ({"duration": -1.0}, "cut a: duration: Input should be greater than 0"),
        ({"start": None}, "cut a: start: is missing"),
        ({"start": -2.0}, "cut a: start: Input should be greater than or equal to 0"),
        ({"recording__sampling_rate": 0}, "cut a: recording.sampling_rate: Input should be greater"),
        ({"recording__sampling_rate": "16000"}, "cut a: recording.sampling_rate: Input should be a valid integer"),
        ({"recording__sources": "a.wav"}, "cut a: recording.sources: Input should be a JSON array"),
        ({"recording__sources__0__channels": []}, "cut a: recording.sources.0.channels"),
        ({"id": ["a"]}, "a cut without id: id: Input should be a valid string"),
        ({"id": ""}, "id: must have 1 to 1000 characters"),
        ({"id": "x" * 200_000}, "id: must have 1 to 1000 characters"),
        ({"id": "\x1b[2J"}, "none of them a control character"),
        ({"supervisions": [None]}, "cut a: supervisions.0: Input should be a JSON object"),
        ({"supervisions__0__alignment": {"word": [["a", 0, "x"]]}}, "cut a: supervisions.0.alignment.word"),
        ({"supervisions__0__text": "\ud800"}, "half a character"),
        ({"custom": {"note": "\udc00"}}, "half a character"),
        ({"custom": json.loads("[" * 300 + "]" * 300)}, "nested more than 50 levels deep"),
        ({"custom": {"shar_places": {"recording": ["/etc/passwd", -1, 5, ".wav"]}}}, "custom.shar_places.recording.1"),
        ({"type": 3}, "cut a: not a Lhotse cut (type 3)"),
        ({"supervisions__0__language": "y" * 200_000, "supervisions__0__text": ["y" * 200_000]}, "supervisions.0.text"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    assert says in refusal(tmp_path / "m.jsonl", json.dumps(cut(tmp_path, **changes)))


def test_lines_that_are_hardly_json(tmp_path: Path) -> None:
    lines = ["[" * 10_000 + "]" * 10_000, '{"type": "MonoCut", "id": ' + "9" * 5000 + "}", "null", '"a"']
    complaint = refusal(tmp_path / "m.jsonl", *lines).splitlines()
    for line, says in zip(
        complaint, ["nested more than 50", "cannot be read", "not a Lhotse cut", "not a"], strict=True
    ):
        assert says in line


def test_all_findings_of_all_lines_at_once(tmp_path: Path) -> None:
    one = json.dumps(cut(tmp_path, start=None, supervisions__0__text=1, recording__num_samples="x"))
    two = json.dumps(cut(tmp_path, id="b", duration=True))
    first, second = refusal(tmp_path / "m.jsonl", one, two).splitlines()
    assert all(field in first for field in ("start", "supervisions.0.text", "recording.num_samples"))
    assert "m.jsonl:2: cut b: duration" in second


def test_fields_that_are_null_are_absent(tmp_path: Path) -> None:
    """Other writers say null where lhotse leaves a field out."""
    nulls = {"features": None, "custom": None, "supervisions__0__alignment": None, "supervisions__0__speaker": None}
    (tmp_path / "m.jsonl").write_text(json.dumps(cut(tmp_path, **nulls, recording__channel_ids=None)))
    (read,) = open_cuts(tmp_path / "m.jsonl")
    assert len(read_samples(read)) == 16000


def test_archives_of_garbage(tmp_path: Path) -> None:
    random = np.random.default_rng(0).bytes(100_000)
    whole = gzip.compress(json.dumps(cut(tmp_path)).encode())
    for name, content, says in (
        ("garbage", gzip.compress(random), "cannot read further"),
        ("no-gzip", b"\x1f\x8b" + random, "cannot read further"),
        ("tail", whole + random, "cannot read further"),
        ("bomb", gzip.compress(b"x" * (65 << 20)), "longer than 64 million characters"),
    ):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=says) as error:
            open_cuts(path)
        assert str(path) in str(error.value) and len(str(error.value)) < 1000


def shar(folder: Path, member: bytes) -> Path:
    """A Shar directory whose only recording is described so."""
    folder.mkdir()
    audio = io.BytesIO()
    soundfile.write(audio, 0.1 * np.sin(np.arange(16000) / 9), 16000, format="WAV")
    placeholder = Recording("a", [AudioSource("shar", [0], "")], 16000, 16000, 1.0)
    one = MonoCut("a", 0, 1.0, 0, recording=placeholder)
    CutSet.from_cuts([one]).to_file(folder / "cuts.000000.jsonl.gz")
    with tarfile.open(folder / "recording.000000.tar", "w") as tar:
        for name, content in (("a.wav", audio.getvalue()), ("a.json", member)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder


def test_members_of_a_shar_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = {"id": "a", "sources": [{"type": "shar", "channels": [0], "source": ""}], "sampling_rate": 16000}
    good |= {"num_samples": 16000, "duration": 1.0}
    (read,) = open_cuts(shar(tmp_path / "good", json.dumps(good).encode()), need_text=False)
    assert len(read_samples(read)) == 16000
    bad = {
        "rate": good | {"sampling_rate": None},
        "command": good | {"sources": [{"type": "command", "channels": [0], "source": "touch ran"}]},
        "rir": good | {"transforms": rir("command", "touch ran")},
        "list": [good],
        "features": FEATURES,
    }
    for name, member in bad.items():
        with pytest.raises(UserError, match=r"recording.000000.tar: cannot read it \(a\.json"):
            open_cuts(shar(tmp_path / name, json.dumps(member).encode()), need_text=False)
    for name, content in (("deep", b"[" * 10_000), ("bytes", b"\xff\xfe")):
        with pytest.raises(UserError, match="recording.000000.tar: cannot read it"):
            open_cuts(shar(tmp_path / name, content), need_text=False)
    assert not (tmp_path / "ran").exists()


def test_a_pipe_in_place_of_a_tar_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = shar(tmp_path / "shar", b"{}")
    (folder / "recording.000000.tar").unlink()
    os.mkfifo(folder / "recording.000000.tar")
    with pytest.raises(UserError, match="recording.000000.tar: is not a regular file"):
        open_cuts(folder, need_text=False)


def test_messages_stay_short_and_printable() -> None:
    assert clip("a\nb\x1b[2Jc" + "x" * 500, 20) == "a b\N{REPLACEMENT CHARACTER}[2Jcxxxxxxxxxxxx..."
    assert len(str(UserError("y" * 200_000))) < 5000 and "\x1b" not in str(UserError("\x1b"))
    assert str(UserError("\ud800")).encode()


def test_a_report_cannot_control_the_terminal(tmp_path: Path) -> None:
    changes = {
        "supervisions__0__text": "a\x1b[2Jb",
        "supervisions__0__speaker": "\x1b[31m",
        "supervisions__0__language": "\x07",
    }
    (tmp_path / "m.jsonl").write_text(json.dumps(cut(tmp_path, **changes)))
    paths = [str(tmp_path / "m.jsonl"), "--tokenizer", str(tmp_path / "none.model")]
    missing = asrkit("data", "check", tmp_path / "gone.jsonl", *paths[1:], code=1)
    assert "gone.jsonl: no such manifest" in missing and "none.model: no such" in missing
    assert not {"\x1b", "\x07"} & {*asrkit("data", "check", paths[0], "--json", tmp_path / "report.json")}
    assert json.loads((tmp_path / "report.json").read_text())["manifests"][paths[0]]["cuts"] == 1
