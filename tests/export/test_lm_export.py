"""Language models and hotwords in sherpa-onnx: its tokens are those of our search, in streaming and of whole recordings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch.nn.functional import pad

from asrkit.config import from_dict
from asrkit.data.features import fbank
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import EncoderOutput, TorchAcousticModel
from asrkit.decoding.fusion import Fusion, FusionConfig, FusionRequest, HotwordScorer, load_fusion
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.search import search
from asrkit.errors import UserError
from asrkit.models import load_model
from asrkit.nn.context import parse_context
from asrkit.run_dir import TOKENIZER, open_run
from helpers.commands import asrkit
from helpers.sherpa_client import client
from helpers.small_runs import TEXTS, noise, write_lm_run, write_unsure_run

pytest.importorskip("onnx", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")

from asrkit.export.directory import LmRecord, open_exported
from asrkit.export.readme import client_lodr_scale, tail_seconds
from asrkit.stages.export import export

CHUNK = 4
TAIL = tail_seconds(CHUNK)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unsure_run(tmp_path_factory.mktemp("exp") / "run")


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("audio"), np.random.default_rng(3)
    paths = [folder / f"{number}.wav" for number in range(3)]
    for path, seconds in zip(paths, (2.3, 0.7, 3.1), strict=True):
        soundfile.write(path, noise(random, round(seconds * 16000)), 16000)
    return paths


@pytest.fixture(scope="module")
def lm(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lm_run(tmp_path_factory.mktemp("exp") / "lm", run)


@pytest.fixture(scope="module")
def lodr(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exp")
    (folder / "corpus.txt").write_text("\n".join(TEXTS))
    options = ["--kind", "ngram", "--order", 2, "--tokenizer", run / TOKENIZER, "--set", "held_out=0"]
    asrkit("train-lm", "--text", folder / "corpus.txt", *options, "--out", folder / "lodr")
    return folder / "lodr"


def by_asrkit(run: Path, audio: list[Path], streaming: bool, fusion: Fusion | None) -> list[Hypothesis]:
    """What our beam search finds in the frames that the client searches: of a stream, its whole chunks with the tail."""
    special_ids = Tokenizer(run / TOKENIZER).special_ids
    found = []
    for path in audio:
        samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        if streaming:
            features = fbank(pad(samples, (0, int(TAIL * 16000))))
            model = TorchAcousticModel(load_model(open_run(run)), "backbone", parse_context(f"chunk={CHUNK},left=0"))
            caches, parts, begin = model.start(1), [], 0
            while begin + 4 * CHUNK + 3 < len(features):
                part, caches = model.step(features[None, begin : begin + 4 * CHUNK + 3], caches)
                parts.append(part.joiner_in)
                begin += 4 * CHUNK
            joined = torch.cat(parts, dim=1)
            encoded = EncoderOutput(joined, torch.tensor([joined.shape[1]]), None)
        else:
            model = TorchAcousticModel(load_model(open_run(run)), "backbone")
            encoded = model.encode(fbank(samples)[None], torch.tensor([len(fbank(samples))]))
        found += search(model, encoded, "beam", 4, special_ids, fusion)
    return found


def fusion_of(run: Path, **options: Any) -> Fusion:
    names = {name: options.pop(name) for name in ("lm", "lodr", "hotwords") if name in options}
    request = FusionRequest(from_dict(FusionConfig, options, "test"), **names)
    return load_fusion(request, Tokenizer(run / TOKENIZER), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("with_lodr", [False, True], ids=["lm", "lodr"])
@pytest.mark.parametrize("streaming", [False, True], ids=["offline", "streaming"])
def test_sherpa_decodes_with_a_language_model_as_we_do(
    run: Path, lm: Path, lodr: Path, audio: list[Path], tmp_path: Path, streaming: bool, with_lodr: bool
) -> None:
    how = FusionConfig(lm_scale=0.6 if streaming else 8.0, lodr_scale=0.4, lm_use="fusion" if streaming else "rescore")
    request = FusionRequest(how, lm=lm, lodr=lodr if with_lodr else None)
    out = tmp_path / "onnx"
    export(run, out, streaming=streaming, fusion=request)
    record = open_exported(out).lm
    assert record is not None and record.uses_lm == how.lm_use
    options: dict[str, Any] = {"lm": str(out / "lm.onnx"), "lm_scale": record.lm_scale}
    if with_lodr:
        options |= {"lodr_fst": str(out / "lodr.fst"), "lodr_scale": client_lodr_scale(record)}
    fusion = load_fusion(request, Tokenizer(run / TOKENIZER), torch.device("cpu"))
    expected, without = by_asrkit(run, audio, streaming, fusion), by_asrkit(run, audio, streaming, None)
    assert [hypothesis.tokens for hypothesis in expected] != [hypothesis.tokens for hypothesis in without]
    assert [tokens for tokens, _ in client(out, audio, "beam", **options)] == [found.tokens for found in expected]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["offline", "streaming"])
def test_sherpa_decodes_with_hotwords_as_we_do(
    run: Path, audio: list[Path], tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of phrases that begin alike and break off often. Only at the end of a stream the client takes nothing back."""
    if streaming:
        monkeypatch.setattr(HotwordScorer, "end", lambda scorer, state: torch.zeros(len(state[0])))
    words = tmp_path / "hotwords.txt"
    words.write_text("x :3\nwx x :2\nwo\nu\n")
    out = tmp_path / "onnx"
    export(run, out, streaming=streaming)
    options: dict[str, Any] = {
        "hotwords_file": str(words),
        "hotwords_score": 0.9,
        "modeling_unit": "bpe",
        "bpe_vocab": str(out / "bpe.vocab"),
    }
    expected = by_asrkit(run, audio, streaming, fusion_of(run, hotwords=words, hotwords_score=0.9, hotwords_use="late"))
    assert [found.tokens for found in expected] != [found.tokens for found in by_asrkit(run, audio, streaming, None)]
    assert [tokens for tokens, _ in client(out, audio, "beam", **options)] == [found.tokens for found in expected]


