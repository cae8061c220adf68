"""evaluate, transcribe and info on a run directory of a real, untrained model and generated audio."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asrkit.cli import main
from asrkit.config import to_dict
from asrkit.data.batches import evaluation_batches
from asrkit.data.manifests import make_cut, open_cuts, write_cuts
from asrkit.data.tokenizer import Tokenizer, train_tokenizer
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.evaluation import measure_wer
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.search import METHODS, Method, decode
from asrkit.decoding.windows import read_pieces
from asrkit.decoding.words import timed_words
from asrkit.errors import UserError
from asrkit.models import AsrModel, ModelSpec, load_model
from asrkit.models.spec import EncoderSpec, PredictorSpec
from asrkit.run_dir import CONFIG, LINEAGE, MODEL, TOKENIZER, WEIGHTS, open_run, sha256_of, write_yaml
from asrkit.stages.evaluate import evaluate
from asrkit.stages.info import describe_run
from asrkit.stages.transcribe import transcribe
from asrkit.training.checkpoint import save_weights

TEXTS = ["the cat sat on the mat", "le chat est sur la table", "one two three", "quatre cinq six"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose model knows nothing but emits tokens that depend on what it hears."""
    path = tmp_path_factory.mktemp("exp") / "run"
    tokenizer = train_tokenizer(TEXTS, "char", 100, path / TOKENIZER)
    encoder = EncoderSpec(dim=16, num_layers=1, feedforward_dim=16, kernel_size=3, subsampling_channels=(2, 2))
    spec = ModelSpec(vocab_size=tokenizer.vocab_size, encoder=encoder, predictor=PredictorSpec(dim=8), joiner_dim=16)
    torch.manual_seed(7)
    model = AsrModel(spec)
    with torch.no_grad():
        for layer in (model.joiner.out, model.ctc_head):
            layer.weight.mul_(20.0)
        model.encoder.normalise.mean.fill_(-8.0)
        model.encoder.normalise.std.fill_(4.0)
    write_yaml(path / CONFIG, {"stage": "train-backbone"})
    write_yaml(path / MODEL, to_dict(spec))
    save_weights(path / WEIGHTS, model)
    entry = {
        "stage": "train-backbone",
        "command": "asrkit train-backbone --out run",
        "created": "2024-01-01T00:00:00Z",
        "seconds": 1.5,
        "metrics": {"wer": 0.5},
    }
    digests = {"weights_sha256": WEIGHTS, "model_spec_sha256": MODEL, "tokenizer_sha256": TOKENIZER}
    write_yaml(path / LINEAGE, [entry | {key: sha256_of(path / name) for key, name in digests.items()}])
    return path


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


