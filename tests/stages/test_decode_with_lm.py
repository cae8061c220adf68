"""evaluate, transcribe and tune with language models and hotwords, as a user meets them."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

from asrkit.data.features import fbank
from asrkit.data.manifests import make_cut, open_cuts, write_cuts
from asrkit.data.text.tokenizer import Tokenizer, train_tokenizer
from asrkit.decoding.fusion import FusionConfig, FusionRequest, load_fusion
from asrkit.decoding.recognizer import load_recognizer
from asrkit.decoding.search import decode, search_n_best
from asrkit.decoding.streaming import Endpoint, StreamingRecognizer
from asrkit.decoding.tuning import coordinate_search, parse_over
from asrkit.errors import UserError
from asrkit.nn.context import parse_context
from asrkit.reporting.results import read_result
from asrkit.run_dir import TOKENIZER
from asrkit.stages.tune import _encoded
from helpers.commands import asrkit
from helpers.small_runs import TEXTS, noise, write_lm_run, write_unsure_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recognizer, two language models of its tokens, hotwords, recordings, and manifests of them."""
    path, random = tmp_path_factory.mktemp("decode"), np.random.default_rng(3)
    write_unsure_run(path / "run")
    write_lm_run(path / "lm", path / "run")
    (path / "corpus.txt").write_text("\n".join(TEXTS))
    options = ["--kind", "ngram", "--order", 3, "--tokenizer", path / "run" / TOKENIZER, "--set", "held_out=0"]
    asrkit("train-lm", "--text", path / "corpus.txt", *options, "--out", path / "lm3")
    (path / "words.txt").write_text("cat\nthree :2\n")
    cuts = []
    for number, seconds in enumerate((2.3, 0.7, 3.1)):
        file, size = path / f"{number}.wav", round(seconds * 16000)
        soundfile.write(file, noise(random, size), 16000)
        cuts.append(make_cut(f"cut-{number}", file, sampling_rate=16000, num_samples=size, text=TEXTS[number]))
    write_cuts(path / "dev.jsonl.gz", cuts)
    write_cuts(path / "test.jsonl.gz", cuts[:2])
    return path


def evaluated(folder: Path, *options: object, manifest: str = "test") -> dict[str, Any]:
    printed = asrkit(
        "evaluate", "--from", folder / "run", "--manifest", folder / f"{manifest}.jsonl.gz", "--json", *options
    )
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


@pytest.mark.parametrize("part", ["lm", "lm3"])
def test_evaluate_with_scale_0_is_evaluate_without(folder: Path, part: str, tmp_path: Path) -> None:
    plain = evaluated(folder, "--method", "beam", "--out", tmp_path / "plain")
    fused = evaluated(folder, "--lm", folder / part, "--lm-scale", 0, "--out", tmp_path / "fused")
    assert (fused["method"], fused["total"]) == ("beam", plain["total"]) and plain["decoding"] is None
    assert fused["decoding"]["sources"]["lm"]["path"] == str(folder / part)
    (one,), (other,) = ((tmp_path / name).glob("*/utterances.jsonl") for name in ("plain", "fused"))
    assert one.read_text() == other.read_text() and one.parent.name != other.parent.name
    assert read_result(other.parent).search == "beam 4 lm 0.0"


@pytest.mark.parametrize(("use", "first"), [("early", 0.75), ("late", 1.5)])
def test_the_first_token_of_a_hotword_counts_half_where_it_counts_early(folder: Path, use: Any, first: float) -> None:
    tokenizer = Tokenizer.load(folder / "run" / TOKENIZER)
    (folder / "one.txt").write_text(TEXTS[0].split()[0])
    request = FusionRequest(FusionConfig(hotwords_use=use), hotwords=folder / "one.txt")
    hotwords = load_fusion(request, tokenizer, torch.device("cpu")).hotwords
    assert hotwords is not None
    state, gains = hotwords.start(1), []
    for token in tokenizer.encode(TEXTS[0].split()[0]):
        gain, state = hotwords.step(state, torch.tensor([token]))
        gains.append(float(gain))
    assert len(gains) > 1 and gains == [first] + [1.5] * (len(gains) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["lm", "lm3"])
def test_streaming_with_a_language_model_is_whole_decoding(folder: Path, part: str) -> None:
    """However the sound is parted; hotwords too."""
    recognizer = load_recognizer(folder / "run", "cpu", context=parse_context("chunk=4,left=0"))
    how = FusionConfig(lm_scale=0.5, length_bonus=0.5, hotwords_score=1.0)
    request = FusionRequest(how, lm=folder / part, hotwords=folder / "words.txt")
    fusion = load_fusion(request, recognizer.tokenizer, recognizer.device)
    samples = torch.from_numpy(soundfile.read(folder / "2.wav", dtype="float32")[0])
    features = fbank(samples)[None]
    special_ids = recognizer.tokenizer.special_ids
    texts = []
    for each in (None, fusion):
        (whole,) = decode(
            recognizer.model, features, torch.tensor([features.shape[1]]), "beam", 4, None, special_ids, each
        )
        for size in (3000, 7777):
            run = functools.partial(search_n_best, recognizer.model, special_ids=special_ids, fusion=each)
            stream = StreamingRecognizer(recognizer.model, recognizer.tokenizer, run, Endpoint(30, 30))
            partials = [partial for block in samples.split(size) for partial in stream.accept(block)]
            final = [*partials, *stream.finish()][-1]
            assert final.final and final.text == recognizer.tokenizer.decode(whole.tokens)
        texts.append(final.text)
    assert texts[0] != texts[1]


