"""data import: TSVs and folders of the user's own recordings."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from asrkit.data.checks import find_bad_cuts
from asrkit.data.corpora.importing import Splitting, import_recordings
from asrkit.data.manifests import open_cuts, text_of
from asrkit.data.names import file_name
from asrkit.errors import UserError
from helpers.commands import asrkit, finish


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


def test_recordings_without_texts(tmp_path):
    for name in ("ann/a", "bob/a"):
        wav(tmp_path / "in" / f"{name}.wav")
    (tmp_path / "in" / "notes.txt").write_text("of nobody")
    made = import_recordings(tmp_path / "in", tmp_path / "out", style="none")
    assert [(cut.id, cut.supervisions[0].text, cut.supervisions[0].custom) for cut in made.cuts["all"]] == [
        ("ann-a", None, None),
        ("bob-a", None, None),
    ]
    table = tsv(tmp_path / "a.tsv", ("path", "lang"), (str(tmp_path / "in" / "ann" / "a.wav"), "en"))
    (cut,) = import_recordings(table, tmp_path / "again", style="none", convert=True).cuts["all"]
    assert (cut.supervisions[0].text, cut.supervisions[0].language) == (None, "en")
    assert "--split hash" in asrkit(
        "data", "import", table, "--text", "none", "--split", "hash", "--out", tmp_path / "h", code=1
    )


@pytest.fixture
def bad_rows(tmp_path):
    wav(tmp_path / "good.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    (tmp_path / "noise.wav").write_bytes(b"not audio at all")
    endless = bytearray(wav(tmp_path / "endless.flac").read_bytes())
    endless[21] &= 0xF0  # the number of samples is 36 bits; 0 where an encoder did not know it
    endless[22:26] = bytes(4)
    (tmp_path / "endless.flac").write_bytes(endless)
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
        ("good.wav", "fine", "a\x07b", "en"),
        ("x" * 300, "fine", "q", "en"),
        ("", "fine", "r", "en"),
        ("endless.flac", "fine", "s", "en"),
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
        10: "id: must have 1 to 1000 characters",
        11: "no file",
        12: "path: is empty",
        13: "has no length in its header",
    }.items():
        assert any(line.startswith(f"{bad_rows}:{number}: ") and said in line for line in error.value.lines), number
    assert "--bad skip" in error.value.lines[-1]
    assert not (tmp_path / "out").exists()


def test_bad_rows_can_be_skipped_and_are_listed(bad_rows, tmp_path):
    printed = asrkit("data", "import", bad_rows, "--out", tmp_path / "out", "--bad", "skip")
    assert "skipped 11 bad rows" in printed
    assert [cut.id for cut in read(tmp_path / "out", "all")] == ["x"]
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 11


def test_a_selection_is_of_all_values_that_are_named(corpus, tmp_path):
    words = ["data", "import", corpus, "--out", tmp_path / "out"]
    asrkit(*words, "--where", "speaker=a", "--where", "speaker=b")
    assert [cut.supervisions[0].speaker for cut in read(tmp_path / "out", "all")] == list("aabb")
    assert "b cannot be in both" in asrkit(*words, "--split-by", "speaker", "--test", "a,b", "--dev", "b", code=1)


def test_a_rate_that_takes_too_much_memory_is_not_converted(tmp_path):
    wav(tmp_path / "a.wav", rate=44101)
    with pytest.raises(UserError, match="44101 samples a second take too much memory to resample"):
        import_recordings(tmp_path, tmp_path / "out", style="none", convert=True)


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
        (["--where", "speaker=nobody"], "no row has nobody in the column speaker; there are a, b, c"),
        (["--split", "column"], "no column 'split'"),
        (["--test", "a"], "--split-by"),
        (["--where", "speaker"], "column=value"),
        (["--bad", "maybe"], "choose from refuse, skip"),
    ):
        finished = finish("data", "import", corpus, "--out", tmp_path / "out", *options)
        assert finished.code != 0 and said in finished.err
    with pytest.raises(UserError, match="no such file"):
        import_recordings(tmp_path / "none.tsv", tmp_path / "out")


def test_no_language_leaves_none(tmp_path):
    wav(tmp_path / "a.wav")
    made = import_recordings(tsv(tmp_path / "a.tsv", ("path", "text"), ("a.wav", "hello")), tmp_path / "out")
    assert made.cuts["all"][0].supervisions[0].language is None


def tone(path, frequency, seconds=0.2):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * 16000)) / 16000), 16000)


def pitch(path):
    samples, rate = soundfile.read(path)
    return round(int(np.abs(np.fft.rfft(samples)).argmax()) * rate / len(samples))


# Ids that differ in a space, in case, in / or :, in the normalization of é, and one longer than a file name may be.
ALIKE = [
    "take 1",
    "take_1",
    "Take_1",
    "take/1",
    "take:1",
    "take-1",
    "caf\u00e9",
    "cafe\u0301",
    "x" * 300,
    "x" * 299,
    "..",
    "con",
]


def test_converted_files_of_ids_that_are_alike(tmp_path):
    """As many files as ids, each with its own sound, under the same names in another import and another order."""
    rows = []
    for number, name in enumerate(ALIKE):
        tone(tmp_path / f"{number}.wav", 200 + 50 * number)
        rows.append((f"{number}.wav", "word", name))
    names = []
    for out, order in (("one", rows), ("two", rows[::-1])):
        source = tsv(tmp_path / f"{out}.tsv", ("path", "text", "id"), *order)
        import_recordings(source, tmp_path / out, convert=True)
        cuts = {cut.id: Path(cut.recording.sources[0].source) for cut in read(tmp_path / out, "all")}
        assert [pitch(cuts[name]) for name in ALIKE] == [200 + 50 * number for number in range(len(ALIKE))]
        assert {path.parent for path in cuts.values()} == {tmp_path / out / "audio"}
        names.append({name: path.name for name, path in cuts.items()})
    assert names[0] == names[1] and len(list((tmp_path / "one" / "audio").iterdir())) == len(ALIKE)
    folded = {unicodedata.normalize("NFKC", name).casefold() for name in names[0].values()}
    assert len(folded) == len(ALIKE) and all(name.isascii() and len(name) < 120 for name in names[0].values())


@given(st.lists(st.text(alphabet="aAbB/:-_ .\u00e90123456789", min_size=1, max_size=6), unique=True))
def test_names_of_files_are_unique_however_a_file_system_folds_them(ids):
    names = [file_name(one, ".flac") for one in ids]
    again = [file_name(name.removesuffix(".flac"), ".flac") for name in names]  # what looks like a name is an id too
    assert len({name.casefold() for name in {*names, *again}}) == len({*ids, *(n.removesuffix(".flac") for n in names)})
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) for name in names)


def test_what_would_mislead_is_refused(tmp_path):
    """Sets of another import that stay, values that no row has, a recording given as a TSV."""
    for name, speaker in zip("abcd", ("ann", "ann", "bob", "eve"), strict=True):
        wav(tmp_path / f"{name}.wav")
        with open(tmp_path / "t.tsv", "a") as file:
            file.write("path\ttext\tspeaker\n" * (name == "a") + f"{name}.wav\tword {name}\t{speaker}\n")
    source, out = tmp_path / "t.tsv", tmp_path / "out"
    typo = Splitting("speaker", frozenset({"anne"}), frozenset({"bob", "robb"}))
    with pytest.raises(UserError) as refused:
        import_recordings(source, out, splitting=typo)
    assert list(refused.value.lines) == [
        "--test: no row has anne in the column speaker; there are ann, bob, eve",
        "--dev: no row has robb in the column speaker; there are ann, bob, eve",
    ]
    with pytest.raises(UserError, match="--where speaker: no row has zoe"):
        import_recordings(source, out, where={"speaker": frozenset({"ann", "zoe"})})
    import_recordings(source, out, splitting=Splitting("speaker", frozenset({"ann"}), frozenset({"bob"})))
    with pytest.raises(UserError, match=r"out: holds dev.jsonl.gz of another import"):
        import_recordings(source, out, splitting=Splitting("speaker", frozenset({"ann"})))
    with pytest.raises(UserError, match="is a recording; give the folder it is in"):
        import_recordings(tmp_path / "a.wav", out)


def test_manifests_of_another_source_stay(corpus, tmp_path):
    """The same source is imported again as often as it changes; another one, or a manifest of whoever, is not replaced."""
    out = tmp_path / "out"
    import_recordings(corpus, out)
    import_recordings(corpus.parent / "." / corpus.name, out)
    wav(tmp_path / "other.wav")
    other = tsv(tmp_path / "other.tsv", ("path", "text"), ("other.wav", "one"))
    with pytest.raises(
        UserError, match=r"out: holds all.jsonl.gz of \S*transcripts.tsv; choose another --out, or remove it"
    ):
        import_recordings(other, out)
    with_split = tsv(tmp_path / "split.tsv", ("path", "text", "split"), ("other.wav", "one", "train"))
    with pytest.raises(UserError, match=r"holds all.jsonl.gz of \S*transcripts.tsv"):
        import_recordings(with_split, out)
    assert len(read(out, "all")) == 6
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))  # the folder and its source together
    import_recordings(moved / "mine" / "transcripts.tsv", moved / "out")
    moved.rename(tmp_path)
    (out / "import.json").unlink()
    with pytest.raises(UserError, match=r"holds all.jsonl.gz of another command"):
        import_recordings(corpus, out)
    (out / "all.jsonl.gz").unlink()
    assert len(import_recordings(other, out).cuts["all"]) == 1


def test_converted_recordings_in_the_folder_are_not_imported_again(tmp_path, monkeypatch):
    wav(tmp_path / "a.wav")
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path / "data", Path("data")):
        made = import_recordings(tmp_path, out, style="none", convert=True)
        assert [cut.id for cuts in made.cuts.values() for cut in cuts] == ["a"]


def test_a_folder_takes_no_other_root(tmp_path):
    wav(tmp_path / "folder" / "a.wav")
    (tmp_path / "folder" / "a.txt").write_text("a word")
    with pytest.raises(UserError, match="--root .*: works with a TSV only"):
        import_recordings(tmp_path / "folder", tmp_path / "out", root=tmp_path)


def test_a_folder_import_names_what_it_cannot_read(tmp_path):
    folder = tmp_path / "folder"
    for name in ("good", "no-text", "not-utf8"):
        wav(folder / f"{name}.wav")
    (folder / "phone.m4a").write_bytes(b"\0\0\0\x1cftypM4A ")
    for name in ("good", "phone", "no-sound", "CAPITALS"):
        (folder / f"{name}.txt").write_text("a word")
    wav(folder / "CAPITALS.WAV".lower()).rename(folder / "CAPITALS.WAV")
    (folder / "not-utf8.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError) as error:
        import_recordings(folder, tmp_path / "out", language="en")
    said = {Path(line.partition(": ")[0]).name: line for line in error.value.lines[:-1]}
    assert {name: line for name, line in said.items()}.keys() == {
        "no-text.wav",
        "not-utf8.wav",
        "phone.m4a",
        "no-sound.txt",
    }
    assert "there is no no-text.txt beside it" in said["no-text.wav"]
    assert "libsndfile does not read .m4a; convert it to WAV or FLAC" in said["phone.m4a"]
    assert "there is no recording beside it" in said["no-sound.txt"]
    assert "must be a UTF-8 text file" in said["not-utf8.wav"]
    assert "4 of 6 rows are bad" in error.value.lines[-1] and not (tmp_path / "out").exists()
    made = import_recordings(folder, tmp_path / "out", language="en", refuse=False)
    assert {cut.id for cut in made.cuts["all"]} == {"good", "CAPITALS"} and len(made.skipped) == 4
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 4


def test_a_folder_of_what_nobody_reads_is_not_empty(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.m4a").write_bytes(b"")
    (tmp_path / "in" / "a.txt").write_text("word")
    with pytest.raises(UserError, match="does not read .m4a"):
        import_recordings(tmp_path / "in", tmp_path / "out", language="en")


def test_a_refused_conversion_leaves_nothing(tmp_path, monkeypatch):
    """Neither for a row that is bad, nor for a recording that breaks off, nor for a full disk."""
    wav(tmp_path / "a.wav")
    whole = wav(tmp_path / "b.flac", seconds=3.0)
    bad = tsv(tmp_path / "bad.tsv", ("path", "text"), ("a.wav", "word"), ("gone.wav", "word"))
    with pytest.raises(UserError, match=r"no file .*gone\.wav"):
        import_recordings(bad, tmp_path / "new" / "out", convert=True)
    assert not (tmp_path / "new" / "out").exists()
    good = tsv(tmp_path / "good.tsv", ("path", "text"), ("a.wav", "word"), ("b.flac", "word"))
    import_recordings(good, tmp_path / "out", convert=True)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    content = bytearray(whole.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
    whole.write_bytes(content[:-3000])
    for out in ("out", "other"):
        with pytest.raises(UserError, match=r"b\.flac: cannot read audio"):
            import_recordings(good, tmp_path / out, convert=True)
    wav(whole, seconds=3.0)
    monkeypatch.setattr(soundfile, "write", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match=r"audio: cannot write .*No space left"):
        import_recordings(good, tmp_path / "other", convert=True)
    assert not (tmp_path / "other").exists()
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_the_length_of_an_mp3_is_what_it_decodes_to(tmp_path):
    """Without the header that says it, libsndfile estimates it from the first frames."""
    noise = np.random.default_rng(0).standard_normal(3 * 44100) * np.repeat([0.001, 0.3, 0.001], 44100)
    soundfile.write(tmp_path / "a.mp3", noise, 44100, bitrate_mode="VARIABLE")
    content = (tmp_path / "a.mp3").read_bytes()
    header = max(content.find(b"Xing"), content.find(b"Info"))
    if header >= 0:
        (tmp_path / "a.mp3").write_bytes(content.replace(content[header : header + 4], bytes(4), 1))
    source = tsv(tmp_path / "a.tsv", ("path", "text"), ("a.mp3", "word"))
    import_recordings(source, tmp_path / "out", language="en")
    (cut,) = read(tmp_path / "out", "all")
    assert cut.recording.num_samples == len(soundfile.read(tmp_path / "a.mp3")[0])
    assert find_bad_cuts([cut], read_audio=True) == []
