"""Reading and writing manifests; every way a manifest can be broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Fbank, FbankConfig, NumpyFilesWriter

from asrkit.data.cut_audio import cut_features, cut_samples
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import make_cut, open_cuts, text_of, write_cuts
from asrkit.errors import UserError


def cuts(folder, count=3):
    made = []
    for number in range(count):
        audio = folder / f"{number}.wav"
        soundfile.write(audio, np.full(1600, 0.1 * (number + 1)), 16000)
        made.append(
            make_cut(
                f"cut-{number}",
                audio,
                sampling_rate=16000,
                num_samples=1600,
                text=f"text {number}",
                language="en",
                speaker="someone",
                custom={"raw_text": "Text!"},
            )
        )
    return made


def lines(folder):
    return [json.dumps(cut.to_dict()) for cut in cuts(folder)]


def test_what_is_written_is_read(tmp_path):
    write_cuts(tmp_path / "a.jsonl.gz", cuts(tmp_path))
    read = list(open_cuts(tmp_path / "a.jsonl.gz"))
    assert read == cuts(tmp_path)
    assert text_of(read[1]) == "text 1"
    assert read[0].load_audio().shape == (1, 1600)
    assert read[0].supervisions[0].custom == {"raw_text": "Text!"}
    assert list(CutSet.from_file(tmp_path / "a.jsonl.gz")) == read


def test_equal_cuts_give_equal_bytes(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_cuts(tmp_path / name, cuts(tmp_path))
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_plain_jsonl_works_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("\n".join(lines(tmp_path)) + "\n\n")
    monkeypatch.chdir("/")
    assert [cut.load_audio().shape for cut in open_cuts(tmp_path / "a.jsonl")] == [(1, 1600)] * 3


def test_shar_directory(tmp_path):
    (tmp_path / "shar").mkdir()
    CutSet.from_cuts(cuts(tmp_path)).to_shar(tmp_path / "shar", fields={"recording": "wav"}, shard_size=2)
    read = list(open_cuts(tmp_path / "shar"))
    assert [cut.id for cut in read] == ["cut-0", "cut-1", "cut-2"]
    assert not any(cut.is_in_memory for cut in read)
    write_cuts(tmp_path / "again.jsonl.gz", read)
    table, again = CutTable(read), list(open_cuts(tmp_path / "again.jsonl.gz"))
    for index in (2, 0, 1):  # the last of one shard first
        expected = cut_samples(cuts(tmp_path)[index])
        assert expected.abs().max() > 0
        assert all(torch.equal(cut_samples(one[index]), expected) for one in (table, read, again))
    (tmp_path / "shar" / "recording.000001.tar").unlink()
    with pytest.raises(UserError, match=r"cut cut-2: its recording should be in recording.\*.tar and is not"):
        open_cuts(tmp_path / "shar")
    (tmp_path / "shar" / "recording.000001.tar").write_bytes(gzip.compress(b"no tar"))
    with pytest.raises(UserError, match="recording.000001.tar: cannot read it"):
        open_cuts(tmp_path / "shar")


def test_what_is_made_of_a_shar_directory_is_read_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "here" / "shar").mkdir(parents=True)
    CutSet.from_cuts(cuts(tmp_path)).to_shar(tmp_path / "here" / "shar", fields={"recording": "wav"})
    monkeypatch.chdir(tmp_path / "here")
    write_cuts(Path("copy.jsonl.gz"), open_cuts(Path("shar")))
    monkeypatch.chdir("/")
    first, *others = open_cuts(tmp_path / "here" / "copy.jsonl.gz")
    assert torch.equal(cut_samples(first), cut_samples(cuts(tmp_path)[0]))
    joined = first.append(others[0]).pad(duration=0.5)
    assert torch.equal(cut_samples(joined)[1600:3200], cut_samples(cuts(tmp_path)[1]))
    first.custom["shar"] = "a word of the user's own"
    assert torch.equal(cut_samples(first), cut_samples(cuts(tmp_path)[0]))


def test_shar_directory_of_features(tmp_path):
    (tmp_path / "shar").mkdir()
    whole = [
        cut.compute_and_store_features(Fbank(FbankConfig(num_filters=80)), NumpyFilesWriter(tmp_path / "features"))
        for cut in cuts(tmp_path)
    ]
    CutSet.from_cuts(whole).drop_recordings().to_shar(tmp_path / "shar", fields={"features": "numpy"}, shard_size=2)
    for cut, expected in zip(open_cuts(tmp_path / "shar"), whole, strict=True):
        assert torch.equal(cut_features(cut), torch.from_numpy(expected.load_features()))
    with open(tmp_path / "shar" / "features.000001.tar", "r+b") as file:
        last = list(open_cuts(tmp_path / "shar"))[-1]
        file.truncate(700)
    with pytest.raises(
        UserError, match="cut cut-2: unreadable: its stored features: .*features.000001.tar does not hold its features"
    ):
        cut_features(last)


def test_missing_empty_and_other_files(tmp_path):
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "a.tsv").write_text("path\ttext\n")
    (tmp_path / "folder").mkdir()
    for name, said in {
        "none.jsonl.gz": "no such manifest",
        "empty.jsonl.gz": "empty",
        "blank.jsonl": "empty",
        "a.tsv": "not a manifest",
        "folder": "not a Shar directory",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            open_cuts(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_all_broken_lines_are_reported_with_their_numbers(tmp_path):
    whole = lines(tmp_path)
    without = json.loads(whole[0]) | {"id": "without", "supervisions": []}
    silent = json.loads(whole[0]) | {"id": "silent"}
    silent["supervisions"][0]["text"] = " "
    recording = json.loads(whole[0])["recording"]
    broken = [
        whole[0],
        whole[1][:40],
        json.dumps(without),
        json.dumps(silent),
        "3",
        json.dumps(recording),
        json.dumps({"type": "MonoCut", "id": "half"}),
        whole[0],
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(broken))
    with pytest.raises(UserError) as error:
        open_cuts(tmp_path / "a.jsonl")
    for number, said in {
        2: "not JSON",
        3: "cut without: no supervision",
        4: "cut silent: the text is empty",
        5: "not a Lhotse cut",
        6: "a Recording, not a cut",
        7: "cut half: start: is missing; duration: is missing; channel: is missing",
        8: "cut cut-0 is already at",
    }.items():
        line = next(line for line in error.value.lines if line.startswith(f"{tmp_path / 'a.jsonl'}:{number}: "))
        assert said in line
    assert len(error.value.lines) == 7


def test_a_file_of_another_kind_is_not_reported_line_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("nonsense\n" * 1000)
    with pytest.raises(UserError) as error:
        open_cuts(tmp_path / "a.jsonl")
    assert len(error.value.lines) < 30
    assert "980 more" in error.value.lines[-1]


def test_truncated_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write_cuts(path, cuts(tmp_path, 50))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:\d+: cannot read further .*truncated"):
        open_cuts(path)
