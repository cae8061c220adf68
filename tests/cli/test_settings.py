"""asrkit config: what can be set, in four forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asrkit.cli.settings import SETTINGS, settings_class
from asrkit.config import resolve
from helpers.commands import asrkit


def listed(*words: str) -> str:
    return asrkit("config", *words)


@pytest.mark.parametrize("stage", SETTINGS)
@pytest.mark.parametrize("everything", [[], ["--all"]])
def test_the_yaml_form_is_a_file_of_the_defaults(tmp_path: Path, stage: str, everything: list[str]) -> None:
    (tmp_path / "c.yaml").write_text(listed(stage, "--format", "yaml", *everything))
    assert resolve(settings_class(stage), tmp_path / "c.yaml") == settings_class(stage)()


@pytest.mark.parametrize(("stage", "group"), [("qat", "quantization.activations"), ("distill", "teacher.weight")])
def test_a_part_of_the_yaml_is_a_file_too(tmp_path: Path, stage: str, group: str) -> None:
    (tmp_path / "c.yaml").write_text(listed(stage, group, "--format", "yaml"))
    assert resolve(settings_class(stage), tmp_path / "c.yaml") == settings_class(stage)()


def test_commented_keys_work_when_uncommented(tmp_path: Path) -> None:
    text = (
        listed("qat", "--format", "yaml")
        .replace("activations: null", "activations:")
        .replace("    # bits: 8", "    bits: 4")
    )
    (tmp_path / "c.yaml").write_text(text)
    settings = resolve(settings_class("qat"), tmp_path / "c.yaml")
    assert settings.quantization.activations.bits == 4


def test_keys_defaults_and_meanings() -> None:
    rows = {row["key"]: row for row in json.loads(listed("qat", "--format", "json", "--all"))}
    assert rows["quantization.weights.bits"] == {
        "key": "quantization.weights.bits", "values": "2, 4 or 8", "default": 8, "meaning": "Bits per weight: 8, 4 or 2.",
        "advanced": False,
    }  # fmt: skip
    assert rows["training.optimizer.learning_rate"]["default"] == 5e-4  # the stage's, not the optimizer's
    assert rows["quantization.activations"]["default"] is None and rows["quantization.activations.bits"]["default"] == 8
    assert rows["data.augment.noise_snr_db"]["default"] == [10.0, 30.0]
    assert "quantization" not in rows  # a group that is always there is no setting
    table = listed("qat", "data.augment.noise_snr_db")
    assert table.startswith("data.augment.noise_snr_db = [10.0, 30.0]    ([number, number])\n    Least and most")
    assert listed("qat", "training.optimizer", "--format", "markdown").count("\n| `training.optimizer.") == 9


def test_advanced_settings_are_shown_when_asked_for() -> None:
    assert "weights.rounding" not in listed("quantize")
    assert "weights.rounding" in listed("quantize", "--all") and "weights.rounding" in listed(
        "quantize", "weights.rounding"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["qta"], "qta: is not a stage with settings; did you mean qat?"),
        (["zzz"], "zzz: is not a stage with settings; see `asrkit config`"),
        (["qat", "training.stepz"], "training.stepz: unknown key; did you mean training.steps?"),
    ],
)
def test_the_nearest_name_is_suggested(words: list[str], says: str) -> None:
    assert asrkit("config", *words, code=1) == f"error: {says}\n"


def test_without_a_stage_the_stages_are_listed() -> None:
    assert listed().split("\n")[1:-1] == list(SETTINGS)
