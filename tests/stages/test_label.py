"""label, with the real Whisper tiny.en and a natural voice where their packages are installed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from asrkit.data.cut_table import with_supervision
from asrkit.data.manifests import is_labeled, make_cut, open_cuts, text_of, write_cuts
from asrkit.data.parallel import ALONE
from asrkit.decoding.external.interface import TextRecognizer, Transcription
from asrkit.decoding.external.own import OwnRecognizer
from asrkit.decoding.external.pauses import speech_pieces
from asrkit.decoding.external.whisper import WhisperRecognizer
from asrkit.frames import SAMPLE_RATE
from asrkit.methods import recognizing
from asrkit.methods.labeling import Filters, open_progress
from asrkit.stages import label as label_stage
from helpers.commands import asrkit
from helpers.outside import SENTENCES, WHISPER, speech, whisper_model
from helpers.small_runs import write_run

PAUSE = torch.zeros(2 * SAMPLE_RATE)


def recording(folder: Path, name: str, samples: Tensor, text: str | None = None, language: str | None = "en") -> Any:
    soundfile.write(folder / f"{name}.wav", samples.numpy(), SAMPLE_RATE)
    return make_cut(
        name, folder / f"{name}.wav", sampling_rate=SAMPLE_RATE, num_samples=len(samples), text=text, language=language
    )


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One utterance, a long recording of three with pauses, and noise without speech; none has a text."""
    whisper_model()
    folder = tmp_path_factory.mktemp("raw")
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.002, 4 * SAMPLE_RATE).astype(np.float32))
    cuts = [
        recording(folder, "short", speech(0)),
        recording(folder, "long", torch.cat([speech(1), PAUSE, speech(0), PAUSE, speech(0)])),
        recording(folder, "noise", noise, language=None),
    ]
    write_cuts(folder / "raw.jsonl.gz", cuts)
    return folder / "raw.jsonl.gz"


