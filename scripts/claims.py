"""The table of claims in docs/results.md, from result files: nobody copies a number by hand.

    python scripts/claims.py collect EXP     compare the evaluated runs below EXP that docs/results/claims.yaml names, and store what comes out
    make generated                           write the table anew

A claim is decided by the 95 % interval of a difference over utterances (WER: paired bootstrap; means of words: the delta method), or,
where systems should be alike, by the 90 % interval of two one-sided tests, as `asrkit compare --margin` does it:

    lower by X       the system is lower than the baseline by more than X: yes, if the whole interval is; no, if none of it is
    gains X          the system is lower at all: yes, if the whole interval is below 0; no, if none of it is lower by X, which would matter
    higher by X      the system is higher by more than X
    within X         the system is no more than X worse
    beyond X         the system is more than X worse (for negative controls)
    recovers SHARE   of what `untrained` loses against `parent`, the system loses at most 1 - SHARE against its baseline

X is in points, or milliseconds of latency; with a percent sign it is relative to the baseline's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, whatever is installed

from asrkit.config import config, from_dict
from asrkit.data.alignment import Annotator
from asrkit.data.manifests import open_cuts
from asrkit.errors import UserError
from asrkit.methods.lm_distillation.config import DistillLmConfig
from asrkit.methods.lm_distillation.loss import frame_counts
from asrkit.methods.lm_distillation.teachers import inventories_of, load_lm_teacher
from asrkit.models.registry import ASR, build, spec_of_kind
from asrkit.reporting.evaluations import find_evaluation
from asrkit.reporting.machine import processor
from asrkit.reporting.results import read_utterances
from asrkit.reporting.significance import Estimate
from asrkit.run_dir import CONFIG, open_run, read_yaml
from asrkit.stages.compare import compare_runs

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "results" / "claims.yaml"
RESULTS = ROOT / "docs" / "results" / "claims.json"
TABLE = re.compile(r"(<!-- claims -->\n).*?(<!-- end -->)", re.DOTALL)

Metric = Literal["WER", "latency", "frames"]
SCALES = {
    "WER": 100.0,
    "latency": 1.0,
    "frames": 100.0,
}  # what a stored number is multiplied by to be shown, and a rule's X divided by
NARROWER = 0.84  # a 90 % interval against a 95 % one, with 200 utterances or more
UNITS = {"WER": "", "latency": " ms", "frames": " % of frames"}


@config
class Claim:
    """One row.

    source, claim, setting: in words. system, baseline, untrained, parent: run directories below EXP; the last two with "recovers" only.
    search: a pattern of the evaluation's name. metric: WER; latency, how late rightly recognized words are known; or frames, the share
    of the dev cuts' frames that the supervised head of distill-lm has right. rule: see above.
    note: why it is open, or what else to know.
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
    metric: Metric = "WER"
    note: str = ""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What has to be compared: a system and its baseline, and so for what it is measured by."""
        return [(self.system, self.baseline), *([(self.untrained, self.parent)] if self.untrained else [])]

    def result(self, results: dict[str, Any], system: str, baseline: str) -> dict[str, Any] | None:
        """What is stored of a pair."""
        row: dict[str, Any] | None = results.get(key(system, baseline, self.search, self.metric))
        return row


def claims() -> list[Claim]:
    """The rows, in their order."""
    return [Claim(**row) for row in yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))]


def key(system: str, baseline: str, search: str, metric: Metric = "WER") -> str:
    return f"{system} - {baseline} [{search}]{'' if metric == 'WER' else f' {metric}'}"


def compared(claim: Claim, system: Path, baseline: Path) -> dict[str, Any]:
    """Two evaluated runs: number of words, the baseline's rate or mean, the system's, the difference and its interval.

    Raises:
        UserError: one was not evaluated so.
    """
    if claim.metric == "WER":
        [row] = compare_runs([str(baseline), str(system)], by="utterance", evaluation=[claim.search])
        return {
            "words": row.words,
            "baseline": row.baseline_wer,
            "value": row.wer,
            "difference": row.difference,
            "interval_95": list(row.interval_95),
            "p_mapsswe": row.p_mapsswe,
        }
    if claim.metric == "latency":
        first, second = latencies(baseline, claim.search), latencies(system, claim.search)
    else:
        first, second = frames(baseline), frames(system)
    estimate = difference_of_means(first, second)
    return {
        "words": int(second[:, 1].sum()),
        "baseline": float(first[:, 0].sum() / first[:, 1].sum()),
        "value": float(second[:, 0].sum() / second[:, 1].sum()),
        "difference": estimate.difference,
        "interval_95": list(estimate.interval()),
        "p_mapsswe": None,
    }


def latencies(run: Path, search: str) -> np.ndarray:
    """(utterances, 2): the milliseconds by which the right words of each were late, summed, and their number.

    Raises:
        UserError: the run was not evaluated in chunks, on words whose times are known.
    """
    late = [utterance.late_ms for utterance in read_utterances(find_evaluation(run, [search]))]
    if not any(late):
        raise UserError(f"{run}: evaluation {search} has no emission latencies; evaluate it on an aligned manifest")
    return np.array([(sum(words), len(words)) for words in late])


def frames(run: Path) -> np.ndarray:
    """(utterances, 2): the frames of each dev cut that the supervised head of a run of distill-lm has right, and those that have a label.

    Raises:
        UserError: there is no such run, or what it learned from is gone.
    """
    opened = open_run(run)
    content = read_yaml(run / CONFIG)
    settings = from_dict(
        DistillLmConfig, {field.name: content[field.name] for field in fields(DistillLmConfig)}, CONFIG
    )
    model = build(spec_of_kind(opened, ASR))  # load_model leaves the heads out
    model.load_state_dict(opened.weights())
    manifest, dev = map(Path, list(opened.lineage[-1]["manifests"])[:2])
    teachers = {name: load_lm_teacher(Path(lm["path"])) for name, lm in content["lms"].items()}
    inventories = inventories_of(teachers, settings.supervised, open_cuts(manifest))
    annotator = Annotator(inventories, settings.repeats, settings.silence == "previous")
    return np.array(list(frame_counts(model.eval(), open_cuts(dev), annotator, settings).values()))


def difference_of_means(first: np.ndarray, second: np.ndarray) -> Estimate:
    """The second mean less the first, where each is a sum over a number, (utterances, 2), that differ from utterance to utterance.

    Its standard error is that of the mean's linear part over utterances (the delta method), those of both systems taken together.
    """
    parts = []
    for sums in (first, second):
        mean = sums[:, 0].sum() / sums[:, 1].sum()
        parts.append((mean, (sums[:, 0] - mean * sums[:, 1]) / sums[:, 1].sum()))
    (before, before_parts), (after, after_parts) = parts
    size = len(first)
    error = float(np.sqrt(np.square(after_parts - before_parts).sum() * size / (size - 1)))
    return Estimate(float(after - before), error, size - 1)


def collect(exp: Path) -> None:
    """Compare every pair that has been evaluated; the others keep what was stored before."""
    wanted = {key(*pair, claim.search, claim.metric) for claim in claims() for pair in claim.pairs}
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results = {name: row for name, row in stored.items() if name in wanted}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for claim in claims():
        for system, baseline in claim.pairs:
            try:
                row = compared(claim, exp / system, exp / baseline)
            except UserError as error:
                print(f"{system}: {error}", file=sys.stderr)
                continue
            settings = read_yaml(exp / system / CONFIG)
            results[key(system, baseline, claim.search, claim.metric)] = {
                **row,
                "steps": settings.get("training", {}).get("steps"),
                "seed": settings.get("seed"),
                "commit": commit.stdout.strip(),
                "machine": processor(),
            }
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")


def decided(claim: Claim, results: dict[str, Any]) -> tuple[str, float]:
    """``yes``, ``no``, ``open`` or ``not run``, and the difference that decides, as a fraction or in milliseconds.

    Raises:
        ValueError: the rule is none of the above.
    """
    rule = re.fullmatch(r"(lower by|gains|higher by|within|beyond|recovers) (\d+(?:\.\d+)?)(%?)", claim.rule)
    if rule is None:
        raise ValueError(f"{claim.rule}: is no rule")
    row = claim.result(results, claim.system, claim.baseline)
    untrained = claim.result(results, claim.untrained, claim.parent)
    kind, limit = rule[1], float(rule[2]) / (100 if rule[3] else SCALES[claim.metric])
    if row is None or (kind == "recovers" and untrained is None):
        return "not run", 0.0
    low, high = row["interval_95"]
    if untrained is not None:
        limit = (1 - limit) * untrained["difference"]
    elif rule[3]:
        limit *= row["baseline"]
    if kind in ("lower by", "gains"):
        limit = 0 - limit  # and not -0
    if kind == "within":
        middle = (low + high) / 2
        low, high = middle + NARROWER * (low - middle), middle + NARROWER * (high - middle)
    below, above = high < (0 if kind == "gains" else limit), low > limit
    holds, fails = (above, below) if kind in ("beyond", "higher by") else (below, above)
    return "yes" if holds else "no" if fails else "open", limit


def rows() -> Iterator[str]:
    """The table in Markdown."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    yield "| source | claim | our setting | steps | WER %, or as named | difference, points | threshold | holds | note |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for claim in claims():
        row = claim.result(results, claim.system, claim.baseline)
        scale, unit = SCALES[claim.metric], UNITS[claim.metric]
        (verdict, limit), numbers = decided(claim, results), ("", "", "", "")
        if row is not None:
            low, high = row["interval_95"]
            rates = f"{scale * row['baseline']:.2f} → {scale * row['value']:.2f}{unit}"
            if untrained := claim.result(results, claim.untrained, claim.parent):
                rates += f"; untrained {scale * untrained['baseline']:.2f} → {scale * untrained['value']:.2f}"
            numbers = (
                str(row["steps"] or ""),
                rates,
                f"{scale * row['difference']:+.2f} [{scale * low:+.2f}, {scale * high:+.2f}]{unit}",
                f"{scale * limit:+.2f}{unit}",
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