def noise(random: np.random.Generator, num_samples: int) -> np.ndarray:
    """Noise whose loudness wanders, so that frames differ."""
    loudness = np.repeat(random.uniform(0.001, 0.5, num_samples // 400 + 1), 400)[:num_samples]
    return (loudness * random.uniform(-1, 1, num_samples)).astype(np.float32)


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, standard output, standard error."""
    monkeypatch.setattr("sys.argv", ["asrkit", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_does_not_change_the_result(run: Path, manifest: Path, method: Method) -> None:
    recogniser = TorchAcousticModel(load_model(open_run(run)))
    (together,) = evaluation_batches(open_cuts(manifest), 100.0)
    hypotheses = decode(recogniser, together.features, together.feature_lens, method)
    assert any(hypothesis.tokens for hypothesis in hypotheses)
    for batch in evaluation_batches(open_cuts(manifest), 0.1):
        (alone,) = decode(recogniser, batch.features, batch.feature_lens, method)
        same = hypotheses[together.cut_ids.index(batch.cut_ids[0])]
        assert (alone.tokens, alone.frames) == (same.tokens, same.frames)
        assert alone.score == pytest.approx(same.score, rel=1e-3, abs=1e-3)


def test_evaluate_writes_what_it_returns(run: Path, manifest: Path, tmp_path: Path) -> None:
    evaluations = evaluate(run, manifest, methods=METHODS, out=tmp_path / "results", max_duration=3.0)
    assert [evaluation.directory.name for evaluation in evaluations] == [
        "test-backbone-full-greedy",
        "test-backbone-full-beam",
        "test-backbone-full-ctc",
    ]
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
        alignments = (evaluation.directory / "alignments.txt").read_text()
        assert all(f"cut-{number} [" in alignments for number in range(5))


def test_measure_wer_agrees_with_evaluate(run: Path, manifest: Path, tmp_path: Path) -> None:
    (evaluation,) = evaluate(run, manifest, out=tmp_path)
    model, tokenizer = TorchAcousticModel(load_model(open_run(run))), Tokenizer.load(run / TOKENIZER)
    words, chars, texts = measure_wer(model, evaluation_batches(open_cuts(manifest), 1.0), tokenizer)
    assert words.rate == evaluation.result["total"]["wer"]
    assert chars.rate == evaluation.result["total"]["cer"]
    assert sorted(texts) == sorted((u.cut_id, u.ref, u.hyp) for u in evaluation.utterances)


def test_evaluate_prints_a_table(
    run: Path,
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("evaluate", "--from", run, "--manifest", manifest, "--out", tmp_path, "--method", "all")
    code, out, _ = command(monkeypatch, capsys, *words)
    assert code == 0
    for text in ("greedy", "beam", "ctc", "en", "fr", "WER %", "RTF", "test-backbone-full-ctc"):
        assert text in out
    code, out, _ = command(monkeypatch, capsys, *words[:-1], "beam", "--json", "--beam", "2")
    assert code == 0 and json.loads(out)["beam"] == 2


def test_evaluate_reports_every_mistake_before_work(
    run: Path,
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    weights = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    broken = tmp_path / "broken.jsonl"
    cuts = list(open_cuts(manifest))
    lines = [json.dumps(cut.to_dict()) for cut in cuts]
    broken.write_text("\n".join([lines[0], lines[1][:40], lines[2]]))
    code, out, err = command(monkeypatch, capsys, "evaluate", "--from", damaged, "--manifest", broken)
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


def test_a_silent_cut_counts_and_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    code, out, err = command(monkeypatch, capsys, *words)
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


def test_transcribe_survives_files_it_cannot_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "tiny.wav", np.full(5, 0.1), 16000)
    soundfile.write(tmp_path / "good.wav", noise(np.random.default_rng(2), 16000), 16000)
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    names = ["empty.wav", "tiny.wav", "missing.wav", "text.wav", "nan.wav", "good.wav"]
    words = ("transcribe", "--from", run, *(tmp_path / name for name in names))
    code, out, err = command(monkeypatch, capsys, *words)
    assert code == 1 and "Traceback" not in err
    assert [line.partition(": ")[0] for line in out.splitlines()] == [
        str(tmp_path / name) for name in ("tiny.wav", "good.wav")
    ]
    assert len(err.splitlines()) == 4
    for name, reason in {
        "empty": "empty",
        "missing": "no such file",
        "text": "cannot read",
        "nan": "numbers",
    }.items():
        assert any(f"{name}.wav" in line and reason in line for line in err.splitlines())
    code, out, _ = command(monkeypatch, capsys, *words, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [Path(row["path"]).name for row in rows] == names
    assert ["error" in row for row in rows] == [True, False, True, True, True, False]


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


def test_timestamps_are_one_line_a_word(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.wav", noise(np.random.default_rng(1), 16000), 16000)
    code, out, _ = command(monkeypatch, capsys, "transcribe", "--from", run, tmp_path / "a.wav", "--timestamps")
    heading, *lines = out.splitlines()
    assert code == 0 and heading == f"{tmp_path / 'a.wav'}:" and lines
    starts = [float(line.split(maxsplit=1)[0]) for line in lines]
    assert starts == sorted(starts) and starts[0] >= 0 and starts[-1] < 1.0


def test_info_counts_every_parameter(
    run: Path,
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
    code, out, _ = command(monkeypatch, capsys, "info", copy)
    assert code == 0
    for text in ("train-backbone", "wer 0.5", "backbone", "joiner", "kaldi-fbank", "greedy", "backbone"):
        assert text in out
    code, out, _ = command(monkeypatch, capsys, "info", copy, "--json")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(description))


@pytest.mark.parametrize(
    "words", [("info",), ("transcribe", "a.wav", "--from"), ("evaluate", "--manifest", "x", "--from")]
)
def test_a_damaged_run_is_refused_in_one_line(
    run: Path, tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(run, tmp_path / "damaged")
    weights = bytearray((tmp_path / "damaged" / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (tmp_path / "damaged" / WEIGHTS).write_bytes(weights)
    code, _, err = command(monkeypatch, capsys, *words, tmp_path / "damaged")
    lines = err.splitlines()
    assert code == 1 and all(line.startswith("error: ") for line in lines)
    assert sum("digest" in line for line in lines) == 1
    code, _, err = command(monkeypatch, capsys, *words, tmp_path / "nowhere")
    assert code == 1 and "no such run directory" in err


def test_a_place_that_cannot_be_written(run: Path, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="choose another --out"):
        evaluate(run, manifest, out=tmp_path / "file")


def test_a_device_that_is_not_there(run: Path, manifest: Path) -> None:
    with pytest.raises(UserError, match="--device warp"):
        evaluate(run, manifest, device="warp")
