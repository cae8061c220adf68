"""evaluate, transcribe and info on a run directory of a real, untrained model and generated audio."""

from __future__ import annotations

import errno
import io
import json
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from lhotse.supervision import AlignmentItem
from rich.console import Console

from asrkit.data.batch import evaluation_batches
from asrkit.data.features import can_resample
from asrkit.data.manifests import digest_of, make_cut, open_cuts, write_cuts
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.choice import UNTRAINED_STREAM, ContextChoice
from asrkit.decoding.evaluation import measure_wer
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.latency import emission_latencies, emission_ms, summarize_latencies, word_ends
from asrkit.decoding.recognizer import load_recognizer
from asrkit.decoding.search import METHODS, Method, decode
from asrkit.decoding.transducer import greedy_search
from asrkit.decoding.windows import read_pieces
from asrkit.decoding.words import timed_words, word_frames
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.models import load_model
from asrkit.nn.context import FULL, Context
from asrkit.reporting.results import read_utterances
from asrkit.reporting.tables import evaluation_table
from asrkit.run_dir import TOKENIZER, WEIGHTS, open_run
from asrkit.stages.evaluate import Evaluation, evaluate
from asrkit.stages.info import describe_run
from asrkit.stages.summary import summarize_runs
from asrkit.stages.transcribe import transcribe
from helpers.commands import asrkit, finish
from helpers.small_runs import SUBMODELS, TEXTS, noise, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone alone."""
    return write_run(tmp_path_factory.mktemp("exp") / "run")


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with sub-models and several variants, ``near`` the one trained last."""
    return write_run(tmp_path_factory.mktemp("exp") / "points", SUBMODELS, layers=2)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five cuts of different rates and lengths, not in order of either."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(3)
    cuts = []
    rows = [
        (1.1, 16000, "en"),
        (0.6, 8000, "fr"),
        (2.0, 16000, "en"),
        (0.08, 16000, "fr"),
        (1.1, 22050, "en"),
    ]
    for number, (seconds, rate, language) in enumerate(rows):
        samples = noise(random, round(seconds * rate))
        path = folder / f"{number}.wav"
        soundfile.write(path, samples, rate)
        text = TEXTS[number % 4]
        cuts.append(
            make_cut(
                f"cut-{number}",
                path,
                sampling_rate=rate,
                num_samples=len(samples),
                text=text,
                language=language,
            )
        )
    write_cuts(folder / "test.jsonl.gz", cuts)
    return folder / "test.jsonl.gz"


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_does_not_change_the_result(run: Path, manifest: Path, method: Method) -> None:
    recognizer = TorchAcousticModel(load_model(open_run(run)))
    (together,) = evaluation_batches(open_cuts(manifest), 100.0)
    hypotheses = decode(recognizer, together.features, together.feature_lens, method)
    assert any(hypothesis.tokens for hypothesis in hypotheses)
    for batch in evaluation_batches(open_cuts(manifest), 0.1):
        (alone,) = decode(recognizer, batch.features, batch.feature_lens, method)
        same = hypotheses[together.cut_ids.index(batch.cut_ids[0])]
        assert (alone.tokens, alone.frames) == (same.tokens, same.frames)
        assert alone.score == pytest.approx(same.score, rel=1e-3, abs=1e-3)


