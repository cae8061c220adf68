"""What is typed is what the stage gets, and the help of every command."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import typer

from asrkit.cli import app
from asrkit.cli.options import DriverName, replica_options
from asrkit.config import config, resolve
from asrkit.training.asynchronous.config import AsyncConfig
from asrkit.training.config import TrainingConfig
from helpers.commands import asrkit, finish

FILES = ["--manifest", "m.jsonl.gz", "--out", "exp/out"]


def commands(group: typer.Typer = app, *path: str) -> Iterator[tuple[list[str], Any]]:
    for command in group.registered_commands:
        yield [*path, str(command.name)], command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance, *path, str(inner.name))


def settings_of(monkeypatch: pytest.MonkeyPatch, stage: str, *words: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the stage function is called with by a command."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    module = stage.replace("-", "_")

    def record(*positional: Any, **named: Any) -> None:
        calls.append((positional, named))

    monkeypatch.setattr(f"asrkit.stages.{module}.{module}", record)
    asrkit(stage, *words)
    (call,) = calls
    return call


@pytest.mark.parametrize("word", ["no", "on", "yes", "1e3", "null", "007", "x: y"])
def test_options_reach_the_stage_as_typed(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    values, _ = settings_of(monkeypatch, "train-lm", "--text", word, "--out", word, "--language", word)
    assert values[:2] == (Path(word), Path(word)) and values[2].language == word
    values, named = settings_of(
        monkeypatch,
        "add-submodel",
        "--from",
        word,
        "--name",
        word,
        *FILES,
        "--active",
        word,
        "--init",
        word,
        "--dev",
        word,
    )
    assert values[:2] == (Path(word), word) and named["dev"] == Path(word)
    assert (values[4].active, values[4].submodel.init) == ([word], word)
    for stage in ("prune", "qat"):
        values, _ = settings_of(monkeypatch, stage, "--from", "exp/a", *FILES, "--variant", word)
        assert values[3].variant == word
    values, _ = settings_of(monkeypatch, "distill", "--teacher", f"{word}=exp/a", *FILES, "--variant", word)
    assert values[0] == {word: [Path("exp/a")]} and values[3].variant == word
    values, _ = settings_of(
        monkeypatch, "distill-lm", "--from", "exp/a", "--lm", f"{word}={word}", *FILES, "--seed", "3"
    )
    assert values[1] == {word: Path(word)} and values[4].seed == 3


def test_options_win_over_set_and_all_reaches_every_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("submodel: {layers: [1]}\n")
    words = ["--from", "exp/a", "--name", "x", *FILES, "--config", str(tmp_path / "c.yaml"), "--set", "seed=2"]
    values, _ = settings_of(monkeypatch, "add-submodel", *words, "--seed", "5")
    assert (values[4].seed, values[4].submodel.layers) == (5, [1])
    values, _ = settings_of(monkeypatch, "add-submodel", *words, "--layers", "all")
    assert (values[4].seed, values[4].submodel.layers) == (2, None)
    values, _ = settings_of(monkeypatch, "add-submodel", *words, "--layers", "0-2,4")
    assert values[4].submodel.layers == [0, 1, 2, 4]


def test_masks_and_budgets_are_read_from_their_short_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    values, _ = settings_of(monkeypatch, "prune", "--from", "exp/a", *FILES, "--sparsity", "0.67", "--block", "8x1")
    assert (values[3].mask.sparsity, values[3].mask.block, values[3].mask.keep) == (0.67, (8, 1), None)
    values, _ = settings_of(monkeypatch, "prune", "--from", "exp/a", *FILES, "--sparsity", "2:4")
    assert (values[3].mask.sparsity, values[3].mask.keep, values[3].mask.group) == (None, 2, 4)
    values, _ = settings_of(monkeypatch, "qat", "--from", "exp/a", *FILES, "--budget", "20%", "--act-bits", "8")
    assert values[3].budget == 0.2 and values[3].quantization.activations.bits == 8


@pytest.mark.parametrize(("path", "function"), [pytest.param(*each, id=" ".join(each[0])) for each in commands()])
def test_the_help_has_an_example_and_panels(path: list[str], function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert f"asrkit {' '.join(path)}" in function.__doc__, "show how the command is called"
    shown = asrkit(*path, "--help")
    panels = [line.strip("╭─╮ ") for line in shown.splitlines() if line.startswith("╭")]
    assert panels[-1] == "Help" and "Options" not in panels, "every option has a panel"
    if "overrides" in inspect.signature(function).parameters:
        assert panels[0] == "Input and output" and panels[-2] == "Settings"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info", ""], "error: word 2, after info, is empty"),
        (["evaluate", "--from", "exp", "--out="], "error: --out= is empty"),
        (["", "info"], "error: the first word is empty"),
    ],
)
def test_an_empty_word_is_refused(words: list[str], said: str) -> None:
    """An empty path would be the current directory, where a shell's variable is not set."""
    finished = finish(*words)
    assert (finished.code, finished.out) == (2, "") and finished.err.startswith(said)


@config
class Settings:
    """Of a stage that replicas can train."""

    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def test_the_options_of_replicas_set_their_settings() -> None:
    options = replica_options(DriverName.ray, 16, 3, None, 2, 4, 2, 0.5, "auto")
    settings = resolve(Settings, options=options)
    expected = AsyncConfig(
        driver="ray", workers=16, max_staleness=3, fetch_every=2, shards=2, gpus_per_worker=0.5, ray_address="auto"
    )
    assert settings.asynchronous == expected and settings.training.accumulate == 4
    assert resolve(Settings, options=replica_options(*[None] * 9)) == Settings()