@pytest.mark.slow
def test_transcribe_lists_texts_with_their_scores(folder: Path) -> None:
    words = ["transcribe", "--from", folder / "run", folder / "0.wav", "--hotwords", folder / "words.txt"]
    best, *listed = asrkit(*words, "--nbest", 3).splitlines()
    texts = [line.split(maxsplit=2)[2] for line in listed]
    assert len(texts) == len(set(texts)) == 3 and best.split(": ", 1)[1] == texts[0]
    row = json.loads(asrkit(*words, "--nbest", 3, "--json"))
    (piece,) = row["nbest"]
    assert [choice["text"] for choice in piece["texts"]] == texts and row["text"] == texts[0]
    assert "nbest" not in json.loads(asrkit(*words, "--json"))


@pytest.mark.slow
def test_tune_writes_what_evaluate_uses(folder: Path, tmp_path: Path) -> None:
    """The dev errors of the best settings are those that evaluate counts, which marks them as tuned on the same cuts."""
    out = tmp_path / "decoding.yaml"
    over = "lm-scale=0:1,blank-penalty=0:3,hotwords-score=1:2,beam=1:2"
    parts = ["--lm", folder / "lm3", "--hotwords", folder / "words.txt"]
    printed = asrkit(
        "tune", "--from", folder / "run", *parts, "--manifest", folder / "dev.jsonl.gz", "--over", over, "--out", out
    )
    tuned = yaml.safe_load(out.read_text())
    assert f"{len(tuned['trials'])} settings were tried" in printed
    assert tuned["wer"] == min(trial["wer"] for trial in tuned["trials"])
    dev = evaluated(folder, "--decoding", out, manifest="dev")
    assert (dev["total"]["wer"], dev["beam"]) == (pytest.approx(tuned["wer"]), tuned["beam"])
    assert any("was tuned on this manifest" in line for line in dev["warnings"])
    test = evaluated(folder, "--decoding", out)
    assert not any("tuned on" in line for line in test["warnings"])
    assert test["decoding"]["tuned_on"] == {"path": str(folder / "dev.jsonl.gz"), "sha256": tuned["tuned_on"]["sha256"]}
    assert test["decoding"]["settings"]["lm_scale"] == tuned["settings"]["lm_scale"]
    other = evaluated(folder, "--decoding", out, "--lm-scale", 0.25)
    assert other["decoding"]["settings"]["lm_scale"] == 0.25
    whose = "was tuned with the weights of other (digest 000000000000)"
    cut = ["--manifest", folder / "test.jsonl.gz", "--out", tmp_path / "out"]
    for changes, message in (
        ({"recognizer": {"path": "other", "sha256": "0" * 64}}, whose),
        ({"lm": {**tuned["lm"], "sha256": "0" * 64}}, "is not the one that the decoding was tuned with"),
    ):
        out.write_text(yaml.safe_dump({**tuned, **changes}))
        for words in (
            ["evaluate", *cut],
            ["transcribe", folder / "0.wav"],
            ["transcribe", "--stream", folder / "0.wav"],
        ):
            (line,) = asrkit(words[0], "--from", folder / "run", *words[1:], "--decoding", out, code=1).splitlines()
            assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tune_of_ctc_writes_what_evaluate_uses(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "decoding.yaml"
    words = ["tune", "--from", folder / "run", "--method", "ctc-beam", "--lm", folder / "lm3", "--over", "lm-scale=0:2"]
    asrkit(*words, "--manifest", folder / "dev.jsonl.gz", "--out", out)
    tuned = yaml.safe_load(out.read_text())
    dev = evaluated(folder, "--decoding", out, manifest="dev")
    assert tuned["method"] == dev["method"] == "ctc-beam" and dev["total"]["wer"] == pytest.approx(tuned["wer"])
    said = asrkit(
        "export",
        "--from",
        folder / "run",
        "--lm",
        folder / "lm3",
        "--decoding",
        out,
        "--out",
        tmp_path / "onnx",
        code=1,
    )
    assert "was tuned for --method ctc-beam" in said and not (tmp_path / "onnx").exists()


def test_tuning_keeps_the_encoder_s_frames_and_no_features(folder: Path) -> None:
    recognizer = load_recognizer(folder / "run", "cpu")
    for batch, output in _encoded(recognizer, open_cuts(folder / "dev.jsonl.gz"), 200.0):
        assert len(pickle.dumps(batch.features)) < 1000 < len(pickle.dumps(output.joiner_in))


def test_a_search_along_each_option_in_turn() -> None:
    """The second round finds more than the first; where no option alone is better, the search ends, though both together are."""

    def error(settings: dict[str, float]) -> float:
        return 2 * (settings["x"] - 3) ** 2 + (settings["y"] - settings["x"]) ** 2

    values = {"x": (0, 1, 2, 3), "y": (0, 1, 2, 3)}
    first = {"x": 2.0, "y": 2.0}
    assert coordinate_search({"x": 0, "y": 0}, values, error)[0] == {"x": 3, "y": 3}
    assert coordinate_search(first, values, lambda settings: error(settings) if settings == first else 9)[0] == first
    best, tried = coordinate_search(
        {"x": 0, "y": 0}, values, lambda both: (both["x"] - 2) ** 2 + (both["y"] - both["x"]) ** 2
    )
    assert best == {"x": 1, "y": 1}
    assert len({tuple(settings.values()) for settings, _ in tried}) == len(tried)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("lm-scales", "--over lm-scales: unknown; use lm-scale"),
        ("lodr-scale", "without --lodr"),
        ("lm-scale=0.1:many", "write numbers with colons"),
        ("lm-scale=nan", "write numbers with colons"),
        ("beam=2.5", "beam must be a whole number"),
        ("max-active=800", "--over max-active: has no effect without --graph"),
    ],
)
def test_options_that_cannot_be_tuned_are_refused(over: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_over(over, ["lm"])
    assert len(caught.value.lines) == 1 and message in caught.value.lines[0]


def other_tokenizer(folder: Path, tmp_path: Path) -> Sequence[object]:
    train_tokenizer(["others say other things"], "bpe", 20, tmp_path / "other" / TOKENIZER)
    return ["--lm", write_lm_run(tmp_path / "lm", tmp_path / "other")]


def words_lm(folder: Path, tmp_path: Path) -> Sequence[object]:
    options = ["--kind", "ngram", "--unit", "word", "--set", "held_out=0"]
    asrkit("train-lm", "--text", folder / "corpus.txt", *options, "--out", tmp_path / "lm")
    return ["--lm", tmp_path / "lm"]


def broken_arpa(folder: Path, tmp_path: Path) -> Sequence[object]:
    lines = (folder / "lm3" / "lm.arpa").read_text().splitlines()
    bigram = lines[lines.index("\\2-grams:") + 1].split("\t")
    changed = f"{bigram[0]}\t<unk> <unk>\t0"
    (tmp_path / "lm.arpa").write_text("\n".join(changed if line.split("\t") == bigram else line for line in lines))
    return ["--lm", tmp_path / "lm.arpa"]


def recognizer_as_lm(folder: Path, tmp_path: Path) -> Sequence[object]:
    return ["--lm", folder / "run"]


BAD = [
    (other_tokenizer, "its tokenizer has other pieces"),
    (words_lm, "is of word units, and the recognizer emits word pieces"),
    (broken_arpa, "its back-off is broken"),
    (recognizer_as_lm, "is a recognizer, not a language model"),
    (["--lm", "nowhere"], "no such run directory"),
    (["--lm", "lm", "--lm-scale", "nan"], "--lm-scale"),
    (["--lm", "lm", "--lm-scale", "-1"], "--lm-scale"),
    (["--lm-scale", "0.3"], "--lm-scale: has no effect without --lm"),
    (["--temperature", "0"], "--temperature"),
    (["--method", "greedy", "--lm", "lm"], "--method greedy: uses no language model"),
    (["--decoding", "nowhere.yaml"], "no such file; `asrkit tune` writes one"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, message: str
) -> None:
    monkeypatch.chdir(folder)
    words = options(folder, tmp_path) if callable(options) else options
    out = tmp_path / "out"
    printed = asrkit(
        "evaluate", "--from", folder / "run", "--manifest", folder / "test.jsonl.gz", "--out", out, *words, code=1
    )
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert message in line and not out.exists()


def test_what_does_not_go_together(folder: Path) -> None:
    words = ["transcribe", "--from", folder / "run", folder / "0.wav", "--nbest", 5]
    assert "give --beam 5" in asrkit(*words, "--beam", 2, code=1)
    assert "--method greedy has one text only" in asrkit(*words, "--method", "greedy", code=1)
    assert "--stream and --nbest" in asrkit(*words, "--stream", code=1)


def test_an_lm_teaches_and_decodes_the_same_tokens(folder: Path) -> None:
    """symbols of a tokenizer: the blank is the end, other special pieces are unknown."""
    from asrkit.models.ngram.automaton import load_ngram, symbols_of_pieces

    tokenizer = Tokenizer(folder / "run" / TOKENIZER)
    model = load_ngram(folder / "lm3" / "lm.arpa", symbols_of_pieces(tokenizer))
    scores = model.score(torch.tensor([model.start_state]))
    assert scores.shape == (1, tokenizer.vocab_size) and float(scores[0].exp().sum()) == pytest.approx(1.0, abs=1e-4)
