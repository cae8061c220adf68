"""The README's own commands, run in order in an empty folder; only the training is cut short."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asrkit.data.manifests import make_cut, write_cuts
from helpers.commands import asrkit, sets
from helpers.outside import speech, whisper_model
from helpers.tones import RATE, WORDS, make_corpus, say

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
DOCS = Path(__file__).parents[2] / "docs"
LM = "model.dim=8 model.num_layers=1 training.steps=1 training.tensorboard=false"
SHORT = "model.size=tiny model.num_layers=1 training.steps=3 training.tensorboard=false tokenizer.vocab_size=20"


def corpus(folder: Path) -> None:
    """Manifests where the documents have them."""
    prompts = folder / "data" / "prompts"
    for seed, (name, count) in enumerate((("train", 10), ("dev", 3), ("test", 3))):
        make_corpus(prompts, count, seed, name, language="en")
    make_corpus(folder / "data" / "en", 10)
    mine, both = folder / "data" / "mine", folder / "data" / "both"
    for name, count in (("train", 10), ("dev", 3)):
        make_corpus(mine, count, name=name)
    parts = [make_corpus(both / language, 5, name=language, language=language) for language in ("en", "fr")]
    (both / "train.jsonl.gz").write_bytes(b"".join(part.read_bytes() for part in parts))
    shutil.copy(mine / "dev" / "0.wav", folder / "a.wav")
    shutil.copytree(mine / "dev", folder / "recordings")
    (folder / "commands.txt").write_text("\n".join(WORDS) + "\n")


def unlabeled(folder: Path) -> None:
    """Speech without texts where docs/label.md has it."""
    whisper_model()
    cuts = []
    for number in range(2):
        path = folder / "recordings" / f"spoken-{number}.wav"
        soundfile.write(path, speech(number).numpy(), RATE)
        cuts.append(make_cut(str(number), path, sampling_rate=RATE, num_samples=len(speech(number)), text=None))
    (folder / "data" / "raw").mkdir(parents=True, exist_ok=True)
    write_cuts(folder / "data" / "raw" / "all.jsonl.gz", cuts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("train-backbone", {"train-backbone", "transcribe"}),
        ("pretrain", {"pretrain", "data", "info", "train-backbone", "evaluate"}),
        ("add-submodel", {"train-backbone", "add-submodel", "evaluate", "submodel", "info"}),
        ("qat", {"quantize", "qat", "evaluate", "info"}),
        ("prune", {"prune", "qat", "info"}),
        (
            "supernet",
            {"train-backbone", "supernet", "supernet-cut", "evaluate", "info", "export", "qat", "pretrain"},
        ),
        ("distill", {"distill", "train-backbone", "evaluate"}),
        ("label", {"label", "distill", "evaluate"}),
        ("sequence-train", {"sequence-train", "evaluate"}),
        ("asynchronous-training", {"sequence-train"}),
        ("align", {"align"}),
        ("scaling", {"data", "evaluate", "align"}),
        ("compare", {"train-backbone", "quantize", "evaluate", "compare", "summary"}),
        ("report", {"train-backbone", "quantize", "evaluate", "report"}),
        ("decoding-ctc", {"train-lm", "evaluate", "tune", "transcribe", "graph", "sequence-train", "export"}),
        ("distill-lm", {"align", "train-lm", "distill-lm", "evaluate", "info"}),
        ("decoding", {"train-lm", "evaluate", "tune", "transcribe", "export"}),
    ],
)
def test_the_commands_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, expected: set[str]) -> None:
    """Every command of the page, in its order; training is cut short and small."""
    if page in ("align", "distill-lm"):
        pytest.importorskip("espeakng_loader")
    if page == "decoding-ctc":
        pytest.importorskip("k2")
    corpus(tmp_path)
    if page == "label":
        unlabeled(tmp_path)
    (tmp_path / "names.txt").write_text("alpha bravo\ncarol :2\n")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    listed = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert {words[1] for words in listed} == expected
    if listed[0][1] not in ("train-backbone", "pretrain"):
        data = "--manifest data/prompts/train.jsonl.gz --dev data/prompts/dev.jsonl.gz --out exp/backbone"
        listed.insert(0, ["asrkit", "train-backbone", *data.split()])
    encoder = "model.size=tiny model.num_layers=3 model.dim=32 model.feedforward_dim=64"
    heads = "tokenizer.vocab_size=18 model.predictor_dim=16 model.joiner_dim=16"
    for words in listed:
        if words[1] == "train-lm" and "ngram" not in words:
            words += sets(*LM.split())
        if words[1] in (
            "pretrain",
            "train-backbone",
            "add-submodel",
            "qat",
            "prune",
            "distill",
            "distill-lm",
            "supernet",
            "sequence-train",
        ):
            grows = words[1] == "supernet" and "--freeze-masks" not in words
            steps = 12 if "iterative" in words or "--supernet" in words or grows else 1
            settings = f"training.steps={steps} training.tensorboard=false data.num_workers=0".split()
            settings += [] if words[1] == "pretrain" else ["loss.backend=torch"]
            settings += ["growth.interval=1"] if grows else []
            settings += (
                [*encoder.split(), "tokenizer.kind=char"]
                if words[1] == "distill" and "whisper:tiny.en" in words
                else []
            )
            settings += ["supernet.growth.interval=1"] if "--supernet" in words else []
            if words[1] in ("pretrain", "train-backbone") and "--from" not in words:
                settings += encoder.split()
            recognizer = words[1] == "train-backbone" and "--from" not in words
            if recognizer or (words[1] != "pretrain" and {"exp/pretrained", "exp/pre-super"} & {*words}):
                settings += heads.split()
            words += ["--max-duration", "10", *sets(*settings)]
        asrkit(*words[1:])


def commands(heading: str) -> list[list[str]]:
    """The asrkit lines of the first shell block under a heading."""
    block = re.search(rf"## {heading}\n.*?```sh\n(.*?)```", README, re.DOTALL)
    assert block is not None, heading
    lines = [shlex.split(line, comments=True) for line in block[1].replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and line[0] == "asrkit"]


def test_your_own_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    rows = ["path\ttext"]
    for number in range(40):
        words = [str(word) for word in random.choice(list(WORDS), size=3)]
        soundfile.write(tmp_path / f"{number}.wav", say(words, random), RATE)
        rows.append(f"{number}.wav\t{' '.join(words)}")
    (tmp_path / "transcripts.tsv").write_text("\n".join(rows) + "\n")
    soundfile.write(tmp_path / "a.wav", say(["alpha"], random), RATE)
    soundfile.write(tmp_path / "b.flac", say(["bravo", "carol"], random), RATE)
    listed = commands("Your own recordings")
    assert [words[1] for words in listed] == ["data", "data", "train-backbone", "evaluate", "transcribe"]
    for words in listed:
        if words[1] == "train-backbone":
            words += sets(*SHORT.split())
        printed = asrkit(*words[1:])
    for words in commands("A recognizer for a device"):
        if words[1] == "train-backbone":
            words += sets(*SHORT.split())
        if words[1] == "qat":
            words += sets("training.steps=2", "training.tensorboard=false")
        streamed = asrkit(*words[1:])
    assert (tmp_path / "exp/device/README.md").is_file() and " final " in streamed
    (file,) = (tmp_path / "exp/mine/evaluation").glob("test-*-backbone-full-greedy/result.json")
    assert printed.startswith("a.wav: ") and "\nb.flac: " in printed

    summary = ["summary", "exp/mine", "--out", "summary.json"]
    asrkit(*summary)
    result = json.loads(file.read_text())
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    assert (row["stage"], row["variant"], row["method"]) == ("train-backbone", "backbone", "greedy")
    assert (row["wer"], row["words"]) == (result["total"]["wer"], result["total"]["words"])
    # What recognizes, without the CTC head that greedy search leaves alone and what only training needs.
    assert 0 < row["bytes"] < 0.99 * (tmp_path / "exp/mine/model.safetensors").stat().st_size
    result["weights_sha256"] = "of other weights"
    file.write_text(json.dumps(result))
    assert "not evaluated with its present weights" in asrkit(*summary, code=1)
