"""Configuration: precedence, and every mistake at once with the nearest valid name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from asrkit import yaml_core
from asrkit.config import differences, digest, from_dict, resolve, to_dict
from asrkit.errors import UserError
from asrkit.models.compression import QuantizationConfig
from asrkit.run_dir import read_yaml
from asrkit.stages.add_submodel import AddSubModelConfig
from asrkit.stages.align import AlignConfig
from asrkit.stages.distill_lm import DistillLmConfig
from asrkit.stages.train_backbone import TrainBackboneConfig
from asrkit.training.start import model_spec
from asrkit.yaml_core import dump_safe, load_core, load_safe, load_texts


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 5\ntraining:\n  steps: 10\n  optimizer:\n    learning_rate: 1e-3\n")
    settings = resolve(TrainBackboneConfig, file, ["training.steps=20", "data.augment.spec_augment=null"])
    assert (settings.seed, settings.training.steps, settings.training.log_every) == (5, 20, 50)
    assert settings.training.optimizer.learning_rate == 1e-3
    assert settings.data.augment.spec_augment is None


def test_resolved_settings_round_trip() -> None:
    settings = resolve(
        TrainBackboneConfig,
        None,
        ["model.subsampling_channels=[4, 16]", "data.noise=noise.jsonl.gz", "data.augment.noise_probability=0.5"],
    )
    plain = to_dict(settings)
    assert from_dict(TrainBackboneConfig, plain, "again") == settings
    assert digest(plain) == digest(to_dict(from_dict(TrainBackboneConfig, plain, "again")))


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolve(
            TrainBackboneConfig,
            None,
            ["training.stepz=20", "data.max_duration=-1", "model.siz=tiny", "seed=x"],
        )
    text = "\n".join(caught.value.lines)
    assert len(caught.value.lines) == 4
    assert "training.stepz" in text and "did you mean training.steps" in text
    assert "model.siz" in text and "did you mean model.size" in text
    assert "data.max_duration" in text and "greater than 0" in text


@pytest.mark.parametrize("override", ["novalue", "=3", "seed.deeper=1", "training.steps=[1"])
def test_unreadable_overrides(override: str) -> None:
    with pytest.raises(UserError):
        resolve(TrainBackboneConfig, None, ["seed=1", override])


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: [1\n")
    with pytest.raises(UserError, match="c.yaml"):
        resolve(TrainBackboneConfig, file)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="odd"):
        model_spec(resolve(TrainBackboneConfig, None, ["model.kernel_size=30"]).model, 100)
    with pytest.raises(UserError, match="model.dim"):
        resolve(TrainBackboneConfig, None, ["model.dim=0"])


def test_differences_name_the_leaves() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: 2 -> 3",
        "d: None -> 4",
    ]


def test_a_key_of_a_group_that_is_off_turns_it_on() -> None:
    from asrkit.models.compression import QuantizationConfig

    assert resolve(QuantizationConfig).activations is None
    settings = resolve(QuantizationConfig, None, ["activations.bits=4"])
    assert settings.activations is not None and settings.activations.bits == 4


def test_a_stages_own_defaults_hold_for_the_keys_nobody_sets(tmp_path: Path) -> None:
    from asrkit.methods.compression import from_scratch_defaults
    from asrkit.stages.qat import QatConfig

    (tmp_path / "some.yaml").write_text("training: {steps: 7, optimizer: {warm_up_steps: 3}}")
    settings = resolve(QatConfig, tmp_path / "some.yaml", ["training.log_every=2"])
    assert (settings.training.steps, settings.training.log_every, settings.training.optimizer.warm_up_steps) == (
        7,
        2,
        3,
    )
    assert settings.training.optimizer.name == "adamw" and settings.loss.warm_up_steps == 0
    fresh = resolve(QatConfig, tmp_path / "some.yaml", [], from_scratch_defaults(QatConfig))
    assert fresh.from_scratch and fresh.training.optimizer.name == "scaled_adam" and fresh.loss.warm_up_steps > 0


@pytest.mark.parametrize("word", ["no", "on", "yes", "off", "1e3", "007", "true", "2024-01-01", "1:30", "~x"])
def test_a_text_stays_a_text(tmp_path: Path, word: str) -> None:
    """As an option, as --set, in a list and in a file: Norwegian is a language, and 1e3 a name."""
    (tmp_path / "c.yaml").write_text(f"language: {word}\nvariant: {word}\n")
    for settings in (
        resolve(AlignConfig, options={"language": word, "variant": word}),
        resolve(AlignConfig, None, [f"language={word}", f"variant={word}"]),
        resolve(AlignConfig, tmp_path / "c.yaml"),
    ):
        assert (settings.language, settings.variant) == (word, word)
    assert resolve(AddSubModelConfig, None, [f"active=[{word}, x]"]).active == [word, "x"]
    (tmp_path / "c.yaml").write_text(f"active: [{word}, x]\n")
    assert resolve(AddSubModelConfig, tmp_path / "c.yaml").active == [word, "x"]
    (tmp_path / "c.yaml").write_text(f"{word}: 1\n")
    with pytest.raises(UserError, match=f"c.yaml: {word}: unknown key"):
        resolve(AlignConfig, tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["a: b", "*.conv", "[x", "null", "'"])
def test_a_text_that_is_no_yaml_or_another_value_is_taken_as_it_is(text: str) -> None:
    assert resolve(AlignConfig, None, [f"language={text}"]).language == text


def test_null_is_nothing_where_nothing_is_allowed() -> None:
    assert resolve(AlignConfig, None, ["variant=null"]).variant is None
    assert resolve(AlignConfig, None, ["language=null"]).language == "null"
    assert resolve(AlignConfig, None, ["language=", "units=[phone]"]).language == ""
    with pytest.raises(UserError, match=r"^--set seed: .*integer"):
        resolve(TrainBackboneConfig, None, ["seed=null"])


def test_numbers_and_booleans_are_read_by_the_fields_type() -> None:
    settings = resolve(TrainBackboneConfig, None, ["training.steps=1e3", "training.optimizer.learning_rate=1e-3"])
    assert (settings.training.steps, settings.training.optimizer.learning_rate) == (1000, 1e-3)
    assert resolve(TrainBackboneConfig, None, ["training.tensorboard=no"]).training.tensorboard is False
    assert (
        str(resolve(TrainBackboneConfig, None, ["data.noise=123", "data.augment.noise_probability=0.5"]).data.noise)
        == "123"
    )


def test_an_error_names_what_set_the_value(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1.5\nloss: {ctc_scale: -1}\n")
    with pytest.raises(UserError) as caught:
        resolve(TrainBackboneConfig, tmp_path / "c.yaml", ["training.steps=0"], options={"data.max_duration": -1.0})
    lines = sorted(caught.value.lines)
    assert lines[0].startswith("--set training.steps: ") and "(got 0)" in lines[0]
    assert lines[1].startswith(f"{tmp_path / 'c.yaml'}: loss.ctc_scale: ")
    assert lines[2].startswith(f"{tmp_path / 'c.yaml'}: seed: ")
    assert lines[3].startswith("data.max_duration: ") and len(lines) == 4


def test_a_group_that_is_off_is_turned_on_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("activations: {bits: 4}\n")
    activations = resolve(QuantizationConfig, tmp_path / "c.yaml").activations
    assert activations is not None and (activations.bits, activations.scale) == (4, "token")


@pytest.mark.parametrize("override", ["nonsense.max_duration=1", "heads.phone.wieght=1"])
def test_the_nearest_key_is_in_the_same_group(override: str) -> None:
    with pytest.raises(UserError, match=r"heads.phone.weight\?|unknown key; `asrkit config STAGE --all`"):
        resolve(DistillLmConfig, None, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps=true", "a number or a text is wanted here, not true or false"),
        ("data.max_duration=false", "a number or a text is wanted here"),
        ("seed=99999999999999999999999", "seed"),
        ("training.tensorboard=3", "valid boolean"),
    ],
)
def test_values_that_only_look_right_are_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve(TrainBackboneConfig, None, [override])
    assert not resolve(TrainBackboneConfig, None, ["training.tensorboard=false"]).training.tensorboard


def test_brackets_without_end_are_no_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("[" * 10_000)
    with pytest.raises(UserError, match="not valid YAML .*nested more than 100 deep"):
        resolve(TrainBackboneConfig, file)
    with pytest.raises(UserError, match="not valid YAML .*nested more than 100 deep"):
        read_yaml(file)


@pytest.mark.parametrize("opening, closing", [("[", "]"), ("{a: ", "}"), ("- ", "")])
def test_what_is_nested_deeply_is_never_composed(opening: str, closing: str) -> None:
    """libyaml would compose it, and crash where it is some ten times as deep."""
    assert load_safe(opening * 90 + "1" + closing * 90)
    with pytest.raises(yaml.YAMLError, match="nested more than 100 deep"):
        load_safe(opening * 5000 + "1" + closing * 5000)


def test_references_that_nest_deeply_are_refused() -> None:
    """Each merges the one before, which no bracket shows."""
    merges = "".join(f"  a{number}: &a{number} {{<<: *a{number - 1}}}\n" for number in range(1, 2000))
    with pytest.raises(yaml.YAMLError, match="nested more than 100 deep"):
        load_safe(f"- a0: &a0 {{x: 1}}\n{merges}- {{<<: *a1999}}\n")


@given(st.text("ab1.-+e:,[]{}#&*|>'\"%@?~\n\t \x85\u2028é\ud800", max_size=40))
@example("a: yes\nb: 0x1F\nc: 1e-3\nd: 2001-01-01\ne: [~, .inf, 1_000]")
def test_yaml_by_libyaml_is_what_it_is_in_python(text: str) -> None:
    """It takes some texts more: a tab after a value is a space."""

    def outcome(load: Callable[[str], Any]) -> str:
        try:
            return repr(load(text))
        except yaml.YAMLError as error:
            return f"error: {error}"

    for load, schema in ((load_core, "core"), (load_texts, "texts"), (load_safe, "safe")):
        python, loaded = outcome(partial(yaml.load, Loader=yaml_core._IN_PYTHON[schema])), outcome(load)
        assert loaded == python or (python.startswith("error: ") and not loaded.startswith("error: "))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@given(values)
@example({"manifest": "a\udcff.jsonl.gz"})
@example({"a": "no", "b": ["1e-3", "0x1F", "2001-01-01", "~", "\x85\u2028\U0001f600"], "": 1e-3})
def test_what_is_written_is_read(value: Any) -> None:
    text = dump_safe(value)
    assert load_safe(text) == value == yaml.safe_load(text)


def test_aliases_that_make_yaml_endless_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asrkit.yaml_core.MOST_VALUES", 5000)
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 12)
    )
    for text in (laughs, "a: &a [*a]", "a: &a {b: {c: *a}}"):
        with pytest.raises(yaml.YAMLError, match="more than 5,000 values, or refers to itself"):
            load_safe(text)
    assert load_safe("a: &a [1]\nb: [*a, *a]") == {"a": [1], "b": [[1], [1]]}