def test_evaluate_writes_what_it_returns(run: Path, manifest: Path, tmp_path: Path) -> None:
    evaluations = evaluate(run, manifest, methods=METHODS, out=tmp_path / "results", max_duration=3.0)
    digest = sha256_of(manifest)[:8]
    assert [evaluation.directory.name for evaluation in evaluations] == [
        f"test-{digest}-backbone-full-greedy",
        f"test-{digest}-backbone-full-beam4",
        f"test-{digest}-backbone-full-ctc",
    ]
    (evaluations[0].directory / "hypotheses.txt").write_text("of other weights")
    evaluations = evaluate(run, manifest, methods=METHODS, out=tmp_path / "results", max_duration=3.0)
    for evaluation in evaluations:
        assert sorted(file.name for file in evaluation.directory.iterdir()) == [
            "alignments.txt",
            "confusions.txt",
            "result.json",
            "utterances.jsonl",
        ]
        result = json.loads((evaluation.directory / "result.json").read_text())
        total, languages = result["total"], result["languages"]
        assert list(languages) == ["en", "fr"]
        for key in ("utterances", "words", "substitutions", "insertions", "deletions", "characters"):
            assert total[key] == sum(row[key] for row in languages.values())
        assert total["words"] == 6 + 6 + 3 + 3 + 6
        errors = total["substitutions"] + total["insertions"] + total["deletions"]
        assert total["wer"] == errors / total["words"]
        assert result["weights_sha256"] == sha256_of(run / WEIGHTS)
        assert result["audio_seconds"] == pytest.approx(1.1 + 0.6 + 2.0 + 0.08 + 1.1, abs=0.01)
        assert result["real_time_factor"] > 0 and result["threads"] >= 1 and result["warnings"] == []
        lines = (evaluation.directory / "utterances.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == [f"cut-{number}" for number in range(5)]
        assert sum(json.loads(line)["errors"] for line in lines) == errors
        for row in map(json.loads, lines):
            assert "".join(row["pieces"]).replace("▁", " ").strip() == row["hyp"] and row["late_ms"] == []
            assert len(row["frames"]) == len(row["pieces"]) and row["frames"] == sorted(row["frames"])
        assert any(json.loads(line)["frames"] for line in lines)
        alignments = (evaluation.directory / "alignments.txt").read_text()
        assert all(f"cut-{number} [" in alignments for number in range(5))


def test_measure_wer_agrees_with_evaluate(run: Path, manifest: Path, tmp_path: Path) -> None:
    (evaluation,) = evaluate(run, manifest, out=tmp_path)
    model, tokenizer = TorchAcousticModel(load_model(open_run(run))), Tokenizer.load(run / TOKENIZER)
    words, chars, texts = measure_wer(model, evaluation_batches(open_cuts(manifest), 1.0), tokenizer)
    assert words.rate == evaluation.result["total"]["wer"]
    assert chars.rate == evaluation.result["total"]["cer"]
    assert sorted(texts) == sorted((u.cut_id, u.ref, u.hyp) for u in evaluation.utterances)


def test_an_evaluation_that_cannot_be_written_leaves_the_earlier_one(
    run: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (earlier,) = evaluate(run, manifest, methods=["greedy"], out=tmp_path)
    before = {path.name: path.read_bytes() for path in earlier.directory.iterdir()}
    write = Path.write_text

    def full(path: Path, *given: Any, **options: Any) -> int:
        if path.name.endswith("-utterances.jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *given, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="free some space"):
        evaluate(run, manifest, methods=["greedy"], out=tmp_path)
    assert {path.name: path.read_bytes() for path in earlier.directory.iterdir()} == before


def test_evaluate_prints_a_table(
    run: Path,
    manifest: Path,
    tmp_path: Path,
) -> None:
    words = ("evaluate", "--from", run, "--manifest", manifest, "--out", tmp_path, "--method", "all")
    code, out, err = finish(*words, "--method", "ctc-beam")
    assert code == 0, err
    for text in ("greedy", "beam", "ctc", "ctc-beam4", "en", "fr", "WER %", "RTF", "-backbone-full-ctc"):
        assert text in out
    code, out, _ = finish(*words[:-1], "beam", "--json", "--beam", "2")
    assert code == 0 and json.loads(out)["beam"] == 2


def test_evaluate_reports_every_mistake_before_work(
    run: Path,
    manifest: Path,
    tmp_path: Path,
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    weights = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    broken = tmp_path / "broken.jsonl"
    cuts = list(open_cuts(manifest))
    lines = [json.dumps(cut.to_dict()) for cut in cuts]
    broken.write_text("\n".join([lines[0], lines[1][:40], lines[2]]))
    code, out, err = finish("evaluate", "--from", damaged, "--manifest", broken)
    assert code == 1 and out == "" and "Traceback" not in err
    assert f"error: {damaged / WEIGHTS}: digest" in err and f"error: {broken}:2:" in err
    assert not (damaged / "evaluation").exists()


@pytest.mark.parametrize("fault", ["missing", "truncated", "not a number"])
def test_evaluate_names_bad_cuts(run: Path, manifest: Path, tmp_path: Path, fault: str) -> None:
    audio = tmp_path / "bad.wav"
    samples = noise(np.random.default_rng(0), 16000)
    if fault == "not a number":
        samples[100] = np.nan
    soundfile.write(audio, samples, 16000, subtype="FLOAT")
    if fault == "missing":
        audio.unlink()
    if fault == "truncated":
        audio.write_bytes(audio.read_bytes()[:20000])
    bad = make_cut("broken-one", audio, sampling_rate=16000, num_samples=16000, text="one")
    write_cuts(tmp_path / "some.jsonl.gz", [*open_cuts(manifest), bad])
    with pytest.raises(UserError, match="cut broken-one"):
        evaluate(run, tmp_path / "some.jsonl.gz", out=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_silent_cut_counts_and_is_told(run: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
    cut = make_cut("quiet", tmp_path / "silence.wav", sampling_rate=16000, num_samples=16000, text="one two")
    write_cuts(tmp_path / "silent.jsonl.gz", [cut])
    words = (
        "evaluate",
        "--from",
        run,
        "--manifest",
        tmp_path / "silent.jsonl.gz",
        "--out",
        tmp_path,
        "--json",
    )
    code, out, err = finish(*words)
    assert code == 0 and json.loads(out)["total"]["words"] == 2
    assert "warning" in err and "cut quiet: silent" in err


def test_transcribe_takes_any_format(run: Path, tmp_path: Path) -> None:
    """The same sound in several formats gives the same text, and each file is answered in order."""
    random = np.random.default_rng(1)
    samples = noise(random, 16000)
    paths = [tmp_path / "a.wav", tmp_path / "b.flac", tmp_path / "stereo.wav"]
    soundfile.write(paths[0], samples, 16000, subtype="FLOAT")
    soundfile.write(paths[1], samples, 16000, subtype="PCM_24")
    soundfile.write(paths[2], np.stack([samples, samples], axis=1), 16000, subtype="FLOAT")
    for rate in (8000, 44100, 48000):
        paths.append(tmp_path / f"{rate}.ogg")
        soundfile.write(paths[-1], noise(random, rate), rate)
    found = list(transcribe(run, paths))
    assert [transcript.path for transcript in found] == paths
    assert found[0].text and found[0].text == found[1].text == found[2].text
    assert all(transcript.error is None for transcript in found)
    assert all(transcript.seconds == pytest.approx(1.0, abs=0.01) for transcript in found)
    assert [word.text for word in found[0].words] == found[0].text.split()


def test_a_transcript_beside_its_recording_is_not_replaced(run: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(np.random.default_rng(1), 16000), 16000)
    (tmp_path / "a.txt").write_text("what was said")
    words = ["transcribe", "--from", run, tmp_path / "a.wav", "--out"]
    said = asrkit(*words, tmp_path, code=1)
    assert "a.txt: exists beside its recording" in said and (tmp_path / "a.txt").read_text() == "what was said"
    for _ in range(2):
        asrkit(*words, tmp_path / "texts")
        asrkit(*words, tmp_path, "--format", "srt")
    assert (tmp_path / "texts" / "a.txt").is_file() and (tmp_path / "a.srt").is_file()


def test_transcribe_survives_files_it_cannot_read(run: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "tiny.wav", np.full(5, 0.1), 16000)
    soundfile.write(tmp_path / "good.wav", noise(np.random.default_rng(2), 16000), 16000)
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    (tmp_path / "folder.wav").mkdir()
    names = ["empty.wav", "tiny.wav", "missing.wav", "text.wav", "nan.wav", "good.wav", "folder.wav"]
    words = ("transcribe", "--from", run, *(tmp_path / name for name in names))
    code, out, err = finish(*words)
    assert code == 1 and "Traceback" not in err
    assert [line.partition(": ")[0] for line in out.splitlines()] == [
        str(tmp_path / name) for name in ("tiny.wav", "good.wav")
    ]
    reasons = {
        "empty": "empty",
        "missing": "no such file",
        "text": "convert it to wav or flac",
        "nan": "numbers",
        "folder": "is a directory; give the files in it",
    }
    code, _, streamed = finish(*words, "--stream", "--fast")
    assert code == 1
    for said in (err, streamed):
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == len(reasons)
        for name, reason in reasons.items():
            assert any(f"{name}.wav: " in line and reason in line for line in errors)
    code, out, _ = finish(*words, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [Path(row["path"]).name for row in rows] == names
    assert ["error" in row for row in rows] == [True, False, True, True, True, False, True]


def test_a_rate_that_takes_gigabytes_to_resample_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "odd.wav", np.zeros(8820), 44101)
    with pytest.raises(UserError, match="has 44101 samples a second, .*; convert it to 16 kHz"):
        list(read_pieces(tmp_path / "odd.wav"))
    for rate in (8000, 11025, 22050, 22255, 44100, 48000, 96000):
        assert can_resample(rate)


def test_a_beam_without_a_search_that_has_one_is_refused(tmp_path: Path) -> None:
    for words in (["evaluate", "--manifest", tmp_path / "none.jsonl.gz"], ["transcribe", tmp_path / "none.wav"]):
        said = asrkit(words[0], "--from", tmp_path / "run", *words[1:], "--beam", 8, code=1)
        assert "--beam: has no effect with --method greedy; add --method beam" in said


def test_a_long_file_is_parted_at_its_pauses(tmp_path: Path) -> None:
    rate, random = 8000, np.random.default_rng(4)
    stretches = []
    for seconds in (13, 21, 9, 14, 19, 4):  # with a second of silence after each
        stretches += [random.uniform(-0.5, 0.5, seconds * rate), np.zeros(rate)]
    samples = np.concatenate(stretches)
    soundfile.write(tmp_path / "long.wav", samples, rate, subtype="FLOAT")
    pieces = list(read_pieces(tmp_path / "long.wav"))
    assert sum(piece.seconds for piece in pieces) == pytest.approx(len(samples) / rate)
    assert all(len(piece.samples) <= 30 * 16000 for piece in pieces)
    assert all(len(piece.samples) == round(piece.seconds * 16000) for piece in pieces)
    for before, piece in pairwise(pieces):
        assert piece.start == pytest.approx(before.start + before.seconds)
        middle = round(piece.start * rate)
        assert not samples[middle - rate // 10 : middle + rate // 10].any(), f"cut in speech at {piece.start} s"


def test_a_file_without_pauses_is_parted_too(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", noise(np.random.default_rng(5), 70 * 8000), 8000)
    pieces = list(read_pieces(tmp_path / "long.wav"))
    assert len(pieces) >= 3 and sum(piece.seconds for piece in pieces) == pytest.approx(70)
    assert all(10 <= piece.seconds <= 30 for piece in pieces[:-1])


def test_words_begin_at_their_first_sound(run: Path) -> None:
    tokenizer = Tokenizer.load(run / TOKENIZER)
    tokens = tokenizer.encode("one two")
    assert tokenizer.id_to_piece(tokens[0]) == "\u2581"
    frames = [0, 5, 6, 7, 8, 20, 21, 22]
    words = timed_words(Hypothesis(tokens, frames, 0.0), tokenizer, offset=10.0)
    assert [(word.text, word.start) for word in words] == [("one", 10.2), ("two", 10.8)]


def test_timestamps_are_one_line_a_word(run: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(np.random.default_rng(1), 16000), 16000)
    code, out, _ = finish("transcribe", "--from", run, tmp_path / "a.wav", "--timestamps")
    heading, *lines = out.splitlines()
    assert code == 0 and heading == f"{tmp_path / 'a.wav'}:" and lines
    starts = [float(line.split(maxsplit=1)[0]) for line in lines]
    assert starts == sorted(starts) and starts[0] >= 0 and starts[-1] < 1.0


def test_info_counts_every_parameter(
    run: Path,
    manifest: Path,
    tmp_path: Path,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    evaluate(copy, manifest)
    description = describe_run(copy)
    model = load_model(open_run(copy))
    assert description["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    assert sum(part["bytes"] for part in description["parts"]) == 4 * description["parameters"]
    assert [row["method"] for row in description["evaluations"]] == ["greedy"]
    assert description["evaluations"][0]["current"]
    code, out, _ = finish("info", copy)
    assert code == 0
    for text in ("train-backbone", "wer 50.00 %", "backbone", "joiner", "kaldi-fbank", "greedy", "backbone"):
        assert text in out
    code, out, _ = finish("info", copy, "--json")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(description))


@pytest.mark.parametrize(
    "words", [("info",), ("transcribe", "a.wav", "--from"), ("evaluate", "--manifest", "x", "--from")]
)
def test_a_damaged_run_is_refused_in_one_line(
    run: Path, tmp_path: Path, words: tuple[str, ...],
) -> None:  # fmt: skip
    shutil.copytree(run, tmp_path / "damaged")
    weights = bytearray((tmp_path / "damaged" / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (tmp_path / "damaged" / WEIGHTS).write_bytes(weights)
    code, _, err = finish(*words, tmp_path / "damaged")
    lines = err.splitlines()
    assert code == 1 and all(line.startswith("error: ") for line in lines)
    assert sum("digest" in line for line in lines) == 1
    code, _, err = finish(*words, tmp_path / "nowhere")
    assert code == 1 and "no such run directory" in err


def test_a_place_that_cannot_be_written(run: Path, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="choose another --out"):
        evaluate(run, manifest, out=tmp_path / "file")


def test_a_stopped_evaluation_says_so_and_leaves_nothing(
    run: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr("asrkit.stages.evaluate.decode_cuts", lambda *work: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores the signal
    done = finish("evaluate", "--from", run, "--manifest", manifest, "--out", there / "new" / "out")
    signal.signal(signal.SIGINT, before)
    assert done.code == 130 and done.err.splitlines()[-1] == "stopped; run the same command again to finish"
    assert list(tmp_path.rglob("*")) == [there]


def test_a_device_that_is_not_there(run: Path, manifest: Path) -> None:
    with pytest.raises(UserError, match="--device warp"):
        evaluate(run, manifest, device="warp")


def texts_of(evaluation: Evaluation) -> list[str]:
    return [utterance.hyp for utterance in evaluation.utterances]


def test_a_variant_is_decoded_in_its_first_trained_context(points: Path, manifest: Path, tmp_path: Path) -> None:
    found = {
        name: evaluate(points, manifest, variant=name, out=tmp_path)[0]
        for name in (None, "backbone", "near", "wide", "all")
    }
    names = {name: evaluation.directory.name for name, evaluation in found.items()}
    digest = sha256_of(manifest)[:8]
    assert names == {
        None: f"test-{digest}-near-chunk4-left8-greedy",
        "backbone": f"test-{digest}-backbone-full-greedy",
        "near": f"test-{digest}-near-chunk4-left8-greedy",
        "wide": f"test-{digest}-wide-full-greedy",
        "all": f"test-{digest}-all-full-greedy",
    }
    results = {name: evaluation.result for name, evaluation in found.items()}
    assert [results[name]["context"] for name in ("near", "wide")] == ["chunk=4,left=8", "full"]
    assert [results[name]["latency_ms"] for name in ("near", "wide")] == [197.5, None]
    assert all(result["variant"] == (name or "near") for name, result in results.items())
    assert all(result["warnings"] == [] and result["emission_latency"] is None for result in results.values())
    # The sub-models are at work: no two variants hear the same.
    assert len({tuple(texts_of(found[name])) for name in ("backbone", "near", "wide", "all")}) == 4


@pytest.mark.parametrize("variant", ["backbone", "near", "wide", "all"])
def test_a_streaming_context_is_decoded_as_the_masked_pass(
    points: Path, manifest: Path, tmp_path: Path, variant: str
) -> None:
    """evaluate goes chunk by chunk; the model in one pass says the same."""
    context = Context(4, 8)
    choice = ContextChoice(chunk=4, left=8)
    (evaluation,) = evaluate(points, manifest, variant=variant, context=choice, out=tmp_path)
    model, tokenizer = load_model(open_run(points)), Tokenizer.load(points / TOKENIZER)
    heard: dict[str, str] = {}
    for batch in evaluation_batches(open_cuts(manifest), 100.0):
        encoder_out, lens = model.encode(batch.features, batch.feature_lens, variant, context)
        found = greedy_search(
            TorchAcousticModel(model),
            model.joiner.project_encoder(encoder_out),
            lens,
            special_ids=tokenizer.special_ids,
        )
        heard |= {cut: tokenizer.decode(h.tokens) for cut, h in zip(batch.cut_ids, found, strict=True)}
    assert {utterance.cut_id: utterance.hyp for utterance in evaluation.utterances} == heard
    assert any(heard.values())


TRAINED = [FULL, Context(8, 32), Context(16, 64), Context(16, 128)]


@pytest.mark.parametrize(
    ("choice", "attends", "chosen"),
    [
        (ContextChoice(), True, FULL),
        (ContextChoice(streaming=True), True, Context(8, 32)),
        (ContextChoice(full=True), True, FULL),
        (ContextChoice(chunk=16), True, Context(16, 64)),
        (ContextChoice(chunk=16, left=3), True, Context(16, 3)),
        (ContextChoice(chunk=4), False, Context(4, 0)),
        (ContextChoice(chunk=8), False, Context(8, 32)),
    ],
)
def test_the_context_meant(choice: ContextChoice, attends: bool, chosen: Context) -> None:
    assert choice.among(TRAINED, attends, "variant x") == chosen


def test_a_stream_never_trained_for_has_a_context_all_the_same() -> None:
    assert ContextChoice(streaming=True).among([FULL], True, "x") == UNTRAINED_STREAM


def test_left_is_asked_for_where_it_cannot_be_known() -> None:
    with pytest.raises(UserError, match=r"near was trained in full; chunk=8,left=32; .*chunks of 4; .*--left"):
        ContextChoice(chunk=4).among(TRAINED, True, "near")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variant", "far"], ["no variant far; there are backbone, near, wide, all"]),
        (["--left", "8"], ["--left 8 is the number of frames before a chunk; give --chunk too"]),
        (["--mode", "full", "--chunk", "4"], ["--mode full and --chunk 4 contradict each other"]),
        (["--chunk", "5"], ["chunk=4,left=8; chunk=8,left=16, not in chunks of 5", "--left"]),
        (["--variant", "far", "--left", "8"], ["no variant far", "give --chunk too"]),
    ],
)
def test_a_context_that_cannot_be_meant_is_refused(
    points: Path, manifest: Path, tmp_path: Path, words: list[str], said: list[str],
) -> None:  # fmt: skip
    code, out, err = finish("evaluate", "--from", points, "--manifest", manifest, "--out", tmp_path / "out", *words)
    assert code == 1 and out == "" and not (tmp_path / "out").exists()
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert all(text in err for text in said)


def test_a_context_never_trained_is_decoded_and_told(points: Path, manifest: Path, tmp_path: Path) -> None:
    words = ("evaluate", "--from", points, "--manifest", manifest, "--out", tmp_path, "--json")
    code, out, err = finish(*words, "--mode", "full")
    (warning,) = json.loads(out)["warnings"]
    assert code == 0 and "near was never trained in context full" in warning and f"warning: {warning}" in err
    # Without attention the frames before the chunk do not matter, so 0 and 64 are one context.
    code, out, err = finish(*words, "--variant", "backbone", "--chunk", "4", "--left", "64")
    assert code == 0 and json.loads(out)["warnings"] == [] and err == ""


def test_words_are_known_when_their_chunk_is() -> None:
    assert [emission_ms(frame, Context(4, 0)) for frame in (0, 3, 4, 11)] == [197.5, 197.5, 357.5, 517.5]
    # What the table calls algorithmic latency: from the beginning of a chunk to when it is known.
    assert emission_ms(0, Context(16, 64)) == Context(16, 64).latency_ms


def test_latency_counts_right_words_alone(run: Path) -> None:
    tokenizer = Tokenizer.load(run / TOKENIZER)
    tokens = tokenizer.encode("one two six")
    frames = list(range(0, 2 * len(tokens), 2))
    one, two, six = word_frames(Hypothesis(tokens, frames, 0.0), tokenizer)
    assert (one.first, one.last, six.last) == (2, 6, frames[-1]) and two.first > one.last
    ends = [("ONE", 0.2), ("three", 0.3), ("quatre", 0.5), ("six", 0.55)]
    latencies = emission_latencies(Hypothesis(tokens, frames, 0.0), tokenizer, ends, Context(4, 8))
    assert latencies == pytest.approx([emission_ms(6, Context(4, 8)) - 200, emission_ms(six.last, Context(4, 8)) - 550])
    assert summarize_latencies(latencies)["words"] == 2
    assert summarize_latencies([]) == {"mean_ms": None, "p90_ms": None, "words": 0}
    assert summarize_latencies(list(range(0, 101))) == {"mean_ms": 50.0, "p90_ms": 90.0, "words": 101}


def test_alignments_are_counted_from_the_recordings_beginning(manifest: Path) -> None:
    cut = next(iter(open_cuts(manifest)))
    assert word_ends(cut) is None
    items = [AlignmentItem("two", 0.7, 0.2), AlignmentItem("", 0.6, 0.1), AlignmentItem("one", 0.5, 0.1)]
    cut.supervisions[0].alignment = {"word": items}
    later = cut.truncate(offset=0.4)
    assert [(word, round(end, 6)) for word, end in word_ends(later) or []] == [("one", 0.2), ("two", 0.5)]


def test_emission_latency_of_a_manifest_with_alignments(points: Path, manifest: Path, tmp_path: Path) -> None:
    """The model's own words as the reference, aligned to end 300 ms before the model knows it, 290 ms, ..."""
    context = Context(4, 8)
    recognizer, cuts = load_recognizer(points), list(open_cuts(manifest))
    aligned, expected = [], []
    for batch in evaluation_batches(cuts, 0.1):
        (cut,) = [cut for cut in cuts if cut.id == batch.cut_ids[0]]
        (hypothesis,) = decode(
            recognizer.model, batch.features, batch.feature_lens, special_ids=recognizer.tokenizer.special_ids
        )
        words = word_frames(hypothesis, recognizer.tokenizer)
        if words:
            cut.supervisions[0].text = " ".join(word.text for word in words)
            late = [300.0 - 10 * number for number in range(len(words))]
            ends = [(emission_ms(word.last, context) - ms) / 1000 for word, ms in zip(words, late, strict=True)]
            expected += late
            items = [AlignmentItem(word.text, end - 0.01, 0.01) for word, end in zip(words, ends, strict=True)]
            cut.supervisions[0].alignment = {"word": items}
        aligned.append(cut)
    write_cuts(tmp_path / "aligned.jsonl.gz", aligned)
    (streamed,) = evaluate(points, tmp_path / "aligned.jsonl.gz", out=tmp_path)
    assert streamed.result["total"]["wer"] == pytest.approx(1 - len(expected) / streamed.result["total"]["words"])
    assert len(expected) >= 5
    assert streamed.result["emission_latency"] == pytest.approx(summarize_latencies(expected), abs=0.1)
    assert "late ms" in table_text([streamed.result])
    stored = [late for utterance in read_utterances(streamed.directory) for late in utterance.late_ms]
    assert sorted(stored) == pytest.approx(sorted(expected), abs=0.1)
    (whole,) = evaluate(points, tmp_path / "aligned.jsonl.gz", out=tmp_path, context=ContextChoice(full=True))
    assert whole.result["emission_latency"] is None and "late ms" not in table_text([whole.result])


def table_text(results: list[dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(evaluation_table(results))
    return cast(io.StringIO, console.file).getvalue()


def test_info_tells_variants_apart(points: Path, manifest: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(points, copy)
    results = [evaluation.result for evaluation in evaluate(copy, manifest, methods=METHODS)]
    (wide,) = evaluate(copy, manifest, variant="wide", context=ContextChoice(chunk=4, left=8))
    description = describe_run(copy)
    model = load_model(open_run(copy))

    def size(*prefixes: str) -> int:
        return sum(t.numel() for name, t in model.state_dict().items() if name.startswith(prefixes))

    rows = {row["variant"]: row for row in description["variants"]}
    submodels = {row["submodel"]: row for row in description["submodels"]}
    assert submodels["near"]["parameters"] == size("encoder.submodels.near.") > 0
    decoder = size("encoder.", "predictor.", "joiner.", "ctc_head.") - size("encoder.submodels.")
    assert rows["backbone"]["parameters"] == decoder
    assert rows["all"]["parameters"] == decoder + size("encoder.submodels.near.", "encoder.submodels.thin.")
    assert (submodels["near"]["layers"], submodels["wide"]["position"], submodels["thin"]["heads"]) == (
        [0, 1],
        "parallel",
        None,
    )
    assert [name for name, row in rows.items() if row["default"]] == ["near"]
    assert rows["near"]["contexts"][1] == {"context": "chunk=8,left=16", "latency_ms": 357.5}
    (best,) = rows["near"]["best"]
    assert best["wer"] == min(result["total"]["wer"] for result in results) and best["context"] == "chunk=4,left=8"
    assert rows["wide"]["best"][0]["wer"] == wide.result["total"]["wer"] and rows["backbone"]["best"] == []
    code, out, _ = finish("info", copy)
    assert code == 0
    for text in (
        "near (default)",
        "near, thin",
        "chunk=8,left=16",
        "357.5 ms",
        "8 / 2 heads",
        "0-1",
        "adapter",
        f"test {sha256_of(manifest)[:8]} (chunk=4,left=8, ",
    ):
        assert text in out, text


def test_summary_has_a_row_for_each_variant_and_context(points: Path, manifest: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(points, copy)
    evaluate(copy, manifest)
    evaluate(copy, manifest, variant="backbone")
    evaluate(copy, manifest, variant="backbone", context=ContextChoice(chunk=4))
    found = {(row["variant"], row["context"]) for row in summarize_runs([copy])}
    assert found == {("near", "chunk=4,left=8"), ("backbone", "full"), ("backbone", "chunk=4,left=0")}


def test_evaluations_of_manifests_of_one_name_stand_side_by_side(run: Path, manifest: Path, tmp_path: Path) -> None:
    """So do those of beams of several sizes; the same again replaces only itself."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    cuts = list(open_cuts(manifest))
    for language, part in (("en", cuts[:2]), ("fr", cuts[2:])):
        write_cuts(tmp_path / language / "test.jsonl.gz", part)
        evaluate(copy, tmp_path / language / "test.jsonl.gz")
    for beam in (2, 3, 3):
        evaluate(copy, tmp_path / "fr" / "test.jsonl.gz", methods=["beam"], beam=beam)
    digests = {language: sha256_of(tmp_path / language / "test.jsonl.gz") for language in ("en", "fr")}
    rows = summarize_runs([copy])
    assert {(row["manifest"], row["manifest_sha256"], row["words"], row["method"], row["beam"]) for row in rows} == {
        ("test", digests["en"], 12, "greedy", None),
        ("test", digests["fr"], 12, "greedy", None),
        ("test", digests["fr"], 12, "beam", 2),
        ("test", digests["fr"], 12, "beam", 3),
    }
    assert len(rows) == 4 and len(describe_run(copy)["variants"][0]["best"]) == 2
    for words in (("summary", copy), ("info", copy)):
        code, out, _ = finish(*words)
        assert code == 0 and all(text in out for text in (digests["en"][:8], digests["fr"][:8], "beam 2", "beam 3"))


def test_a_shar_directory_is_known_by_its_sound_too(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    CutSet.from_cuts(open_cuts(manifest)).to_shar(tmp_path / "one", fields={"recording": "wav"})
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    assert len(digest_of(tmp_path / "one")) == 64 and digest_of(tmp_path / "one") == digest_of(tmp_path / "same")
    (tar,) = (tmp_path / "same").glob("recording.*.tar")
    sound = bytearray(tar.read_bytes())
    sound[len(sound) // 2] ^= 1
    tar.write_bytes(sound)
    assert digest_of(tmp_path / "one") != digest_of(tmp_path / "same")


def test_nobody_speaks(run: Path, manifest: Path, tmp_path: Path) -> None:
    """What is recognized in a recording with an empty reference is inserted; the rate stays over the set's words."""
    cuts = list(open_cuts(manifest))
    spoken = evaluate(run, manifest, out=tmp_path / "spoken")[0].result["total"]
    for cut, text in zip(cuts, ["", " ", None], strict=False):
        cut.supervisions[0].text = text
    cuts[3].supervisions = []
    write_cuts(tmp_path / "some.jsonl.gz", cuts)
    (evaluation,) = evaluate(run, tmp_path / "some.jsonl.gz", out=tmp_path)
    inserted = {u.cut_id: len(u.hyp.split()) for u in evaluation.utterances[:4]}
    total, last = evaluation.result["total"], evaluation.utterances[4]
    assert sum(inserted.values()) > 3 and total["utterances"] == spoken["utterances"] == 5
    assert total["insertions"] == sum(inserted.values()) + last.words.insertions
    assert (
        total["words"] == 6 and total["wer"] == (total["insertions"] + total["substitutions"] + total["deletions"]) / 6
    )
    (warning,) = evaluation.result["warnings"]
    assert "4 cut(s) have an empty reference, the first is cut-0" in warning

    write_cuts(tmp_path / "none.jsonl.gz", cuts[:4])
    words = ("evaluate", "--from", run, "--manifest", tmp_path / "none.jsonl.gz", "--out", tmp_path / "none")
    code, out, err = finish(*words)
    assert code == 0 and "empty reference" in err and "inf" not in out and "nan" not in out
    (file,) = (tmp_path / "none").glob("*/result.json")
    total = json.loads(file.read_text())["total"]
    assert total["wer"] is None and total["wer_95"] is None and total["words"] == 0
    assert total["insertions"] == sum(inserted.values())
    assert f"no words (0 sub, {total['insertions']} ins, 0 del)" in (file.parent / "alignments.txt").read_text()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", "[" * 20000, '{"method": "ctc"}', "\xff", ("total", 3), ("total", None), ("wer", "a"),
     ("languages", []), ("languages", {"en": {}}), ("words", -1), ("words", 1.5), ("manifest", 7), ("real_time_factor", "fast"),
     ("warnings", "none"), ("emission_latency", {"mean_ms": 1}), ("surprise", 1)],
    ids=lambda content: str(content)[:20],
)  # fmt: skip
def test_a_damaged_result_is_one_line(run: Path, manifest: Path, tmp_path: Path, content: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (evaluation,) = evaluate(copy, manifest)
    file = evaluation.directory / "result.json"
    if isinstance(content, tuple):
        key, value = content
        result = json.loads(file.read_text())
        (result["total"] if key in ("wer", "words") else result)[key] = value
        content = json.dumps(result)
    file.write_bytes(content.encode("latin-1"))
    for read in (describe_run, lambda path: summarize_runs([path])):
        with pytest.raises(UserError) as caught:
            read(copy)
        (line,) = caught.value.lines
        assert line.startswith(f"{file}: is not a result") and "evaluate again" in line


def test_every_damaged_result_is_named(run: Path, manifest: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for evaluation in evaluate(copy, manifest, methods=["greedy", "ctc"]):
        (evaluation.directory / "result.json").write_text("{")
    with pytest.raises(UserError) as caught:
        summarize_runs([copy])
    assert len(caught.value.lines) == 2