@pytest.mark.slow
def test_the_readme_decodes_with_the_language_model(
    run: Path, lm: Path, lodr: Path, audio: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("sherpa_onnx", reason="needs sherpa-onnx, which runs what is exported")
    out = tmp_path / "onnx"
    printed = asrkit("export", "--from", run, "--lm", lm, "--lm-scale", 8, "--lodr", lodr, "--out", out)
    assert "lm.onnx" in printed and "lodr.fst" in printed
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    maker = re.search(r"recognizer = .*?\n\)\n", blocks[0], re.S)
    assert maker is not None and 'lm="lm.onnx"' in blocks[-1] and 'lodr_fst="lodr.fst"' in blocks[-1]
    code = blocks[0].replace(maker[0], blocks[-1]).replace('"a.wav"', repr(str(audio[0])))
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fusion = fusion_of(run, lm=lm, lodr=lodr, lm_scale=8, lm_use="rescore")
    expected = Tokenizer(run / TOKENIZER).decode(by_asrkit(run, audio[:1], False, fusion)[0].tokens)
    assert " ".join(done.stdout.split()) == " ".join(expected.split())


def test_what_the_client_cannot_take_is_refused(run: Path, lm: Path, lodr: Path, tmp_path: Path) -> None:
    transformer = write_lm_run(tmp_path / "transformer", run, "transformer")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"fusion": FusionRequest(lm=lodr)}, "transducers take a network, not an n-gram"),
        ({"fusion": FusionRequest(lm=transformer), "streaming": True}, "take an LSTM, not a transformer"),
        ({"fusion": FusionRequest(lm=lm, lodr=transformer)}, "subtracts an n-gram, not a network"),
        ({"fusion": FusionRequest(lodr=lodr)}, "add --lm"),
        ({"fusion": FusionRequest(lm=lm), "format": "torchscript"}, "works with ONNX files only"),
    ]
    for options, message in cases:
        with pytest.raises(UserError) as caught:
            export(run, tmp_path / "onnx", **options)
        assert len(caught.value.lines) == 1 and message in caught.value.lines[0]
        assert not (tmp_path / "onnx").exists()


def test_what_was_tuned_and_is_not_exported_is_named(run: Path, lm: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("cat\n")
    how = from_dict(FusionConfig, {"lm_scale": 0.5, "blank_penalty": 1.5, "hotwords_score": 3.0}, "test")
    said: list[str] = []
    request = FusionRequest(how, lm=lm, hotwords=tmp_path / "words.txt")
    export(run, tmp_path / "onnx", fusion=request, warn=said.append)
    (line,) = (line for line in said if line.startswith("--decoding: "))
    assert line.startswith("--decoding: hotwords, blank_penalty 1.5, hotwords_score 3: not exported")


def test_the_scale_that_the_client_takes() -> None:
    record = LmRecord(sources={}, lm_scale=0.5, lodr_scale=0.2, uses_lm="fusion")
    assert client_lodr_scale(record) == -0.2
    assert client_lodr_scale(LmRecord(sources={}, lm_scale=0.5, lodr_scale=0.2, uses_lm="rescore")) == -0.4
