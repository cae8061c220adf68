"""data prompts, with a package made here and an apt-get that hands it out; and once with the real archive, on request."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import sys
import tarfile

import numpy as np
import pytest
import soundfile

from asrkit.data.corpora.debian import fetch_packages, members_of
from asrkit.data.corpora.prompts import RECORD, decode_g722, fetch_prompts, parse_listing
from asrkit.data.corpora.record import begin
from asrkit.data.manifests import open_cuts, text_of
from asrkit.errors import UserError
from helpers.commands import asrkit

LISTING = """\ufeff; Core sounds
activated: Activated.
agent-user: Agent login.  Press 1.
beep: [a beep]
digits/3: three
a-very-long-name: said
odd-line: One thing.a-very-long-name: another
quick: far too many words for a tenth of a second of sound
quiet: nothing is heard
unrecorded: not there
h323: H.323
"""


def deb(path, files):
    """A Debian package: an ar archive whose data.tar.xz holds ``files``."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    whole = b"!<arch>\n"
    for name, content in {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        "data.tar.xz": packed.getvalue(),
    }.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        whole += header + content + b"\n" * (len(content) % 2)
    path.write_bytes(whole)


def tone(seconds):
    time = np.arange(round(seconds * 16000)) / 16000
    return (8000 * np.sin(2 * np.pi * 3000 * time)).astype(np.int16)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A folder of packages and, on PATH, an apt-get that copies them to where it is run, noting each call."""
    codec = pytest.importorskip("G722").G722
    packages = tmp_path / "archive"
    packages.mkdir()
    for language in ("en", "fr"):
        deb(
            packages / f"asterisk-core-sounds-{language}_1.0_all.deb",
            {f"./usr/share/doc/x/core-sounds-{language}.txt.gz": gzip.compress(LISTING.encode())},
        )
        sounds = {
            name: tone(2.0) for name in ("activated", "agent-user", "beep", "digits/3", "a-very-long-name", "h323")
        }
        sounds |= {"odd-line": tone(1), "quick": tone(0.1), "quiet": tone(4) * 0, "untold": tone(1)}
        deb(
            packages / f"asterisk-core-sounds-{language}-g722_1.0_all.deb",
            {
                f"./usr/share/asterisk/sounds/{language}_A/{name}.g722": codec(16000, 64000).encode(s)
                for name, s in sounds.items()
            },
        )
    script = tmp_path / "bin" / "apt-get"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, shutil, sys\n"
        f"archive, calls = pathlib.Path({str(packages)!r}), open({str(tmp_path / 'calls')!r}, 'a')\n"
        "print(*sys.argv[1:], file=calls)\n"
        "if 'download' in sys.argv:\n"
        "    for name in sys.argv[sys.argv.index('download') + 1:]:\n"
        "        found = list(archive.glob(name + '_*.deb'))\n"
        "        if not found:\n"
        "            sys.exit('E: Unable to locate package ' + name)\n"
        "        shutil.copy(found[0], '.')\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent))
    return tmp_path


def test_prompts_from_packages(archive):
    out = archive / "out"
    made = fetch_prompts(["fr", "en"], out, say=lambda line: None)
    assert made is not None
    cuts = {
        cut.id: cut
        for split in ("train", "dev", "test")
        if made.cuts[split]
        for cut in open_cuts(out / f"{split}.jsonl.gz")
    }
    assert {cut_id: text_of(cut) for cut_id, cut in cuts.items() if cut_id.startswith("en")} == {
        "en-activated": "activated",
        "en-agent-user": "agent login press one",
        "en-digits_3": "three",
        "en-a-very-long-name": "said",
    }
    assert text_of(cuts["fr-agent-user"]) == "agent login press un"
    cut = cuts["en-digits_3"]
    assert (cut.supervisions[0].language, cut.supervisions[0].speaker) == ("en", "en_A")
    assert cut.supervisions[0].custom == {"raw_text": "three"}
    info = soundfile.info(cut.recording.sources[0].source)
    assert (info.samplerate, info.frames, info.format) == (16000, 32000, "FLAC")
    spectrum = np.abs(np.fft.rfft(cut.load_audio()[0]))
    assert spectrum.argmax() / 2 == pytest.approx(3000, abs=1)  # Hz, of 2 s
    reasons = {d.cut_id: d.reason for d in made.dropped if d.cut_id.startswith("en")}
    assert reasons == {
        "en-beep": "non-speech",
        "en-odd-line": "two prompts on one line",
        "en-quick": "too much text for the recording",
        "en-quiet": "silent",
        "en-unrecorded": "no recording",
        "en-untold": "no text",
        "en-h323": "number with several readings",
    }
    assert len((out / "dropped.tsv").read_text().splitlines()) == 1 + len(made.dropped)


def test_apt_uses_no_folder_of_the_system_and_leaves_none(archive):
    fetch_prompts(["en"], archive / "out", say=lambda line: None)
    calls = (archive / "calls").read_text().splitlines()
    assert [("update" in call, "download" in call) for call in calls] == [(True, False), (False, True)]
    for call in calls:
        assert f"Dir::State::Lists={archive / 'out' / 'packages'}" in call
        assert f"Dir::Cache={archive / 'out' / 'packages'}" in call
    names = {path.name for path in (archive / "out" / "packages").iterdir()}
    assert names == {"asterisk-core-sounds-en_1.0_all.deb", "asterisk-core-sounds-en-g722_1.0_all.deb", "SHA256SUMS"}


def test_a_second_run_does_nothing_and_another_language_reuses_packages(archive):
    cache = archive / "cache"
    command = ["data", "prompts", "--out", str(archive / "out"), "--cache", str(cache), "--lang", "en"]
    assert "dropped 7: " in asrkit(*command)
    before = {path: path.stat().st_mtime_ns for path in (archive / "out").rglob("*")}
    assert "already complete" in asrkit(*command)
    assert before == {path: path.stat().st_mtime_ns for path in (archive / "out").rglob("*")}
    asrkit(*command, "--lang", "fr")
    assert (archive / "out" / "train-fr.jsonl.gz").exists()
    downloads = [line for line in (archive / "calls").read_text().splitlines() if "download" in line]
    assert len(downloads) == 2
    assert "asterisk-core-sounds-fr" in downloads[1] and "sounds-en" not in downloads[1]


def test_a_manifest_of_another_command_is_not_replaced(archive):
    """What an interrupted run has left is made anew."""
    (archive / "out").mkdir()
    (archive / "out" / "train.jsonl.gz").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"train.jsonl.gz: already exists, and this command has not made it"):
        fetch_prompts(["en"], archive / "out", say=lambda line: None)
    assert (archive / "out" / "train.jsonl.gz").read_bytes() == b"mine"
    begin(archive / "out" / RECORD, archive / "out" / "train.jsonl.gz")
    (archive / "out" / "train.jsonl.gz").write_bytes(b"half")  # killed before it was recorded
    assert fetch_prompts(["en"], archive / "out", say=lambda line: None) is not None
    assert fetch_prompts(["en"], archive / "out", say=lambda line: None) is None


def test_without_apt_get(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"takes apt-get, and this machine has none.*asrkit data import"):
        fetch_packages(["asterisk-core-sounds-en"], tmp_path / "cache")
    with pytest.raises(UserError, match=r"--lang de: there are prompts in en, es, fr, it, ru"):
        fetch_prompts(["en", "de"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_package_is_not_taken_by_its_name(archive, monkeypatch):
    """What apt-get did not check, or what has changed since, is downloaded again; without apt-get it is refused."""
    cache = archive / "cache"
    names = ["asterisk-core-sounds-en", "asterisk-core-sounds-fr"]
    english, french = fetch_packages(names, cache, say=lambda line: None)
    assert {line.split()[1] for line in (cache / "SHA256SUMS").read_text().splitlines()} == {english.name, french.name}
    true = english.read_bytes()
    french.unlink()
    newer = cache / "asterisk-core-sounds-en_9.9_all.deb"  # the newest by its name
    newer.write_bytes(b"evil")
    english.write_bytes(b"evil")
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(archive / "nothing"))
    with pytest.raises(UserError, match="-en: nothing says that the files in .* are Debian's own") as error:
        fetch_packages(names, cache)
    assert "-fr: downloading takes apt-get" in error.value.lines[1]
    monkeypatch.setenv("PATH", path)
    assert fetch_packages(names, cache, say=lambda line: None) == [english, french] and english.read_bytes() == true
    calls = (archive / "calls").read_text()
    assert fetch_packages(names, cache) == [english, french] and (archive / "calls").read_text() == calls
    monkeypatch.setenv("PATH", str(archive / "nothing"))
    with open(cache / "SHA256SUMS", "a") as file:  # the user's own word for it
        file.write(f"{hashlib.sha256(b'evil').hexdigest()} *{newer.name}\n")
    assert fetch_packages(names, cache) == [newer, french]


def test_a_failed_download_keeps_nothing(archive):
    with pytest.raises(UserError, match="Unable to locate package asterisk-core-sounds-es"):
        fetch_prompts(["es"], archive / "out", say=lambda line: None)
    assert not list((archive / "out").rglob("*.*"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "no data"])
def test_damaged_packages(archive, damage):
    package = archive / "archive" / "asterisk-core-sounds-en_1.0_all.deb"
    content = package.read_bytes()
    package.write_bytes({"truncated": content[:-100], "empty": b"", "no data": content[:80]}[damage])
    with pytest.raises(UserError, match="not a whole Debian package"):
        list(members_of(package))


def test_listing():
    text = "; note\nname: Text: with a colon\n no-colon\nru: ru: twice\nempty:\n"
    assert parse_listing(text) == {"name": "Text: with a colon", "ru": "twice", "empty": ""}


def test_decoder_gives_two_samples_a_byte():
    codec = pytest.importorskip("G722").G722(16000, 64000)
    decoded = decode_g722(codec.encode(tone(1.0)))
    assert decoded.dtype == np.int16
    assert len(decoded) == 16000
    reference = tone(1.0).astype(float)
    lag = np.argmax(np.correlate(decoded[1000:3000].astype(float), reference[1000:2900], "valid"))
    error = decoded[1000 + lag : 2900 + lag] - reference[1000:2900]
    assert np.sqrt((error**2).mean()) < 0.05 * np.sqrt((reference**2).mean())


@pytest.mark.skipif(os.environ.get("ASRKIT_TEST_NETWORK") != "1", reason="downloads 11 MB; set ASRKIT_TEST_NETWORK=1")
def test_debians_archive(tmp_path):
    made = fetch_prompts(["en"], tmp_path / "out")
    assert made is not None
    cuts = [cut for split in made.cuts.values() for cut in split]
    assert len(cuts) > 500
    assert sum(cut.duration for cut in cuts) > 20 * 60
