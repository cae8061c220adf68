"""External recognizers: real Whisper tiny.en and real exports in sherpa-onnx, where their packages are installed."""

from __future__ import annotations

import inspect
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asrkit.data.manifests import make_cut, write_cuts
from asrkit.decoding.external import sherpa
from asrkit.decoding.external.interface import spoken_words
from asrkit.decoding.external.opening import open_text_recognizer
from asrkit.errors import UserError
from asrkit.frames import SAMPLE_RATE, count_encoder_frames, count_features
from asrkit.stages.evaluate_external import evaluate_external
from helpers.commands import asrkit
from helpers.outside import WHISPER, speech, whisper_model
from helpers.small_runs import SUBMODELS, noise, write_run

TAIL = 8  # tokens that a model may emit in the silence after a stream


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transducer with a CTC model beside it, for whole recordings and for streams, exported; and a manifest."""
    pytest.importorskip("onnx")
    pytest.importorskip("sherpa_onnx")
    folder = tmp_path_factory.mktemp("exports")
    for name, spec in (("full", {}), ("stream", SUBMODELS)):
        write_run(folder / "run" / name, spec, layers=2)
        asrkit("export", "--from", folder / "run" / name, "--out", folder / name, *(["--streaming"] if spec else []))
    random, cuts = np.random.default_rng(3), []
    for number in range(4):
        samples = noise(random, 16000 + 4000 * number)
        soundfile.write(folder / f"{number}.wav", samples, 16000)
        cuts.append(
            make_cut(
                f"c{number}",
                folder / f"{number}.wav",
                sampling_rate=16000,
                num_samples=len(samples),
                text="the cat",
                language="en",
            )
        )
    write_cuts(folder / "test.jsonl.gz", cuts)
    return folder


def hypotheses(folder: Path) -> dict[str, str]:
    (file,) = folder.glob("*/utterances.jsonl")
    return {row["id"]: row["hyp"] for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "beam", "ctc"])
@pytest.mark.parametrize("name", ["full", "stream"])
def test_sherpa_recognizes_what_asrkit_does(exports: Path, tmp_path: Path, name: str, method: str) -> None:
    shared = ["--manifest", exports / "test.jsonl.gz", "--method", method]
    asrkit("evaluate", "--from", exports / name, "--out", tmp_path / "own", *shared)
    printed = asrkit("evaluate", "--from", f"sherpa-onnx:{exports / name}", "--out", tmp_path / "sherpa", *shared)
    assert f"sherpa-onnx:{exports / name}" in printed.replace("\n", "")
    own = {cut_id: spoken_words(text, "en")[0] for cut_id, text in hypotheses(tmp_path / "own").items()}
    by_sherpa = hypotheses(tmp_path / "sherpa")
    if name == "full":
        assert by_sherpa == own
    else:  # sherpa-onnx needs silence after a stream, and an untrained model has something to say to that
        assert all(
            by_sherpa[cut_id].startswith(text) and len(by_sherpa[cut_id]) <= len(text) + TAIL
            for cut_id, text in own.items()
        )
    assert all(own.values()) and (len(set(own.values())) > 1 or method == "ctc")
    (file,) = (tmp_path / "sherpa").glob("*/result.json")
    result = json.loads(file.read_text())
    assert (result["external"], result["method"], result["context"]) == (
        True,
        method,
        "streaming" if name == "stream" else "full",
    )
    assert 0 < result["model_bytes"] < sum(path.stat().st_size for path in (exports / name).iterdir())
    both = [next((tmp_path / who).glob("*")) for who in ("own", "sherpa")]
    assert "2 systems" not in asrkit("compare", *both)


@pytest.mark.slow
def test_models_of_one_name_have_results_of_their_own(exports: Path, tmp_path: Path) -> None:
    for name in ("full", "stream"):
        shutil.copytree(exports / name, tmp_path / name / "model")
        spec, out = f"sherpa-onnx:{tmp_path / name / 'model'}", tmp_path / "out"
        evaluate_external(spec, exports / "test.jsonl.gz", methods=["ctc"], out=out)
    assert len(list(out.glob("test-*-sherpa-onnx-model-*-ctc/result.json"))) == 2


@pytest.mark.slow
def test_a_batch_does_not_change_a_text(exports: Path) -> None:
    waves = [torch.from_numpy(soundfile.read(exports / f"{n}.wav", dtype="float32")[0]) for n in range(4)]
    with open_text_recognizer(f"sherpa-onnx:{exports / 'full'}", method="greedy") as recognizer:
        together = recognizer.transcribe(waves, ["en"] * 4)
        assert [recognizer.transcribe([wave], ["en"])[0].text for wave in waves] == [one.text for one in together]
        assert all(one.confidence is None or 0 < one.confidence <= 1 for one in together)


def refused(spec: str, **options: str) -> str:
    with pytest.raises(UserError) as error, open_text_recognizer(spec, **options):
        pass
    return str(error.value)


@pytest.mark.slow
def test_directories_that_sherpa_does_not_take(exports: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not a model for sherpa-onnx (0 files *.onnx, no tokens.txt)" in refused(
        f"sherpa-onnx:{tmp_path / 'empty'}"
    )
    assert "no such directory" in refused(f"sherpa-onnx:{tmp_path / 'none'}")
    broken = tmp_path / "broken"
    shutil.copytree(exports / "full", broken)
    (broken / "encoder.onnx").write_bytes(b"\x00\x01nonsense")
    assert "is not an ONNX file" in refused(f"sherpa-onnx:{broken}")
    shutil.copy(exports / "full" / "encoder.onnx", broken / "encoder.onnx")
    shutil.copy(exports / "full" / "joiner.onnx", broken / "decoder.onnx")  # without its metadata: the process ends
    assert "sherpa-onnx ended with code" in refused(f"sherpa-onnx:{broken}")
    shutil.copy(exports / "full" / "decoder.onnx", broken / "decoder.onnx")
    shutil.copy(exports / "full" / "encoder.onnx", broken / "encoder-2.onnx")
    assert "several files for the same part (encoder-2.onnx, encoder.onnx)" in refused(f"sherpa-onnx:{broken}")
    for name in ("encoder-2", "encoder", "decoder"):
        (broken / f"{name}.onnx").unlink()
    assert "searched by ctc, not greedy" in refused(f"sherpa-onnx:{broken}", method="greedy")
    with open_text_recognizer(f"sherpa-onnx:{broken}") as recognizer:
        assert recognizer.search == "ctc"
    (broken / "ctc.onnx").unlink()
    assert "neither an encoder nor a whole model" in refused(f"sherpa-onnx:{broken}")
    assert "--device cuda" in refused(f"sherpa-onnx:{exports / 'full'}", device="cuda")


def test_every_kind_is_what_its_constructor_takes(tmp_path: Path) -> None:
    """Arguments of the installed sherpa-onnx; the models of others are too large to test with."""
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    tables = (
        sherpa.TRANSDUCERS,
        {"moonshine": sherpa.MOONSHINE},
        sherpa.PAIRS,
        sherpa.SINGLES,
        sherpa.STREAMING_SINGLES,
    )
    for kind in (kind for table in tables for kind in table.values()):
        of = sherpa_onnx.OnlineRecognizer if kind.online else sherpa_onnx.OfflineRecognizer
        model = sherpa.Model(
            kind, {role: tmp_path / role for role in kind.files.values()}, tmp_path / "tokens.txt", 0.0
        )
        inspect.signature(getattr(of, kind.constructor)).bind(**model.arguments("greedy", 4, 1))


@pytest.mark.parametrize(
    ("names", "model_type", "inputs", "constructor"),
    [
        ("encoder decoder", "EncDecMultiTaskModel", 2, "from_nemo_canary"),
        ("encoder decoder", "whisper-tiny.en", 1, "from_whisper"),
        ("encoder decoder", "paraformer", 2, "from_paraformer"),
        ("model", "EncDecCTCModelBPE", 2, "from_nemo_ctc"),
        ("model", "EncDecHybridRNNTCTCBPEModel", 5, "from_nemo_ctc"),
        ("model", "sense_voice_ctc", 4, "from_sense_voice"),
        ("model", "dolphin", 2, "from_dolphin_ctc"),
        ("encoder decoder joiner", "EncDecRNNTBPEModel", 2, "from_transducer"),
        ("preprocess encode uncached_decode cached_decode", "", 1, "from_moonshine"),
    ],
)
def test_a_kind_is_found_from_the_files(
    tmp_path: Path, names: str, model_type: str, inputs: int, constructor: str
) -> None:
    """Of graphs with the metadata that the models of others have."""
    onnx = pytest.importorskip("onnx")
    values = [onnx.helper.make_tensor_value_info(f"x{n}", onnx.TensorProto.FLOAT, [1]) for n in range(inputs)]
    node = onnx.helper.make_node("Identity", ["x0"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values, [out]))
    onnx.helper.set_model_props(model, {"model_type": model_type} if model_type else {})
    for name in names.split():
        onnx.save(model, str(tmp_path / f"{name}.onnx"))
    shutil.copy(tmp_path / f"{name}.onnx", tmp_path / "lm.onnx")  # as asrkit exports one beside the recognizer
    (tmp_path / "tokens.txt").write_text("a 0\n")
    assert sherpa.find_model(f"sherpa-onnx:{tmp_path}").kind.constructor == constructor


def test_a_process_that_goes_on_decoding_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sherpa, "LAST_SECONDS", 0.1)
    recognizer = object.__new__(sherpa.SherpaRecognizer)
    recognizer._process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    recognizer._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ``close``
    recognizer.close()
    assert recognizer._process.returncode == -signal.SIGKILL


def test_words_of_a_text() -> None:
    assert spoken_words("Mr. Smith's 2 dogs!", "en") == ("mr smith's two dogs", None)
    assert spoken_words("[music]", "en") == ("", None)
    assert spoken_words("in 1984, 20% more", "en") == ("in more", "number with several readings")


@pytest.mark.slow
def test_whisper(tmp_path: Path) -> None:
    """The same texts alone and in a batch, confidence, numbers as words, and frames that follow the utterance."""
    whisper_model()
    waves = [speech(0), speech(1)]
    with open_text_recognizer(WHISPER, method="greedy", threads=1) as recognizer:
        texts = recognizer.transcribe(waves, ["en", ""])
        assert texts[0].text == recognizer.transcribe(waves[:1], [""])[0].text
        assert {one.language for one in texts} == {"en"} and all(0 < (one.confidence or 0) < 1 for one in texts)
        assert spoken_words(texts[1].text, "en") == ("there are twenty five new messages in your mailbox", None)
        frames = recognizer.encode(waves[0])  # type: ignore[attr-defined]
        assert frames.shape == (count_encoder_frames(count_features(len(waves[0]) / SAMPLE_RATE)), 384)
        # Sound half a second later moves the frames by as much: 12.5 of them.
        later = recognizer.encode(torch.cat([torch.zeros(SAMPLE_RATE * 12 // 25), waves[0]]))  # type: ignore[attr-defined]
        similar = [float(torch.cosine_similarity(frames[5:30], later[5 + s : 30 + s]).mean()) for s in range(20)]
        assert similar.index(max(similar)) == 12
        assert "knows English only, not fr" in (recognizer.check_language("fr") or "")
        assert recognizer.check_language("en-US") is None and recognizer.check_language("") is None
    assert "no CTC head" in refused(WHISPER, method="ctc")
    soundfile.write(tmp_path / "0.wav", waves[0].numpy(), SAMPLE_RATE)
    cut = make_cut(
        "0", tmp_path / "0.wav", sampling_rate=SAMPLE_RATE, num_samples=len(waves[0]), text="please", language="en"
    )
    write_cuts(manifest := tmp_path / "test.jsonl.gz", [cut])
    with pytest.raises(UserError, match="no CTC head"):
        evaluate_external(WHISPER, manifest, methods=["greedy", "ctc"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whisper_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name never leads to a download, nor does a directory without its tokenizer."""
    path = whisper_model()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    line = refused("whisper:base")
    assert "not on this machine, and asrkit downloads none" in line and "download_model('base')" in line
    assert "no such directory" in refused(f"whisper:{tmp_path / 'none'}")
    assert "no such directory" in refused("whisper:")
    for file in ("model.bin", "config.json"):
        (tmp_path / file).symlink_to(path / file)
    assert "without tokenizer.json" in refused(f"whisper:{tmp_path}")
    (other := tmp_path / "other").mkdir()
    for one in path.iterdir():
        if one.name != "preprocessor_config.json":
            (other / one.name).symlink_to(one)
    (other / "preprocessor_config.json").write_text('{"feature_size": 128}')
    assert "the model takes 80 mel bins, but" in refused(f"whisper:{other}")
    (tmp_path / "model.bin").unlink()
    (tmp_path / "model.bin").write_bytes(b"nonsense")
    shutil.copy(path / "tokenizer.json", tmp_path)
    assert "cannot be loaded" in refused(f"whisper:{tmp_path}")


