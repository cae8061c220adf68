"""The table of claims in docs/results.md, from result files: nobody copies a number by hand.

    python scripts/claims.py collect EXP     compare the evaluated runs below EXP that docs/results/claims.yaml names, and store what comes out
    make generated                           write the table anew

A claim is decided by the 95 % interval of a difference (paired bootstrap over utterances), in points of WER:

    lower by X       the system is better than the baseline by more than X: yes, if the whole interval is; no, if none of it is
    within X         the system is no more than X worse
    beyond X         the system is more than X worse (for arms that have to fail)
    recovers SHARE   of what `untrained` loses against `parent`, the system loses at most 1 - SHARE against its baseline

X is in points, or, with a percent sign, relative to the baseline's WER.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, whatever is installed

from asrkit.config import config
from asrkit.errors import UserError
from asrkit.reporting.machine import processor
from asrkit.run_dir import CONFIG, read_yaml
from asrkit.stages.compare import compare_runs

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "results" / "claims.yaml"
RESULTS = ROOT / "docs" / "results" / "claims.json"
TABLE = re.compile(r"(<!-- claims -->\n).*?(<!-- end -->)", re.DOTALL)


@config
class Claim:
    """One row.

    source, claim, setting: in words. system, baseline, untrained, parent: run directories below EXP; the last two with "recovers" only.
    search: a pattern of the evaluation's name. rule: see above. note: why it is open, or what else to know.
    """

    source: str
    claim: str
    setting: str
    system: str
    baseline: str
    rule: str
    untrained: str = ""
    parent: str = ""
    search: str = "*-full-beam4"
    note: str = ""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What has to be compared: a system and its baseline, and so for what it is measured by."""
        return [(self.system, self.baseline), *([(self.untrained, self.parent)] if self.untrained else [])]


def claims() -> list[Claim]:
    """The rows, in their order."""
    return [Claim(**row) for row in yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))]


def key(system: str, baseline: str, search: str) -> str:
    return f"{system} - {baseline} [{search}]"


def collect(exp: Path) -> None:
    """Compare every pair that has been evaluated; the others keep what was stored before."""
    wanted = {key(*pair, claim.search) for claim in claims() for pair in claim.pairs}
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results = {name: row for name, row in stored.items() if name in wanted}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for claim in claims():
        for system, baseline in claim.pairs:
            try:
                [row] = compare_runs(
                    [str(exp / baseline), str(exp / system)], by="utterance", evaluation=[claim.search]
                )
            except UserError as error:
                print(f"{system}: {error}", file=sys.stderr)
                continue
            settings = read_yaml(exp / system / CONFIG)
            results[key(system, baseline, claim.search)] = {
                "words": row.words,
                "baseline_wer": row.baseline_wer,
                "wer": row.wer,
                "difference": row.difference,
                "interval_95": list(row.interval_95),
                "p_mapsswe": row.p_mapsswe,
                "steps": settings.get("training", {}).get("steps"),
                "seed": settings.get("seed"),
                "commit": commit.stdout.strip(),
                "machine": processor(),
            }
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")


def decided(claim: Claim, results: dict[str, Any]) -> tuple[str, float]:
    """``yes``, ``no``, ``open`` or ``not run``, and the difference that decides, as a fraction.

    Raises:
        ValueError: the rule is none of the above.
    """
    rule = re.fullmatch(r"(lower by|within|beyond|recovers) (\d+(?:\.\d+)?)(%?)", claim.rule)
    if rule is None:
        raise ValueError(f"{claim.rule}: is no rule")
    row = results.get(key(claim.system, claim.baseline, claim.search))
    untrained = results.get(key(claim.untrained, claim.parent, claim.search))
    kind, limit = rule[1], float(rule[2]) / 100
    if row is None or (kind == "recovers" and untrained is None):
        return "not run", 0.0
    low, high = row["interval_95"]
    if untrained is not None:
        limit = (1 - limit) * untrained["difference"]
    elif rule[3]:
        limit *= row["baseline_wer"]
    if kind == "lower by":
        limit = -limit
    below, above = high < limit, low > limit
    holds, fails = (above, below) if kind == "beyond" else (below, above)
    return "yes" if holds else "no" if fails else "open", limit


def rows() -> Iterator[str]:
    """The table in Markdown."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    yield "| source | claim | our setting | WER % | difference, points | decides | holds | note |"
    yield "|---|---|---|---|---|---|---|---|"
    for claim in claims():
        row = results.get(key(claim.system, claim.baseline, claim.search))
        (verdict, limit), numbers = decided(claim, results), ("", "", "")
        if row is not None:
            low, high = row["interval_95"]
            rates = f"{100 * row['baseline_wer']:.2f} → {100 * row['wer']:.2f}"
            if untrained := results.get(key(claim.untrained, claim.parent, claim.search)):
                rates += f"; untrained {100 * untrained['baseline_wer']:.2f} → {100 * untrained['wer']:.2f}"
            numbers = (
                rates,
                f"{100 * row['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
                f"{100 * limit:+.2f}",
            )
        cells = (claim.source, claim.claim, claim.setting, *numbers, verdict, claim.note)
        yield f"| {' | '.join(cells)} |"


def with_claims(text: str) -> str:
    """A document with its table of claims made anew."""
    return TABLE.sub(lambda match: match[1] + "\n".join(rows()) + "\n" + match[2], text)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "collect":
        sys.exit(__doc__)
    collect(Path(sys.argv[2]))
