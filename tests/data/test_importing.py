"""data import: TSVs and folders of the user's own recordings."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from asrkit.cli import app
from asrkit.data.corpora.importing import Splitting, import_recordings
from asrkit.data.manifests import open_cuts, text_of
from asrkit.errors import UserError


def wav(path, seconds=0.2, rate=16000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).standard_normal((round(seconds * rate), channels)) * 0.1
    soundfile.write(path, noise, rate)
    return path


def tsv(path, header, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join("\t".join(row) for row in (header, *rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path):
    """Six utterances of three speakers, paths relative to the folder above the TSV's."""
    rows = []
    for number in range(6):
        wav(
            tmp_path / "mine" / "audio" / f"{number}.wav",
            rate=(8000, 16000, 22050)[number % 3],
            channels=1 + number % 2,
        )
        rows.append((f"mine/audio/{number}.wav", f"Utterance {number}.", "abc"[number // 2], "en"))
    return tsv(tmp_path / "mine" / "transcripts.tsv", ("path", "text", "speaker", "lang"), *rows)


def read(out, split):
    return list(open_cuts(out / f"{split}.jsonl.gz"))


def test_columns_and_any_rate(corpus, tmp_path):
    made = import_recordings(corpus, tmp_path / "out")
    cuts = read(tmp_path / "out", "all")
    assert made.cuts["all"] == cuts
    assert [text_of(cut) for cut in cuts][:2] == ["utterance zero", "utterance one"]
    assert {cut.sampling_rate for cut in cuts} == {8000, 16000, 22050}
    assert all(abs(cut.duration - 0.2) < 1e-3 for cut in cuts)
    assert cuts[3].supervisions[0].speaker == "b"
    assert cuts[3].supervisions[0].custom == {"raw_text": "Utterance 3."}
    assert cuts[3].load_audio().shape[0] == 1


def test_convert_writes_16_khz_mono(corpus, tmp_path):
    import_recordings(corpus, tmp_path / "out", convert=True)
    for cut in read(tmp_path / "out", "all"):
        info = soundfile.info(cut.recording.sources[0].source)
        assert (info.samplerate, info.channels, info.format) == (16000, 1, "FLAC")
        assert cut.num_samples == info.frames


def test_unseen_speakers_and_where(corpus, tmp_path):
    splitting = Splitting("speaker", frozenset({"a"}), frozenset({"b"}))
    import_recordings(corpus, tmp_path / "out", splitting=splitting)
    held = {s: {c.supervisions[0].speaker for c in read(tmp_path / "out", s)} for s in ("test", "dev", "train")}
    assert held == {"test": {"a"}, "dev": {"b"}, "train": {"c"}}
    made = import_recordings(corpus, tmp_path / "one", where={"speaker": frozenset({"c"})})
    assert (len(made.cuts["all"]), made.not_selected) == (2, 4)


def test_hash_split_keeps_a_sentence_together(tmp_path):
    wav(tmp_path / "a.wav")
    rows = [("a.wav", f"sentence {'x' * (n % 20)}", f"{n}") for n in range(60)]
    source = tsv(tmp_path / "a.tsv", ("path", "text", "id"), *rows)
    made = import_recordings(source, tmp_path / "out", splitting=Splitting("hash"))
    texts = [{text_of(cut) for cut in cuts} for cuts in made.cuts.values()]
    assert len(texts) > 1
    assert sum(map(len, texts)) == len(set().union(*texts)) == 20


def test_folder_of_wav_and_txt(tmp_path):
    for name in ("ann/a", "ann/b", "bob/a"):
        wav(tmp_path / "in" / f"{name}.wav").with_suffix(".txt").write_text(f"said\n {name[-1]} once\n")
    made = import_recordings(tmp_path / "in", tmp_path / "out")
    assert {cut.id: text_of(cut) for cut in made.cuts["all"]} == {
        "ann-a": "said a once",
        "ann-b": "said b once",
        "bob-a": "said a once",
    }


@pytest.fixture
def bad_rows(tmp_path):
    wav(tmp_path / "good.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    (tmp_path / "noise.wav").write_bytes(b"not audio at all")
    return tsv(
        tmp_path / "a.tsv",
        ("path", "text", "id", "lang"),
        ("good.wav", "fine", "x", "en"),
        ("gone.wav", "fine", "y", "en"),
        ("empty.wav", "fine", "z", "en"),
        ("noise.wav", "fine", "w", "en"),
        ("good.wav", " ", "v", "en"),
        ("good.wav", "in 1984", "u", "en"),
        ("good.wav", "press 1", "t", ""),
        ("good.wav", "fine", "x", "en"),
    )


def test_bad_rows_are_all_reported_and_nothing_is_written(bad_rows, tmp_path):
    with pytest.raises(UserError) as error:
        import_recordings(bad_rows, tmp_path / "out")
    for number, said in {
        3: "no file",
        4: "no samples",
        5: "not audio",
        6: "no words",
        7: "several readings",
        8: "language is not given",
        9: "id x is also at",
    }.items():
        assert any(line.startswith(f"{bad_rows}:{number}: ") and said in line for line in error.value.lines), number
    assert "--bad skip" in error.value.lines[-1]
    assert not (tmp_path / "out").exists()


def test_bad_rows_can_be_skipped_and_are_listed(bad_rows, tmp_path):
    result = CliRunner().invoke(app, ["data", "import", str(bad_rows), "--out", str(tmp_path / "out"), "--bad", "skip"])
    assert result.exit_code == 0, result.output
    assert "skipped 7 bad rows" in result.output
    assert [cut.id for cut in read(tmp_path / "out", "all")] == ["x"]
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 7


def test_raw_text(bad_rows, tmp_path):
    result = import_recordings(bad_rows, tmp_path / "out", style="raw", refuse=False)
    assert [text_of(cut) for cut in result.cuts["all"]] == ["fine", "in 1984", "press 1"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no column path and text"),
        ("path\tid\na\tb\n", "no column text"),
        ("path\ttext\n", "empty"),
        ("path\ttext\na.wav\n", ":2: 1 fields, the header has 2"),
    ],
)
def test_broken_tables(content, said, tmp_path):
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(UserError, match=said):
        import_recordings(tmp_path / "a.tsv", tmp_path / "out")


def test_options_that_do_not_fit(corpus, tmp_path):
    for options, said in (
        (["--where", "room=1"], "no column 'room'"),
        (["--where", "speaker=nobody"], "leaves none of 6"),
        (["--split", "column"], "no column 'split'"),
        (["--test", "a"], "--split-by"),
        (["--where", "speaker"], "column=value"),
        (["--bad", "maybe"], "choose from refuse, skip"),
    ):
        result = CliRunner().invoke(app, ["data", "import", str(corpus), "--out", str(tmp_path / "out"), *options])
        assert result.exit_code != 0
        assert said in result.output + str(result.exception)
    with pytest.raises(UserError, match="no such file"):
        import_recordings(tmp_path / "none.tsv", tmp_path / "out")


def test_no_language_leaves_none(tmp_path):
    wav(tmp_path / "a.wav")
    made = import_recordings(tsv(tmp_path / "a.tsv", ("path", "text"), ("a.wav", "hello")), tmp_path / "out")
    assert made.cuts["all"][0].supervisions[0].language is None
