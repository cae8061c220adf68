"""What a run directory can hold, of which kind and format: runs of earlier versions, encoders alone, what is refused and how."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.migration import FORMAT, migrate
from asrkit.models import AsrModel, load_model
from asrkit.models.lm import LanguageModel
from asrkit.models.pretrained import PretrainedEncoder
from asrkit.models.registry import ENCODER, KINDS, NGRAM, load, load_lm, spec_of_kind, write_model
from asrkit.nn.context import FULL, Context
from asrkit.run_dir import (
    CONFIG,
    LINEAGE,
    MODEL,
    TOKENIZER,
    WEIGHTS,
    RunDir,
    check_lineage,
    digests_of,
    open_run,
    read_yaml,
    write_yaml,
)
from asrkit.stages.info import describe_run
from asrkit.stages.quantize import quantize
from asrkit.training.checkpoint import save_weights
from helpers.commands import asrkit, finish
from helpers.small_runs import SUBMODELS, write_encoder, write_run

STORED = Path(__file__).parents[1] / "data" / "runs-format-0.tar.xz"  # asr, compressed, lm-lstm, lm-transformer
# Processors add in different orders.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of format 0, and ``expected.safetensors``: features, and what the code that wrote the runs made of them."""
    path = tmp_path_factory.mktemp("stored")
    with tarfile.open(STORED) as archive:
        archive.extractall(path)
    return path / "runs"


@torch.no_grad()
def outputs(model: AsrModel, features: Tensor, lens: Tensor, languages: list[str] | None) -> dict[str, Tensor]:
    """CTC and joiner outputs of every variant in two contexts."""
    made = {}
    for variant in model.spec.variants:
        for context in (FULL, Context(4, 8)):
            ids = model.language_ids(languages)
            encoder_out, _ = model.encode(features, lens, variant, context, languages=ids)
            predicted = model.joiner.project_predictor(model.predictor(torch.tensor([[-1, 0], [2, 3]])))
            made[f"{variant}/{context}/ctc"] = model.ctc_log_probs(encoder_out)
            made[f"{variant}/{context}/joiner"] = model.joiner(
                model.joiner.project_encoder(encoder_out), predicted.unsqueeze(1)
            )
    return made


@pytest.mark.parametrize(("name", "languages"), [("asr", ["fr", "en"]), ("compressed", None)])
def test_a_recognizer_of_format_0_computes_what_it_did(
    stored: Path, tmp_path: Path, name: str, languages: list[str] | None
) -> None:
    expected = load_file(stored / "expected.safetensors")
    model = load_model(open_run(stored / name))
    computed = outputs(model, expected["features"], expected["lens"], languages)
    assert {f"{name}/{key}" for key in computed} == {key for key in expected if key.startswith(f"{name}/")}
    for key, output in computed.items():
        torch.testing.assert_close(output, expected[f"{name}/{key}"], **CLOSE)
    assert all(variant.masks and variant.integers for variant in model.spec.variants.values())
    again = load_model(open_run(republished(stored / name, tmp_path / "today", model)))
    assert again.spec == model.spec
    today = outputs(again, expected["features"], expected["lens"], languages)
    assert all(torch.equal(output, today[key]) for key, output in computed.items())


@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_a_language_model_of_format_0_computes_what_it_did(stored: Path, tmp_path: Path, architecture: str) -> None:
    run = stored / f"lm-{architecture}"
    model = load_lm(open_run(run))
    symbols = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = load_file(stored / "expected.safetensors")[f"lm-{architecture}"]
    with torch.no_grad():
        torch.testing.assert_close(model(symbols), expected, **CLOSE)
        again = load_lm(open_run(republished(run, tmp_path / "today", model)))
        assert torch.equal(again(symbols), model(symbols)) and again.spec == model.spec


def republished(run: Path, out: Path, model: AsrModel | LanguageModel) -> Path:
    """The run with its model written by today's code."""
    shutil.copytree(run, out)
    write_model(out, model.spec)
    save_weights(out / WEIGHTS, model)
    write_yaml(out / LINEAGE, [read_yaml(out / LINEAGE)[-1] | digests_of(out)])
    assert read_yaml(out / MODEL)["format"] == FORMAT
    return out


def test_weights_of_format_0_are_the_same_bytes_by_new_names(stored: Path) -> None:
    for name in ("asr", "compressed", "lm-lstm", "lm-transformer"):
        on_disk, migrated = load_file(stored / name / WEIGHTS), open_run(stored / name).weights()
        assert migrated.keys() == {key.replace("encoder.normalise.", "encoder.normalize.") for key in on_disk}
        for key, tensor in on_disk.items():
            assert torch.equal(migrated[key.replace("encoder.normalise.", "encoder.normalize.")], tensor)


