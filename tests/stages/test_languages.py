"""A model with a language input: what the vectors do, and every command that uses such a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from asrkit.config import from_dict
from asrkit.data.batch import Batch, evaluation_batches
from asrkit.data.manifests import make_cut, open_cuts, write_cuts
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import TorchAcousticModel, encode_by_chunks
from asrkit.decoding.evaluation import measure_wer
from asrkit.decoding.recognizer import load_recognizer
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.methods.distillation.pseudo_labels import _transcribe
from asrkit.methods.distillation.teacher_outputs import TeacherOutputs
from asrkit.methods.distillation.teachers import ANY, open_teachers
from asrkit.models import AsrModel, ModelSpec
from asrkit.models.digests import backbone_digest
from asrkit.models.surgery import in_language
from asrkit.nn.conformer import subsampled_lens
from asrkit.nn.context import FULL, Context
from asrkit.run_dir import LINEAGE, TOKENIZER, WEIGHTS, open_run, read_yaml, write_yaml
from asrkit.stages.evaluate import evaluate
from asrkit.stages.transcribe import transcribe
from asrkit.training.asr_loss import LossConfig, asr_loss
from asrkit.training.checkpoint import save_weights
from asrkit.training.distributed import join_world
from helpers.commands import asrkit, killed, quick
from helpers.encoders import assert_same_frames, contexts, randomize
from helpers.run_dirs import metrics, model_of, weights_equal
from helpers.sherpa_client import client
from helpers.small_runs import SUBMODELS, TEXTS, noise, write_run
from helpers.tones import copied, data, make_corpus, rewrite

VECTORS = "encoder.languages.weight"
KNOWN = ["en", "fr", "it"]
some = settings(deadline=None, max_examples=25)


def new_model(languages: list[str], norms: str = "shared") -> AsrModel:
    """In double precision, with attention in one of two layers."""
    encoder = {"dim": 8, "num_layers": 2, "feedforward_dim": 12, "kernel_size": 5, "subsampling_channels": [2, 3]}
    spec = {
        "vocab_size": 5,
        "encoder": {**encoder, "norms": norms},
        "predictor": {"dim": 4},
        "joiner_dim": 4,
        "languages": languages,
        "submodels": {"first": {"kind": "attention", "layers": [1], "dim": 8, "heads": 2}},
        "variants": {"chosen": {"submodels": ["first"]}},
        "variant": "chosen",
    }
    torch.manual_seed(3)
    return AsrModel(from_dict(ModelSpec, spec, "case")).double().eval()


def speaking(norms: str = "shared") -> AsrModel:
    """One whose every weight is its own."""
    model = new_model(KNOWN, norms)
    randomize(model, 5)
    return model


def sound(*lens: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(len(lens), max(lens), 80, generator=random).double() * 3 - 6, torch.tensor(lens)


# The model


@pytest.mark.parametrize("context", [FULL, Context(3, 4)])
@torch.no_grad()
def test_a_row_of_the_matrix_is_added_after_the_subsampling(context: Context) -> None:
    model, plain = speaking(), new_model([])
    weights = model.state_dict()
    matrix = weights.pop(VECTORS)
    assert matrix.shape == (3, 8)
    plain.load_state_dict(weights)
    features, lens = sound(70, 50, 33)
    languages = torch.tensor([2, 0, 2])
    rows = F.one_hot(languages, 3).double() @ matrix

    def add(module: Any, arguments: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return output[0] + rows[:, None], output[1]

    hook: Any = add  # torch 1.13 declares that a hook returns nothing
    plain.encoder.subsampling.register_forward_hook(hook)
    expected, _ = plain.encode(features, lens, None, context)
    assert torch.equal(model.encode(features, lens, None, context, languages=languages)[0], expected)
    assert model.language_ids(["it", "en", "it"]).tolist() == languages.tolist()  # type: ignore[union-attr]


@torch.no_grad()
def test_a_new_model_is_one_without() -> None:
    model, plain = new_model(KNOWN), new_model([])
    weights, others = model.state_dict(), plain.state_dict()
    assert not weights.pop(VECTORS).any() and weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    features, lens = sound(60, 41)
    found, _ = model.encode(features, lens, languages=model.language_ids(["fr", "en"]))
    assert torch.equal(found, plain.encode(features, lens)[0])
    assert plain.language_ids(["fr", "en"]) is None
    for one, told in ((model, None), (plain, torch.tensor([0, 0]))):
        with pytest.raises(ValueError, match="a model with languages"):
            one.encode(features, lens, languages=told)
        with pytest.raises(ValueError, match="a model with languages"):
            encode_by_chunks(one, features, lens, None, Context(2, 2), told)
    with pytest.raises(UserError, match="languages: .*en: named more than once"):
        new_model(["en", "fr", "en"])


@pytest.mark.slow
@some
@given(
    contexts, st.sampled_from(["shared", "per_mode"]), st.lists(st.integers(1, 70), min_size=1, max_size=3), st.data()
)
@torch.no_grad()
def test_batches_of_languages_chunk_by_chunk(
    context: Context, norms: str, lens: list[int], draw: st.DataObject
) -> None:
    """A mixed batch in one pass, chunk by chunk, each utterance by itself, and by the model for its language alone."""
    model = speaking(norms)
    features, feature_lens = sound(*lens)
    names = [draw.draw(st.sampled_from(KNOWN)) for _ in lens]
    languages = model.language_ids(names)
    for where in (context, FULL):
        together, out_lens = model.encode(features, feature_lens, None, where, languages=languages)
        if where.streaming:
            pieces, _ = encode_by_chunks(model, features, feature_lens, None, where, languages)
            assert_same_frames(pieces, together, out_lens)
        for row, name in enumerate(names):
            mine = (features[row : row + 1, : lens[row]], feature_lens[row : row + 1])
            told, _ = model.encode(*mine, None, where, languages=model.language_ids([name]))
            alone, _ = in_language(model, name).double().encode(*mine, None, where)
            for found in (told, alone):
                assert_same_frames(found, together[row : row + 1, : found.shape[1]], out_lens[row : row + 1])


def test_the_gradient_reaches_the_languages_that_were_heard() -> None:
    model = speaking()
    features, lens = sound(40, 50, 33)
    model.encode(features, lens, languages=torch.tensor([2, 0, 2]))[0].square().sum().backward()
    assert [bool(row.any()) for row in model.get_parameter(VECTORS).grad] == [True, False, True]  # type: ignore[union-attr]


def test_the_loss_of_a_batch_is_that_of_its_utterances_in_their_languages() -> None:
    model = speaking().float()
    features, lens = sound(60, 44, 50)
    names = ["it", "en", "fr"]
    symbols, symbol_lens = torch.tensor([[1, 2], [3, 0], [2, 4]]), torch.tensor([2, 1, 2])
    config = LossConfig(backend="torch")

    def loss(model: AsrModel, rows: list[int]) -> Tensor:
        """Of some of the utterances."""
        batch = Batch(
            features[rows].float(), lens[rows], [str(row) for row in rows], ["-"] * len(rows), [names[row] for row in rows],
            [0.5] * len(rows), symbols[rows], symbol_lens[rows],
        )  # fmt: skip
        return asr_loss(model, batch, 0, config).losses.detach()

    alone = [loss(in_language(model, name), [row]) for row, name in enumerate(names)]
    torch.testing.assert_close(loss(model, [0, 1, 2]), torch.cat(alone), rtol=1e-3, atol=1e-3)
    swapped = loss(in_language(model, "en"), [0])
    assert not torch.allclose(swapped, alone[0], rtol=1e-2)


# Commands on a run directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of three languages, one of which, it, is still zeros."""
    path = write_run(tmp_path_factory.mktemp("exp") / "run", {**SUBMODELS, "languages": KNOWN}, layers=2)
    model = model_of(path)
    with torch.no_grad():
        model.get_parameter(VECTORS)[:2].normal_(0.0, 2.0)
    save_weights(path / WEIGHTS, model)
    entry = read_yaml(path / LINEAGE)[-1] | {"weights_sha256": sha256_of(path / WEIGHTS)}
    write_yaml(path / LINEAGE, [entry])
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("exp") / "plain", SUBMODELS, layers=2)


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("audio"), np.random.default_rng(11)
    paths = [folder / f"{number}.wav" for number in range(4)]
    for path, seconds in zip(paths, (1.9, 0.7, 2.6, 1.3), strict=True):
        soundfile.write(path, noise(random, round(seconds * 16000)), 16000)
    return paths