@pytest.mark.slow
def test_the_yardstick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """evaluate --from whisper: the same files as for a run, and options that mean nothing are refused."""
    whisper_model()
    monkeypatch.chdir(tmp_path)
    cuts = []
    for number, text in enumerate(
        ("please hold while i transfer your call", "there are twenty five new messages in your mailbox")
    ):
        soundfile.write(tmp_path / f"{number}.wav", speech(number).numpy(), SAMPLE_RATE)
        cuts.append(
            make_cut(
                str(number),
                tmp_path / f"{number}.wav",
                sampling_rate=SAMPLE_RATE,
                num_samples=len(speech(number)),
                text=text,
                language="en",
            )
        )
    write_cuts(tmp_path / "test.jsonl.gz", cuts)
    printed = asrkit("evaluate", "--from", WHISPER, "--manifest", "test.jsonl.gz", "--threads", 1)
    assert "test.jsonl.gz by whisper:tiny.en (external, 30 s windows)" in printed
    (directory,) = (tmp_path / "evaluation").iterdir()
    assert directory.name.startswith("test-") and directory.name.endswith("-whisper-tiny.en-greedy")
    result = json.loads((directory / "result.json").read_text())
    assert result["total"]["words"] == 16 and result["total"]["wer"] < 0.2
    summary = asrkit("summary", directory, "--out", "summary.json")
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    assert (row["stage"], row["bytes"], row["seconds"]) == ("whisper:tiny.en", result["model_bytes"], None), summary
    assert "does not take --chunk" in asrkit(
        "evaluate", "--from", WHISPER, "--manifest", "test.jsonl.gz", "--chunk", 4, code=1
    )
    french = [
        make_cut(
            "f", tmp_path / "0.wav", sampling_rate=SAMPLE_RATE, num_samples=len(speech(0)), text="oui", language="fr"
        )
    ]
    write_cuts(tmp_path / "fr.jsonl.gz", french)
    assert "knows English only, not fr; choose" in asrkit(
        "evaluate", "--from", WHISPER, "--manifest", "fr.jsonl.gz", code=1
    )
