"""The table of claims: its rows are of the result files, and an interval decides each."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import claims  # noqa: E402


def claim(rule: str, untrained: str = "") -> claims.Claim:
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
    )


def result(low: float, high: float, baseline: float = 0.5) -> dict[str, object]:
    difference = (low + high) / 2
    return {
        "interval_95": [low, high],
        "difference": difference,
        "baseline_wer": baseline,
        "wer": baseline + difference,
    }


@pytest.mark.parametrize(
    ("rule", "interval", "outcome"),
    [
        ("lower by 2", (-0.05, -0.03), "yes"), ("lower by 2", (-0.05, -0.01), "open"), ("lower by 2", (-0.01, 0.03), "no"),
        ("lower by 10%", (-0.09, -0.06), "yes"), ("lower by 10%", (-0.04, 0.01), "no"),
        ("within 1", (-0.02, 0.009), "yes"), ("within 1", (-0.02, 0.02), "open"), ("within 1", (0.02, 0.03), "no"),
        ("within 7.3%", (0.0, 0.036), "yes"), ("within 7.3%", (0.0, 0.037), "open"),
        ("beyond 7.3%", (0.05, 0.09), "yes"), ("beyond 7.3%", (0.0, 0.02), "no"), ("beyond 7.3%", (0.0, 0.09), "open"),
        ("recovers 50%", (0.0, 0.04), "yes"), ("recovers 50%", (0.0, 0.06), "open"), ("recovers 50%", (0.06, 0.09), "no"),
    ],
)  # fmt: skip
def test_the_interval_decides(rule: str, interval: tuple[float, float], outcome: str) -> None:
    results = {claims.key("a", "b", "x"): result(*interval), claims.key("u", "p", "x"): result(0.09, 0.11)}
    assert claims.decided(claim(rule, "u" if "recovers" in rule else ""), results)[0] == outcome


def test_the_recipe_makes_every_arm() -> None:
    text = (ROOT / "recipes" / "minilibrispeech" / "Makefile").read_text()
    target = text[text.index("CLAIMED :=") :]
    for row in claims.claims():
        for name in filter(None, (row.system, row.baseline, row.untrained, row.parent)):
            assert f" {name.removeprefix('compress/')} " in re.sub(r"[,\n]", " ", target), name


def test_what_was_not_run_is_not_decided() -> None:
    assert claims.decided(claim("lower by 2"), {})[0] == "not run"
    assert claims.decided(claim("recovers 50%", "u"), {claims.key("a", "b", "x"): result(0, 1)})[0] == "not run"
    with pytest.raises(ValueError, match="is no rule"):
        claims.decided(claim("somewhat better"), {claims.key("a", "b", "x"): result(0, 1)})


def test_every_row_has_its_numbers() -> None:
    """As many cells as the head, and every claim named once with each setting."""
    table = list(claims.rows())
    assert all(row.count(" | ") == table[0].count(" | ") for row in table[2:]), "a cell holds a bar"
    settings = [(row.system, row.baseline, row.search) for row in claims.claims()]
    assert len(set(settings)) == len(settings)


def test_runs_that_were_not_evaluated_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "claims.json")
    claims.collect(tmp_path)
    assert "compress/int8: " in capsys.readouterr().err
    assert (tmp_path / "claims.json").read_text() == "{}\n"
