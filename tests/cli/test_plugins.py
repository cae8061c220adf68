"""A method in a package of its own: installed, it is a command like any other; a mistake in it is one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asrkit.cli import plugins
from helpers import commands
from helpers.commands import ONE, launched, quick
from helpers.small_runs import write_run
from helpers.tones import make_corpus

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text(encoding="utf-8")
TOML, METHOD = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[1] for kind in ("toml", "python"))  # type: ignore[index]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that pip installed the page's package into."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "source").mkdir()
    (folder / "source" / "pyproject.toml").write_text(TOML)
    (folder / "source" / "confidence_penalty.py").write_text(METHOD)
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-qq"]
    subprocess.run([*command, "--target", folder / "site", folder / "source"], check=True, timeout=300)
    return folder / "site"


def asrkit(site: Path, *words: object, code: int = 0) -> str:
    # A wide terminal, so that no line of the help is broken.
    return launched(ONE, *words, code=code, PYTHONPATH=str(site), COLUMNS="400", TERMINAL_WIDTH="400")


@pytest.mark.slow
def test_the_page_is_a_stage_like_any_other(installed: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    corpus = make_corpus(tmp_path, 6)
    assert re.search(r"penalty +Train a model further, with a penalty on confidence", asrkit(installed, "--help"))
    shown = asrkit(installed, "penalty", "--help")
    panels = [line.strip("╭─╮ ") for line in shown.splitlines() if line.startswith("╭")]
    assert panels == ["Input and output", "Training", "Settings", "Help"] and "asrkit penalty --from" in shown
    assert "penalty = 0.1    (number >= 0)\n    Weight of the entropy" in asrkit(
        installed, "config", "penalty", "penalty"
    )

    train = [
        "penalty",
        "--from",
        write_char_run(parent),
        "--manifest",
        corpus,
        "--dev",
        corpus,
        "--out",
        tmp_path / "run",
    ]
    short = ["--max-duration", 10, "--seed", 3, *quick("training.steps=2", "training.log_every=1", "penalty=0.5")]
    asrkit(installed, *train, *short)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("entropy", 0) > 0 for line in lines) and (tmp_path / "run" / "done").is_file()
    assert "penalty" in (tmp_path / "run" / "lineage.yaml").read_text()
    assert "penalty: 0.5" in (tmp_path / "run" / "config.yaml").read_text()
    asrkit(installed, "evaluate", "--from", tmp_path / "run", "--manifest", corpus)
    said = asrkit(installed, *train, *short, "--set", "penalty=-1", "--set", "penlty=1", code=1).splitlines()
    assert said == [
        "error: --set penalty: Input should be greater than or equal to 0 (got -1)",
        "error: --set penlty: unknown key; did you mean penalty?",
    ]


def write_char_run(path: Path) -> Path:
    """An untrained model whose tokenizer knows the words of the corpus."""
    from helpers import small_runs
    from helpers.tones import WORDS

    texts = small_runs.TEXTS
    small_runs.TEXTS = [*texts, *WORDS]
    try:
        return write_run(path)
    finally:
        small_runs.TEXTS = texts


GOOD = """
from pathlib import Path
from asrkit.config import config
from asrkit.cli.options import Out

@config
class Mine:
    "Settings."

    x: int = 1
    "What it is."

def mine(out: Out, settings: Mine) -> None:
    "Print x."
    print(settings.x + 1)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that puts what looks like an installed package with one stage, ``mine``, on the path."""

    def install(module: str, entry: str = "mine = mine:mine", name: str = "mine") -> None:
        (tmp_path / "mine.py").write_text(module)
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[asrkit.stages]\n{entry}\n")

    monkeypatch.syspath_prepend(tmp_path)
    plugins.load.cache_clear()
    yield install
    plugins.load.cache_clear()
    sys.modules.pop("mine", None)


def said(monkeypatch: pytest.MonkeyPatch, *words: str, code: int = 0) -> str:
    """What ``asrkit`` prints in a wide terminal, run in this process."""
    monkeypatch.setenv("COLUMNS", "400")
    return commands.asrkit(*words, code=code)


def test_a_stage_needs_little(package: Any, monkeypatch: Any) -> None:
    package(GOOD)
    assert said(monkeypatch, "mine", "--out", "x", "--set", "x=2") == "3\n"
    assert "--seed" not in said(monkeypatch, "mine", "--help")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ("from pathlib import Path", "import nowhere_at_all"),
            "does not import (ModuleNotFoundError: No module named",
        ),
        (("from pathlib import Path", "raise SystemExit(3)"), "does not import (SystemExit: 3)"),
        (("def mine", "def other"), "does not import (AttributeError"),
        (('    "Print x."\n', ""), "has no docstring, which is the command's help; write one"),
        (('    "What it is."\n', ""), "settings without a docstring under the field: x"),
        ((", settings: Mine", ""), "must have one parameter of a settings class"),
        (("settings: Mine)", "settings: Unknown)"), "its types cannot be read"),
        (("settings: Mine)", "settings: Mine, extra=1)"), "has no type for extra; annotate every parameter"),
        (("settings: Mine)", "settings: Mine, config: int = 1)"), "config: asrkit adds an option of this name"),
        (("out: Out", "into: Out"), "must have a parameter out"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    package: Any, monkeypatch: Any, change: tuple[str, str], says: str
) -> None:
    assert change[0] in GOOD
    package("from __future__ import annotations\n" + GOOD.replace(*change))
    lines = said(monkeypatch, "mine", "--out", "x", code=1).splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: mine, entry point mine = mine:mine: ") and says in lines[0]
    assert says in said(monkeypatch, "--help")
    assert says in said(monkeypatch, "config", "mine", code=1)
    assert "quantization.weights.bits" in said(monkeypatch, "config", "qat")


def test_a_built_in_command_is_not_replaced(package: Any, monkeypatch: Any) -> None:
    package(GOOD, "config = mine:mine")
    lines = said(monkeypatch, "config").splitlines()
    assert "config is a built-in command, which runs instead; rename the entry point" in lines[-1]
    assert lines[0].startswith("asrkit config STAGE") and sum(line.startswith("error: ") for line in lines) == 1


def test_two_stages_of_one_name_are_refused(package: Any, monkeypatch: Any) -> None:
    package(GOOD)
    package(GOOD, name="other")
    (line,) = said(monkeypatch, "mine", "--out", "x", code=1).splitlines()
    assert line.startswith("error: mine: is a stage of ") and line.endswith("; uninstall one")