def dropped(out: Path) -> list[dict[str, str]]:
    with open(out.with_name(out.name.replace(".jsonl.gz", ".dropped.tsv")), encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.slow
def test_recordings_get_texts(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at pauses, normalized, with confidences; resumed after a kill where it was; filtered again without recognizing."""
    out = tmp_path / "labeled.jsonl.gz"
    command = [
        "label",
        "--with",
        WHISPER,
        "--manifest",
        raw,
        "--out",
        out,
        "--max-seconds",
        6,
        "--max-duration",
        6,
        "--threads",
        1,
    ]
    shown = asrkit(*command)
    assert "labeled 4 utterances" in shown and "1 no speech" in shown
    cuts = list(open_cuts(out))
    assert [cut.id for cut in cuts] == ["short", "long-0000", "long-0001", "long-0002"]
    assert [text_of(cut) for cut in cuts][0::2] == [SENTENCES[0], SENTENCES[0]] and text_of(cuts[1]).endswith(
        "in your mailbox"
    )
    assert all(is_labeled(cut) and 0.6 <= cut.supervisions[0].custom["label_confidence"] <= 1 for cut in cuts)
    begins = [cut.start for cut in cuts[1:]]
    expected = [0, len(speech(1)) / SAMPLE_RATE + 2, (len(speech(1)) + len(speech(0))) / SAMPLE_RATE + 4]
    assert begins == pytest.approx(expected, abs=0.4)
    assert [(row["id"], row["reason"]) for row in dropped(out)] == [("noise", "no speech")]

    # Killed before the last two batches were on disk.
    texts = tmp_path / "labeled.texts.jsonl"
    whole, first = texts.read_bytes(), out.read_bytes()
    lines = whole.splitlines(keepends=True)
    recognized = [number for number, line in enumerate(lines) if b'"begin"' in line]
    assert len(recognized) == 4
    texts.write_bytes(b"".join(lines[: recognized[2]]) + lines[recognized[2]][:20])
    counted: list[int] = []
    transcribe = WhisperRecognizer.transcribe

    def count(self: WhisperRecognizer, waves: Sequence[Tensor], languages: Sequence[str]) -> Any:
        counted.append(len(waves))
        return transcribe(self, waves, languages)

    monkeypatch.setattr(WhisperRecognizer, "transcribe", count)
    asrkit(*command)
    assert sum(counted) == 2 and out.read_bytes() == first

    said = asrkit(*command, "--min-confidence", 1, code=1)
    assert sum(counted) == 2 and "every utterance was left out (4 confidence, 1 no speech)" in said
    said = asrkit(*command[:-6], "--max-seconds", 5, code=1)
    assert "has the texts of another labeling (max_seconds: 6.0 -> 5.0)" in said

    two = tmp_path / "two.jsonl.gz"
    asrkit(*command[:5], "--out", two, "--max-seconds", 6, "--max-duration", 6, "--device", "cpu", "--jobs", 2)
    assert two.read_bytes() == first
    assert (tmp_path / "two.texts.jsonl").read_bytes() == whole


class _Interrupted:
    """A recognizer that is stopped in its second batch."""

    def __init__(self) -> None:
        self.batches = 0

    def transcribe(self, waves: Sequence[Tensor], languages: Sequence[str]) -> list[Transcription]:
        self.batches += 1
        if self.batches == 2:
            raise KeyboardInterrupt
        return [Transcription("a", None, "en") for _ in waves]


def test_the_first_batches_of_a_long_recording_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stretches = [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0)]
    monkeypatch.setattr(recognizing, "speech_pieces", lambda samples, longest: stretches)
    cut, stopped = recording(tmp_path, "long", torch.zeros(6 * SAMPLE_RATE)), _Interrupted()
    recognize = recognizing.PieceRecognizer(("any",), "cpu", 1, "en", 2.0, 2.0)
    recognize.use([cast(TextRecognizer, stopped)])
    with pytest.raises(KeyboardInterrupt), open_progress(tmp_path / "texts.jsonl", {}) as done:
        label_stage._recognize(recognize, [cut], 2.0, done, ALONE)
    with open_progress(tmp_path / "texts.jsonl", {}) as done:
        assert done.planned == {"long": stretches} and list(done.texts) == [("long", 0.0)]
        label_stage._recognize(recognize, [cut], 2.0, done, ALONE)
    assert stopped.batches == 4 and len(done.texts) == 3


class _Fixed:
    """A recognizer that always hears the same."""

    def transcribe(self, waves: Sequence[Tensor], languages: Sequence[str]) -> list[Transcription]:
        return [Transcription("please hold", None, "en") for _ in waves]


@pytest.mark.parametrize(("stretch", "name"), [((0.0, 5.0), "long-0000"), ((0.0, 12.0), "long")])
def test_the_only_stretch_of_a_long_recording_is_cut_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: tuple[float, float], name: str
) -> None:
    """Also where it begins with the recording."""
    monkeypatch.setattr(recognizing, "speech_pieces", lambda samples, longest: [stretch])
    cut = recording(tmp_path, "long", torch.zeros(12 * SAMPLE_RATE))
    recognize = recognizing.PieceRecognizer(("any",), "cpu", 1, "en", 6.0, 20.0)
    recognize.use([cast(TextRecognizer, _Fixed())])
    with open_progress(tmp_path / "texts.jsonl", {}) as done:
        label_stage._recognize(recognize, [with_supervision(cut)], 20.0, done, ALONE)
        (made,) = label_stage._labeled(cut, done, ["any"], Filters(), label_stage.Labeled(), [])
    assert (made.id, made.duration, text_of(made)) == (name, stretch[1], "please hold")


def test_a_padded_cut_without_a_supervision(tmp_path: Path) -> None:
    cut = recording(tmp_path, "short", torch.zeros(SAMPLE_RATE))
    write_cuts(tmp_path / "padded.jsonl.gz", [cut.pad(duration=3.0)])
    (padded,) = open_cuts(tmp_path / "padded.jsonl.gz", need_text=False)
    assert text_of(padded) == "" and padded.duration == 3.0


def test_an_export_for_one_language_takes_no_other() -> None:
    recognizer = OwnRecognizer.__new__(OwnRecognizer)
    recognizer.name, recognizer._recognizer = "exp/onnx", cast(Any, SimpleNamespace(languages=[], language="fr"))
    assert recognizer.check_language("en") == "exp/onnx was exported for fr, not for en"
    assert recognizer.check_language("fr") is None and recognizer.check_language("") is None


@pytest.mark.slow
def test_two_recognizers_must_agree(raw: Path, tmp_path: Path) -> None:
    """An untrained model agrees in nothing; the labels against texts that are there."""
    run, out = write_run(tmp_path / "run"), tmp_path / "labeled.jsonl.gz"
    command = ["label", "--with", WHISPER, "--with", run, "--manifest", raw, "--max-seconds", 6]
    said = asrkit(*command, "--out", out, code=1)
    assert "every utterance was left out (4 disagreement, 1 no speech)" in said
    asrkit(*command, "--out", out, "--max-disagreement", 100)
    assert all(cut.supervisions[0].custom["label_disagreement"] > 0.5 for cut in open_cuts(out))

    cuts = [
        recording(tmp_path, "right", speech(0), SENTENCES[0]),
        recording(tmp_path, "wrong", speech(0), "please drop my call"),
    ]
    write_cuts(tmp_path / "texts.jsonl.gz", cuts)
    words = [
        "label",
        "--with",
        WHISPER,
        "--manifest",
        tmp_path / "texts.jsonl.gz",
        "--out",
        tmp_path / "again.jsonl.gz",
    ]
    assert "every cut has a text already; --replace-texts labels them again" in asrkit(*words, code=1)
    shown = asrkit(*words, "--replace-texts")
    # Four words are the same in both references: seven words, and four of seven hypotheses' words are wrong in the other.
    assert "labels against the given texts" in shown and "100.00" in shown
    (row,) = [line.split() for line in shown.splitlines() if line.strip().startswith("0.5 ")]
    assert row[2] == "11" and float(row[3]) == pytest.approx(100 * sum(map(int, row[4:])) / 11, abs=0.01)
    assert [text_of(cut) for cut in open_cuts(tmp_path / "again.jsonl.gz")] == [SENTENCES[0]] * 2


def test_mistakes(raw: Path, tmp_path: Path) -> None:
    words = ["label", "--manifest", raw, "--out", tmp_path / "x.jsonl.gz"]
    assert "must end in .jsonl.gz" in asrkit(
        "label", "--with", WHISPER, "--manifest", raw, "--out", tmp_path / "x.json", code=1
    )
    before = raw.read_bytes()
    assert "is a file that this command reads" in asrkit(
        "label", "--with", WHISPER, "--manifest", raw, "--out", raw, code=1
    )
    assert raw.read_bytes() == before
    assert "3 recognizers" in asrkit(*words, "--with", WHISPER, "--with", "a", "--with", "b", code=1)
    assert "knows English only, not fr" in asrkit(*words, "--with", WHISPER, "--language", "fr", code=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_pieces_cover_the_speech_and_are_short(raw: Path) -> None:
    long = torch.cat([speech(0), speech(1), PAUSE, *[speech(1)] * 4])
    pieces = speech_pieces(long, 5.0)
    assert len(pieces) >= 4 and all(0 < end - begin <= 5.0 for begin, end in pieces)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(pieces))
    assert sum(end - begin for begin, end in pieces) > 0.8 * (len(long) - len(PAUSE)) / SAMPLE_RATE
    assert len(speech_pieces(long, 30.0)) == 2 and speech_pieces(torch.zeros(SAMPLE_RATE), 5.0) == []