def test_stages_read_runs_of_format_0_and_write_todays(stored: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (stored / "compressed").iterdir()}
    from asrkit.models.compression import LayerChoice, QuantizationConfig

    choice = LayerChoice(only=["encoder"], include=["*.conv.out"], exclude=["*.blocks.0.*"])
    quantize(stored / "compressed", tmp_path / "more", QuantizationConfig(layers=choice), command="asrkit quantize")
    assert read_yaml(tmp_path / "more" / MODEL).keys() == {"format", "kind", "spec"}
    assert [entry["stage"] for entry in open_run(tmp_path / "more").lineage] == ["qat", "quantize"]
    described = describe_run(stored / "compressed")
    assert described["evaluations"] == []
    assert described["kind"] == "asr" and {row["variant"] for row in described["variants"]} == {*SUBMODELS["variants"]}
    assert {path: path.read_bytes() for path in (stored / "compressed").iterdir()} == before


def test_evaluations_of_format_0_are_shown(stored: Path, tmp_path: Path) -> None:
    """Their result.json says configuration where today's says variant."""
    run = tmp_path / "run"
    shutil.copytree(stored / "asr", run)
    errors = {
        **{"utterances": 2, "words": 8, "wer": 0.25, "wer_95": [0.1, 0.4], "substitutions": 2, "insertions": 0},
        **{"deletions": 0, "characters": 40, "cer": 0.1},
    }
    result = {
        **{"run": "run", "weights_sha256": open_run(run).lineage[-1]["weights_sha256"], "configuration": "near"},
        **{"context": "chunk=4,left=8", "latency_ms": 197.5, "manifest": "dev.jsonl.gz", "manifest_sha256": "0" * 64},
        **{"method": "greedy", "beam": None, "total": errors, "languages": {"en": errors}, "emission_latency": None},
        **{"audio_seconds": 6.0, "decode_seconds": 0.03, "real_time_factor": 0.005, "device": "cpu", "threads": 1},
        "warnings": [],
    }
    (run / "evaluation" / "dev-near").mkdir(parents=True)
    (run / "evaluation" / "dev-near" / "result.json").write_text(json.dumps(result))
    (row,) = [row for row in describe_run(run)["variants"] if row["variant"] == "near"]
    assert row["default"] and row["best"][0]["wer"] == 0.25
    code, shown, _ = finish("summary", run)
    assert code == 0 and "25.00" in shown


def test_words_of_format_0_in_the_lineage() -> None:
    model = {"unit": "bpe", "vocab_size": 3, "shape": {}}
    migrated = migrate(model, [{"stage": "quantise", "metrics": {}}, {"stage": "train-lm"}])
    assert [entry["stage"] for entry in migrated.lineage] == ["quantize", "train-lm"]
    assert migrated.model == {"format": FORMAT, "kind": "lm", "spec": model}
    assert migrated.rename("layers.normalise.weight") == "layers.normalise.weight"  # only the encoder's was renamed


@pytest.mark.parametrize("name", [WEIGHTS, MODEL, TOKENIZER])
def test_a_file_of_format_0_that_was_changed_is_refused(stored: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(stored / "asr", run)
    content = bytearray((run / name).read_bytes())
    content[-1] ^= 1
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: digest") as refused:
        open_run(run)
    assert len(refused.value.lines) == 1
    (run / name).unlink()
    with pytest.raises(UserError, match="missing"):
        open_run(run)


def test_a_run_of_format_0_is_not_resumed(stored: Path, tmp_path: Path) -> None:
    """Its config.yaml has other words, so that nothing but a line about the version would be said of it."""
    run = tmp_path / "lm"
    shutil.copytree(stored / "lm-lstm", run)
    (tmp_path / "text.txt").write_text("the cat sat\n" * 9)
    (line,) = asrkit("train-lm", "--text", tmp_path / "text.txt", "--out", run, code=1).splitlines()
    assert line.startswith(f"error: {run}: was started by an older version of asrkit (format 0, now {FORMAT})")


# --- kinds


def edited(run: Path, out: Path, **changes: Any) -> Path:
    """The run with other values in model.yaml, under right digests."""
    shutil.copytree(run, out)
    write_yaml(out / MODEL, {**read_yaml(out / MODEL), **changes})
    write_yaml(out / LINEAGE, [read_yaml(out / LINEAGE)[-1] | digests_of(out)])
    return out


def test_other_formats_and_kinds_are_refused_in_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"format": FORMAT + 1},
            f"is a run directory of format {FORMAT + 1}, and this version of asrkit reads formats up",
        ),
        ({"format": "one"}, "is a run directory of format one"),
        ({"kind": "tts"}, "holds a model of kind tts, and this version of asrkit knows asr, lm, ngram, encoder"),
        ({"kind": None}, "is no model of format 1"),
        ({"spec": None}, "is no model of format 1"),
        ({"spec": {"vocab_size": 3}}, "another version of asrkit made it (model.yaml: encoder: "),
    ]
    for number, (changes, said) in enumerate(cases):
        changed = edited(run, tmp_path / f"changed-{number}", **changes)
        for words in (["info", changed], ["evaluate", "--from", changed, "--manifest", tmp_path / "no.jsonl.gz"]):
            lines = asrkit(*words, code=1).splitlines()
            (line,) = (line for line in lines if "no.jsonl.gz" not in line)
            assert line.startswith("error: ") and str(changed) in line and said in line