@pytest.fixture(scope="module")
def spoken(audio: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Manifests of the recordings in given languages."""
    folder = tmp_path_factory.mktemp("data")

    def write(*languages: str | None) -> Path:
        path = folder / f"{'-'.join(map(str, languages))}.jsonl.gz"
        rows = zip(audio, TEXTS, languages, strict=True)
        cuts = [
            make_cut(
                f"cut-{number}", file, sampling_rate=16000, num_samples=soundfile.info(file).frames, text=text,
                language=language,
            )
            for number, (file, text, language) in enumerate(rows)
        ]  # fmt: skip
        write_cuts(path, cuts)
        return path

    return write


def heard(run: Path, manifest: Path, out: Path, **options: Any) -> dict[str, str]:
    """What evaluate finds, by cut."""
    (done,) = evaluate(run, manifest, out=out, **options)
    return {utterance.cut_id: utterance.hyp for utterance in done.utterances}


def lines_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if line]


@pytest.mark.slow
def test_evaluate_and_transcribe_take_the_language(
    run: Path, plain: Path, audio: list[Path], spoken: Callable[..., Path], tmp_path: Path
) -> None:
    mixed = ("en", "fr", "it", "en")
    found = heard(run, spoken(*mixed), tmp_path, variant="backbone")
    others = heard(run, spoken("fr", "en", "en", "fr"), tmp_path, variant="backbone")
    assert sum(found[cut_id] != others[cut_id] for cut_id in found) >= 3, "the languages make no difference"
    for number, language in enumerate(mixed):
        (text,) = transcribe(run, [audio[number]], variant="backbone", language=language)
        assert text.text == found[f"cut-{number}"]
    stream = ["transcribe", "--from", run, "--stream", "--fast", "--pause", 9, "--json"]
    said = [
        json.loads(lines_of(asrkit(*stream, "--language", language, audio[0]))[-1])["text"] for language in ("en", "fr")
    ]
    streamed = heard(run, spoken(*mixed), tmp_path)  # `near`, whose first context is a stream
    assert said[0] == streamed["cut-0"] and said[1] != said[0]
    for words, complaint in (
        ([run], f"error: {run}: needs the language of the recordings; give --language, one of en, fr, it"),
        ([run, "--language", "de"], "error: --language de: this model knows en, fr, it"),
        ([plain, "--language", "en"], "error: --language en: this model has no language input; drop --language"),
    ):
        for how in ([], ["--stream", "--fast"]):
            assert lines_of(asrkit("transcribe", "--from", *words, *how, audio[0], code=1)) == [complaint]
    manifest = spoken("de", "fr", None, "en")
    refused = lines_of(asrkit("evaluate", "--from", run, "--manifest", manifest, "--out", tmp_path / "no", code=1))
    assert len(refused) == 3 and not (tmp_path / "no").exists()
    assert refused[0].endswith("cut cut-0: language: de; the model knows en, fr, it")
    assert refused[1].endswith("cut cut-2: language: none; the model knows en, fr, it")
    heard(plain, manifest, tmp_path / "plain")  # a model without a language input ignores the cuts' languages


def test_dev_and_labels_are_heard_in_their_language(run: Path, spoken: Callable[..., Path], tmp_path: Path) -> None:
    manifest = spoken("en", "fr", "it", "en")
    found = heard(run, manifest, tmp_path, variant="backbone")
    cuts = list(open_cuts(manifest))
    model = model_of(run)
    recognizer = TorchAcousticModel(model, "backbone")
    tokenizer = Tokenizer(run / TOKENIZER)
    _, _, rows = measure_wer(recognizer, evaluation_batches(cuts, 100.0), tokenizer)
    assert {cut_id: hypothesis for cut_id, _, hypothesis in rows} == found
    # Teachers hear in their default variant and its first context.
    streamed = heard(run, manifest, tmp_path)
    with join_world("cpu") as world:
        texts = _transcribe(cuts, open_teachers({ANY: [run]}), "greedy", 100.0, SimpleNamespace(world=world))  # type: ignore[arg-type]
    assert texts == streamed


@torch.no_grad()
def test_a_teacher_hears_each_utterance_in_its_language(run: Path) -> None:
    teachers = open_teachers({ANY: [run], "fr": [run]})
    features, feature_lens = sound(90, 70, 80)
    features = features.float()
    symbols, symbol_lens = torch.ones(3, 2, dtype=torch.int64), torch.tensor([2, 2, 2])
    lens = subsampled_lens(feature_lens)

    def said(languages: list[str]) -> Tensor:
        lesson = TeacherOutputs(teachers, languages, features, feature_lens, symbols, symbol_lens, lens, context=FULL)
        return lesson.ctc_log_probs()

    mixed = ["en", "fr", "it"]
    together, alone = said(mixed), {language: said([language] * 3) for language in mixed}
    for row, language in enumerate(mixed):
        assert_same_frames(together[row : row + 1], alone[language][row : row + 1], lens[row : row + 1])
    assert not torch.allclose(alone["en"], alone["it"], atol=0.1)


@pytest.mark.slow
def test_what_is_made_of_a_model_has_its_languages(
    run: Path, audio: list[Path], spoken: Callable[..., Path], tmp_path: Path
) -> None:
    assert "languages the model takes as an input: en, fr, it" in asrkit("info", run)
    assert json.loads(asrkit("info", run, "--json"))["languages"] == KNOWN
    before = open_run(run).weights()
    asrkit("submodel", "extract", "--from", run, "--name", "wide", "--out", tmp_path / "wide.safetensors")
    asrkit("submodel", "remove", "--from", run, "--name", "wide", "--out", tmp_path / "less")
    asrkit("submodel", "attach", "--from", tmp_path / "less", "--file", tmp_path / "wide.safetensors", "--out", tmp_path / "again")  # fmt: skip
    asrkit("submodel", "combine", "--from", run, "--variant", "both", "--submodel", "near", "--submodel", "thin",
           "--context", "full", "--out", tmp_path / "both")  # fmt: skip
    asrkit("quantize", "--from", run, "--bits", 8, "--out", tmp_path / "int8")
    for name in ("less", "again", "both", "int8"):
        model = model_of(tmp_path / name)
        assert model.spec.languages == KNOWN and torch.equal(model.get_parameter(VECTORS), before[VECTORS]), name
    found = heard(tmp_path / "int8", spoken("en", "fr", "it", "en"), tmp_path / "out", variant="backbone")
    (text,) = transcribe(tmp_path / "int8", audio[1:2], variant="backbone", language="fr")
    assert text.text == found["cut-1"]
    changed = {**before, VECTORS: before[VECTORS] + 1}
    assert backbone_digest(before) != backbone_digest(changed), "the vectors belong to the frozen backbone"


EXPORTS = [
    ("en", ["--variant", "backbone"]),
    ("it", ["--variant", "all", "--quantize", "int8"]),  # zeros
    ("fr", ["--streaming"]),
    ("fr", ["--variant", "backbone", "--streaming", "--quantize", "dynamic"]),
    ("en", ["--variant", "backbone", "--format", "torchscript"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("language", "how"), EXPORTS)
def test_exported_files_hear_one_language(
    run: Path, audio: list[Path], spoken: Callable[..., Path], tmp_path: Path, language: str, how: list[str]
) -> None:
    pytest.importorskip("onnx", reason="needs the extra `export`")
    pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    from asrkit.export.directory import open_exported

    out = tmp_path / "onnx"
    mine = spoken(*[language] * 4)
    asrkit("export", "--from", run, "--language", language, *how, "--out", out, "--report", mine)
    exported = open_exported(out)
    assert exported.language == language
    card = (out / "README.md").read_text()
    assert f"\nlanguage: {language}\n" in card and f"Language: {language}.\n" in card
    variant, context = exported.variant, exported.parsed_context
    if "--quantize" not in how:
        torch_says = heard(run, mine, tmp_path / "torch", variant=variant, context=_choice(context))
        assert heard(out, mine, tmp_path / "files") == torch_says
        assert len(set(torch_says.values())) == 4
        same = load_recognizer(out, language=language)
        assert same.language == language
        (text,) = transcribe(out, audio[:1])
        assert text.text == torch_says["cut-0"]
    said = lines_of(asrkit("evaluate", "--from", out, "--manifest", spoken("en", "fr", "it", None), code=1))
    assert len(said) == 4 and f"the model knows {language}" in said[0]
    said = lines_of(asrkit("transcribe", "--from", out, "--language", "de", audio[0], code=1))
    assert len(said) == 1 and f"recognizes {language} only" in said[0]


def _choice(context: Context) -> Any:
    from asrkit.decoding.choice import ContextChoice

    return ContextChoice(full=not context.streaming, chunk=context.chunk, left=context.left if context.chunk else None)


@pytest.mark.slow
def test_sherpa_hears_the_language(run: Path, audio: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra `export`")
    from asrkit.stages.export import export

    found = {}
    for language in ("en", "fr"):
        export(run, tmp_path / language, variant="backbone", language=language)
        found[language] = [tokens for tokens, _ in client(tmp_path / language, audio, "greedy")]
        recognizer = load_recognizer(run, variant="backbone", language=language)
        texts = [done.text for done in transcribe(run, audio, variant="backbone", language=language)]
        assert [recognizer.tokenizer.decode(tokens) for tokens in found[language]] == texts
    assert found["en"] != found["fr"]


def test_export_refuses_without_a_language(run: Path, plain: Path, spoken: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra `export`")
    for words, complaint in (
        ([run], "give --language, one of en, fr, it"),
        ([run, "--language", "de"], "--language de: this model knows en, fr, it"),
        ([plain, "--language", "en"], "--language en: this model has no language input; drop --language"),
    ):
        refused = lines_of(
            asrkit("export", "--from", *words, "--variant", "backbone", "--out", tmp_path / "no", code=1)
        )
        assert len(refused) == 1 and complaint in refused[0] and not (tmp_path / "no").exists()
    report = spoken("en", "fr", "en", "en")
    said = asrkit("export", "--from", run, "--language", "en", "--variant", "backbone", "--report", report,
                  "--out", tmp_path / "no", code=1)  # fmt: skip
    assert "cut cut-1: language: fr; the model knows en" in said


# Training


TINY = ["model.size=tiny", "model.num_layers=1", "model.dim=16", "model.feedforward_dim=24", "model.joiner_dim=24",
        "tokenizer.vocab_size=18", "training.optimizer.warm_up_steps=0"]  # fmt: skip
TOLD = [*TINY, "model.languages=[en, fr]"]
BRIEF = "training.steps=2"


def alternate(number: int, cut: dict[str, Any]) -> None:
    cut["supervisions"][0]["language"] = ("en", "fr")[number % 2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rewrite(make_corpus(folder, 8), alternate)
    rewrite(make_corpus(folder, 4, seed=1, name="dev"), alternate)
    return folder


@pytest.fixture(scope="module")
def told(corpus: Path) -> Path:
    asrkit("train-backbone", *data(corpus), "--out", corpus / "told", *quick(*TOLD))
    return corpus / "told"


@pytest.fixture(scope="module")
def untold(corpus: Path, told: Path) -> Path:
    asrkit("train-backbone", *data(corpus), "--tokenizer", told / "tokenizer.model", "--out", corpus / "untold",
           *quick(*TINY, BRIEF))  # fmt: skip
    return corpus / "untold"


@pytest.mark.slow
def test_training_moves_the_vectors_and_later_stages_keep_them(corpus: Path, told: Path, tmp_path: Path) -> None:
    model = model_of(told)
    vectors = model.get_parameter(VECTORS)
    assert model.spec.languages == ["en", "fr"] and bool(vectors.any(dim=1).all())
    assert not torch.equal(vectors[0], vectors[1])
    common = [*data(corpus), "--out"]
    asrkit("add-submodel", "--from", told, "--name", "near", *common, tmp_path / "near", *quick(BRIEF))
    assert torch.equal(model_of(tmp_path / "near").get_parameter(VECTORS), vectors)
    asrkit("prune", "--from", told, "--sparsity", "2:4", "--teacher", told, *common, tmp_path / "sparse", *quick(BRIEF))
    asrkit("qat", "--from", tmp_path / "sparse", "--bits", 8, *common, tmp_path / "int8", *quick(BRIEF))
    assert model_of(tmp_path / "int8").spec.languages == ["en", "fr"]
    asrkit("train-backbone", "--from", told, *common, tmp_path / "on", *quick(BRIEF))
    assert not torch.equal(model_of(tmp_path / "on").get_parameter(VECTORS), vectors)
    manifest = corpus / "dev.jsonl.gz"
    asrkit("evaluate", "--from", tmp_path / "int8", "--manifest", manifest)
    # One whose CTC head is sure of nothing still has a path.
    asrkit("align", "--from", told, "--manifest", manifest, "--out", tmp_path / "aligned.jsonl.gz")


@pytest.mark.slow
def test_killed_and_resumed_is_the_uninterrupted_run(corpus: Path, told: Path, tmp_path: Path) -> None:
    run = tmp_path / "again"
    words = ["train-backbone", *data(corpus), "--out", run, *quick(*TOLD)]
    killed("step 2:", *words)
    assert not (run / "done").exists()
    asrkit(*words)
    assert weights_equal(run, told)


@pytest.mark.slow
def test_students_and_teachers_with_and_without(corpus: Path, told: Path, untold: Path, tmp_path: Path) -> None:
    common = [*data(corpus), "--out"]
    small = [setting for setting in TOLD if not setting.startswith("tokenizer")]
    plain = small[:-1]
    asrkit("distill", "--teacher", untold, *common, tmp_path / "told", *quick(*small, BRIEF))
    assert model_of(tmp_path / "told").spec.languages == ["en", "fr"]
    asrkit("distill", "--teacher", told, *common, tmp_path / "untold", *quick(*plain, BRIEF))
    assert model_of(tmp_path / "untold").spec.languages == []
    asrkit("distill", "--from", told, "--teacher", f"en={told}", "--teacher", f"fr={untold}", *common, tmp_path / "both",
           "--cache", tmp_path / "store", *quick(BRIEF))  # fmt: skip
    for name in ("told", "untold", "both"):
        assert any(row.get("kd_lattice", 0) > 0 for row in metrics(tmp_path / name)), name

    def hush(number: int, cut: dict[str, Any]) -> None:
        if number < 3:
            cut["supervisions"][0]["text"] = ""

    silent = copied(corpus, tmp_path / "silent.jsonl.gz", hush)
    words = ["distill", "--teacher", told, "--labels", "teacher", "--manifest", silent, "--max-duration", 20, "--out"]
    assert "the teachers transcribed" in asrkit(*words, tmp_path / "labels", *quick(*small, BRIEF))


def _strange(number: int, cut: dict[str, Any]) -> None:
    if number in (2, 5):
        cut["supervisions"][0]["language"] = {2: "de", 5: None}[number]


@pytest.mark.slow
def test_cuts_of_other_languages_are_refused_before_training(
    corpus: Path, told: Path, untold: Path, tmp_path: Path
) -> None:
    strange = copied(corpus, tmp_path / "strange.jsonl.gz", _strange)
    known = ["cut train-2: language: de; the model knows en, fr", "cut train-5: language: none; the model knows en, fr"]
    out = tmp_path / "run"
    good = corpus / "train.jsonl.gz"
    refused: list[list[object]] = [
        ["train-backbone", "--manifest", strange, *quick(*TOLD)],
        ["train-backbone", "--manifest", good, "--dev", strange, *quick(*TOLD)],
        ["train-backbone", "--from", told, "--manifest", strange, *quick()],
        ["qat", "--from", told, "--bits", 8, "--manifest", strange, *quick()],
        ["prune", "--from", told, "--manifest", strange, *quick()],
        ["add-submodel", "--from", told, "--name", "near", "--manifest", strange, *quick()],
        ["distill", "--from", told, "--teacher", untold, "--manifest", strange, *quick()],
        ["distill", "--from", told, "--teacher", untold, "--labels", "teacher", "--manifest", strange, *quick()],
        ["align", "--from", told, "--manifest", strange],
    ]
    for words in refused:
        place = tmp_path / "aligned.jsonl.gz" if words[0] == "align" else out
        found = lines_of(asrkit(*words, "--out", place, code=1))
        assert [line.removeprefix("error: ") for line in found[:2]] == known and len(found) == 3, (words, found)
        assert not place.exists()
    # They may be left out instead.
    said = asrkit("train-backbone", "--manifest", strange, "--max-duration", 20, "--out", out,
                  *quick(*TOLD, "bad_cuts=skip", "training.steps=1"))  # fmt: skip
    assert "left out: cut train-2: language: de" in said and "6 utterances" in said
    said = asrkit("train-backbone", "--manifest", good, "--out", tmp_path / "no", *quick(*TINY, "model.languages=[en, en]"), code=1)  # fmt: skip
    assert "model.languages" in said and "named more than once" in said


@pytest.mark.slow
def test_cuts_a_teacher_does_not_know_are_refused(corpus: Path, told: Path, untold: Path, tmp_path: Path) -> None:
    def hush(number: int, cut: dict[str, Any]) -> None:
        _strange(number, cut)
        cut["supervisions"][0]["text"] = ""

    strange = copied(corpus, tmp_path / "strange.jsonl.gz", _strange)
    hushed = copied(corpus, tmp_path / "hushed.jsonl.gz", hush)
    out = tmp_path / "run"
    taught = (
        f"--teacher {told}: takes the language as an input, one of en, fr; 2 cuts have another or none: "
        "train-2 (de), train-5 (none)"
    )
    student = quick(*TINY[:-2])
    refused: list[list[object]] = [
        ["distill", "--teacher", told, "--manifest", strange, *student],
        ["distill", "--teacher", told, "--labels", "teacher", "--manifest", hushed, *student],
        ["qat", "--from", untold, "--bits", 8, "--teacher", told, "--manifest", strange, *quick()],
    ]
    for words in refused:
        said = lines_of(asrkit(*words, "--out", out, code=1))
        assert [line.removeprefix("error: ") for line in said] == [taught] and not out.exists(), words


def test_joins_would_mix_languages(corpus: Path, told: Path, tmp_path: Path) -> None:
    common: list[object] = ["--manifest", corpus / "train.jsonl.gz", "--out", tmp_path / "no"]
    join = "data.augment.join=0.5"
    for said in (
        asrkit("train-backbone", *common, *quick(*TOLD, join), code=1),
        asrkit("distill", "--teacher", told, *common, *quick(*TINY[:-2], join), code=1),
    ):
        assert len(lines_of(said)) == 1 and "set data.augment.join=0" in said and not (tmp_path / "no").exists()
