"""The table of claims: its rows are of the result files, and an interval decides each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import claims  # noqa: E402

from asrkit.reporting.compare import System  # noqa: E402
from asrkit.reporting.wer import Scored  # noqa: E402

KEY, UNTRAINED = "a - b [x]", "u - p [x]"


def claim(rule: str, untrained: str = "", parents: tuple[str, ...] = ()) -> claims.Claim:
    return claims.Claim(
        source="s",
        claim="c",
        setting="o",
        system="a",
        baseline="b",
        rule=rule,
        untrained=untrained,
        parent="p",
        search="x",
        parents=parents,
    )


def result(low: float, high: float, baseline: float = 0.5) -> dict[str, object]:
    difference = (low + high) / 2
    return {
        "interval_95": [low, high],
        "difference": difference,
        "baseline": baseline,
        "value": baseline + difference,
    }


@pytest.mark.parametrize(
    ("rule", "interval", "outcome"),
    [
        ("lower by 2", (-0.05, -0.03), "yes"), ("lower by 2", (-0.05, -0.01), "open"), ("lower by 2", (-0.01, 0.03), "no"),
        ("lower by 10%", (-0.09, -0.06), "yes"), ("lower by 10%", (-0.04, 0.01), "no"),
        ("higher by 0.5", (0.006, 0.01), "yes"), ("higher by 0.5", (0.0, 0.01), "open"), ("higher by 0.5", (-0.01, 0.004), "no"),
        ("within 1", (-0.02, 0.009), "yes"), ("within 1", (-0.02, 0.02), "open"), ("within 1", (0.02, 0.03), "no"),
        ("within 7.3%", (0.0, 0.039), "yes"), ("within 7.3%", (0.0, 0.041), "open"),  # of a 90 % interval
        ("beyond 7.3%", (0.05, 0.09), "yes"), ("beyond 7.3%", (0.0, 0.02), "no"), ("beyond 7.3%", (0.0, 0.09), "open"),
        ("lower by 0", (-0.02, -0.01), "yes"), ("lower by 0", (-0.01, 0.01), "open"), ("lower by 0", (0.01, 0.02), "no"),
        ("gains 1", (-0.02, -0.001), "yes"), ("gains 1", (-0.011, 0.001), "open"), ("gains 1", (-0.009, 0.02), "no"),
        ("recovers 50%", (0.0, 0.04), "yes"), ("recovers 50%", (0.0, 0.06), "open"), ("recovers 50%", (0.06, 0.09), "no"),
    ],
)  # fmt: skip
def test_the_interval_decides(rule: str, interval: tuple[float, float], outcome: str) -> None:
    results = {KEY: result(*interval), UNTRAINED: result(0.09, 0.11)}
    assert claims.decided(claim(rule, "u" if "recovers" in rule else ""), results)[0] == outcome


def test_the_recipe_evaluates_every_arm() -> None:
    """In the way that the row names; `compress/float` is the backbone by another name."""
    recipe = ROOT / "recipes" / "minilibrispeech"
    command = ["make", "-n", "-C", str(recipe), "claims", "ASRKIT=asrkit", "EXP=new", "DATA=new", "NPROC=1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    planned = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    evaluations = [line for line in planned.splitlines() if "asrkit evaluate " in line]
    options = {
        "full-beam4": " --method beam",
        "full-ctc": " --method ctc",
        "full-ctc-beam8-": " --decoding ",
        "chunk8-left32-beam4": " --chunk 8 --left 32 ",
    }
    for row in claims.claims():
        option = options[row.search.strip("*-") + "-" * row.search.endswith("-*")]
        systems = filter(None, (row.system, row.baseline, row.untrained, row.parent))
        for name in (arm for system in systems for arm in row.arms(system)):
            assert any(f" --from new/{name} " in line and option in f"{line} " for line in evaluations), (
                name,
                row.search,
            )


def test_means_of_unequal_numbers_are_compared() -> None:
    """The error of a difference of two means is that of many draws of utterances."""
    random = np.random.default_rng(0)
    numbers = random.integers(1, 9, size=(2, 300))
    shared = random.normal(0.0, 60.0, size=300)
    systems = [
        np.stack([count * (mean + shared + random.normal(0.0, 20.0, 300)), count], 1)
        for count, mean in zip(numbers, (400.0, 350.0), strict=True)
    ]
    estimate = claims.difference_of_means(*systems)
    draws = []
    for _ in range(2000):
        before, after = (system[drawn].sum(0) for drawn in [random.integers(300, size=300)] for system in systems)
        draws.append(after[0] / after[1] - before[0] / before[1])
    assert estimate.difference == pytest.approx(np.mean(draws), abs=1.0)
    assert estimate.standard_error == pytest.approx(np.std(draws), rel=0.1)


def test_a_row_over_parents_has_the_means_of_their_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An utterance that one parent's system gets wrong counts half, in whatever order each evaluation has the utterances."""
    heard = {
        "b": ["one two", "three four"], "b-other": ["one two", "three four"],
        "a": ["one two", "three too"], "a-other": ["one", "fore four five"],
    }  # fmt: skip
    scored = {
        name: [
            Scored(str(number), ref, hyp)
            for number, (ref, hyp) in enumerate(zip(["one two", "three four"], hyps, strict=True))
        ]
        for name, hyps in heard.items()
    }
    scored["a-other"].reverse()
    monkeypatch.setattr(claims, "find_evaluation", lambda path, patterns: path / patterns[0])
    monkeypatch.setattr(
        claims,
        "load_system",
        lambda name, found: System(
            name, tuple(tuple(scored[str(path.parent.relative_to(tmp_path))]) for path in found)
        ),
    )
    first, second = map(claims.word_errors, claims.evaluated(claim("within 1", parents=("other",)), tmp_path, "a", "b"))
    assert first.tolist() == [[0, 2], [0, 2]]
    assert second.tolist() == [[0.5, 2], [1.5, 2]]
    row = claims.compared(claim("within 1", parents=("other",)), tmp_path, "a", "b")
    assert (row["words"], row["baseline"], row["value"], row["difference"]) == (4, 0, 0.5, 0.5)


def test_parents_count_in_errors_of_words_only() -> None:
    with pytest.raises(ValueError, match="has parents"):
        claims.Claim(**{**vars(claim("within 1", parents=("other",))), "metric": "latency"})


def test_what_was_not_run_is_not_decided() -> None:
    assert claims.decided(claim("lower by 2"), {})[0] == "not run"
    assert claims.decided(claim("recovers 50%", "u"), {KEY: result(0, 1)})[0] == "not run"
    with pytest.raises(ValueError, match="is no rule"):
        claims.decided(claim("somewhat better"), {KEY: result(0, 1)})


def test_every_row_has_its_numbers() -> None:
    """As many cells as the head, and every claim named once with each setting."""
    table = list(claims.rows())
    assert all(row.count(" | ") == table[0].count(" | ") for row in table[2:]), "a cell holds a bar"
    settings = [(row.system, row.baseline, row.search, row.metric) for row in claims.claims()]
    assert len(set(settings)) == len(settings)


def test_runs_that_were_not_evaluated_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "claims.json")
    claims.collect(tmp_path)
    assert "compress/int8: " in capsys.readouterr().err
    assert (tmp_path / "claims.json").read_text() == "{}\n"