def test_values_of_other_types_in_lineage_and_config_are_refused_in_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    entry = read_yaml(run / LINEAGE)[-1]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"stage": ["a"]}, "0.stage: Input should be a valid string (got ['a'])"),
        ({"seconds": "ten"}, "0.seconds: Input should be a valid number (got 'ten')"),
        ({"seconds": float("nan")}, "0.seconds: Input should be a finite number (got nan)"),
        ({"manifests": ["a"]}, "0.manifests: Input should be a valid dictionary (got ['a'])"),
        ({"manifests": {"a.jsonl": [1]}}, "0.manifests.a.jsonl: Input should be a valid string (got [1])"),
        ({"metrics": "x"}, "0.metrics: Input should be a valid dictionary"),
        ({"metrics": {"wer": {"a": 1}}}, "0.metrics.wer: Input should be a valid number"),
        ({"versions": 7}, "0.versions: Input should be a valid dictionary"),
        ({"losses": 3, "command": [1]}, "0.losses: Input should be a valid list"),
    ]
    for changes, complaint in cases:
        write_yaml(run / LINEAGE, [entry | changes])
        for words in (["info", run], ["summary", run]):
            lines = asrkit(*words, code=1).splitlines()
            assert len(lines) == len(changes) + 1 and all(
                line.startswith(f"error: {run / LINEAGE}: ") for line in lines
            )
            assert any(complaint in line for line in lines)
    without = {key: value for key, value in entry.items() if key != "stage"}
    for content, complaint in (([without], "0.stage: Field required"), ([], "the lineage: "), ("x", "the lineage: ")):
        write_yaml(run / LINEAGE, content)
        assert complaint in asrkit("info", run, code=1)
    for config in ([1], None, {"training": {"steps": 4}}, {"stage": 3}):
        write_yaml(run / CONFIG, config)
        write_yaml(run / LINEAGE, [entry | digests_of(run)])
        for words in (["info", run], ["info", run, "--watch"]):
            (line,) = asrkit(*words, code=1).splitlines()
            assert f"{run / CONFIG}: holds no settings of a stage" in line


def test_the_lineage_of_an_export_or_a_submodel_is_typed_too() -> None:
    with pytest.raises(UserError, match="export.yaml: 1.stage: Field required"):
        check_lineage([{"stage": "a"}, {}], Path("export.yaml"))
    with pytest.raises(UserError, match="holds no stages") as error:
        check_lineage([{"stage": 1}] * 9, Path("x"))
    assert len(error.value.lines) == 6


def test_names_of_a_stranger_are_shown_as_they_are_and_move_no_terminal(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    entry = read_yaml(run / LINEAGE)[-1]
    write_yaml(
        run / LINEAGE,
        [entry | {"stage": "a [/b] :smile:", "command": "x \x1b]0;owned\x07 [red]", "created": "\x1b[2J"}],
    )
    text = asrkit("info", run)
    assert "a [/b] :smile:" in text and "[red]" in text and not {"\x1b", "\x07"} & {*text}


@pytest.fixture
def encoder_run(tmp_path: Path) -> Path:
    """A run directory of a pretrained encoder: without a tokenizer."""
    return write_encoder(tmp_path / "pretrained")


def test_an_encoder_alone_has_the_names_of_a_recognizers(encoder_run: Path, tmp_path: Path) -> None:
    run = open_run(encoder_run)
    assert isinstance(run, RunDir) and run.kind == ENCODER and not run.tokenizer_path.exists()
    assert "tokenizer_sha256" not in run.lineage[-1]
    module = load(run, ENCODER)
    assert isinstance(module, PretrainedEncoder) and not module.training
    assert spec_of_kind(run, ENCODER) == module.spec
    recognizer = load_model(open_run(write_run(tmp_path / "asr", layers=2)))
    theirs = {name: tensor.shape for name, tensor in recognizer.state_dict().items() if name.startswith("encoder.")}
    assert {name: tensor.shape for name, tensor in module.state_dict().items()} == theirs


def test_info_shows_an_encoder_alone(encoder_run: Path) -> None:
    described = describe_run(encoder_run)
    assert described["kind"] == ENCODER and described["vocabulary"] is None and described["variants"] == []
    assert [part["part"] for part in described["parts"]] == ["backbone"]
    assert described["features"]["num_mel_bins"] == 80
    code, shown, _ = finish("info", encoder_run)
    assert code == 0 and "pretrain" in shown and "num_mel_bins 80" in shown and "None" not in shown


def test_where_a_recognizer_is_needed_an_encoder_is_refused_in_one_line(encoder_run: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "cuts.jsonl.gz"
    out = ["--out", tmp_path / "out"]
    commands: list[list[Any]] = [
        ["evaluate", "--from", encoder_run, "--manifest", manifest],
        ["transcribe", tmp_path / "speech.wav", "--from", encoder_run],
        ["export", "--from", encoder_run, *out],
        ["quantize", "--from", encoder_run, *out],
        ["qat", "--from", encoder_run, "--manifest", manifest, *out],
        ["prune", "--from", encoder_run, "--manifest", manifest, *out],
        ["add-submodel", "--from", encoder_run, "--name", "near", "--manifest", manifest, *out],
        ["align", "--from", encoder_run, "--manifest", manifest, "--out", tmp_path / "aligned.jsonl.gz"],
        ["submodel", "list", encoder_run],
        ["summary", encoder_run],
    ]
    for words in commands:
        lines = asrkit(*words, code=1).splitlines()
        assert [line for line in lines if str(manifest) not in line] == [
            f"error: {encoder_run}: is a pretrained encoder, not a recognizer; make a recognizer of it first with "
            f"`asrkit train-backbone --from {encoder_run}`"
        ], words
        assert not (tmp_path / "out").exists()


def test_every_kind_says_what_to_do(stored: Path, encoder_run: Path) -> None:
    runs = {"asr": stored / "asr", "lm": stored / "lm-lstm", ENCODER: encoder_run}
    assert {*runs, NGRAM} == KINDS.keys()  # tests/models/test_ngram.py has one of n-grams
    for name, path in runs.items():
        for wanted in runs:
            if wanted == name:
                assert load(open_run(path), wanted) is not None
                continue
            with pytest.raises(
                UserError, match=f"is {KINDS[name].title}, not {KINDS[wanted].title}; .*`asrkit "
            ) as error:
                load(open_run(path), wanted)
            assert len(error.value.lines) == 1


def test_a_recognizer_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / TOKENIZER).unlink()
    with pytest.raises(UserError, match=r"tokenizer.model: is missing"):
        open_run(run)
    # Nor where the lineage knows of none.
    lineage = read_yaml(run / LINEAGE)
    del lineage[-1]["tokenizer_sha256"]
    write_yaml(run / LINEAGE, lineage)
    with pytest.raises(UserError, match=r"tokenizer.model: is missing"):
        load_model(open_run(run))


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": {"num_layers": 10**9}},
        {"encoder": {"dim": 10**8}},
        {"encoder": {"kernel_size": 10**9 + 1}},
        {"encoder": {"subsampling_channels": [10**6, 10**6]}},
        {"predictor": {"context_size": 10**9}},
        {"vocab_size": 10**9},
        {"joiner_dim": 10**9},
    ],
)
def test_a_model_larger_than_its_weights_is_refused_before_it_is_built(tmp_path: Path, change: dict[str, Any]) -> None:
    """With every digest right, as a stranger's file would have them."""
    run = write_run(tmp_path / "run")
    content = read_yaml(run / MODEL)
    for key, value in change.items():
        content["spec"][key] = {**content["spec"][key], **value} if isinstance(value, dict) else value
    write_yaml(run / MODEL, content)
    lineage = read_yaml(run / LINEAGE)
    lineage[-1]["model_spec_sha256"] = sha256_of(run / MODEL)
    write_yaml(run / LINEAGE, lineage)
    with pytest.raises(UserError, match="describes at least .* parameters, but model.safetensors holds"):
        load_model(open_run(run))
