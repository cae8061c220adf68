"""The table of claims in docs/results.md, from result files: nobody copies a number by hand.

    python scripts/claims.py collect EXP     compare the evaluated runs below EXP that docs/results/claims.yaml names, and store what comes out
    make generated                           write the table anew

A claim is decided by the 95 % interval of a difference over utterances (WER: paired bootstrap; means of words: the delta method), or,
where systems should be alike, by the 90 % interval of two one-sided tests, as `asrkit compare --margin` does it. Where a pair was
trained from several parents, the difference is the mean of theirs:

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
from asrkit.reporting.compare import System
from asrkit.reporting.evaluations import find_evaluation, load_system, matched
from asrkit.reporting.machine import processor
from asrkit.reporting.significance import Estimate, paired_bootstrap
from asrkit.run_dir import CONFIG, open_run, read_yaml

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
    parents: further parents of the pair, with WER only: SYSTEM-PARENT and BASELINE-PARENT of each count as SYSTEM and BASELINE do.
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
    parents: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if self.parents and self.metric != "WER":
            raise ValueError(f"{self.claim}: has parents, and is not measured by WER")

    def arms(self, name: str) -> list[str]:
        """The run directories of a system, one for each parent."""
        return [name, *(f"{name}-{parent}" for parent in self.parents)]

    def key(self, system: str, baseline: str) -> str:
        """What the result of a pair is stored under."""
        over = "".join(f" {parent}" for parent in self.parents)
        return f"{system} - {baseline} [{self.search}]{'' if self.metric == 'WER' else f' {self.metric}'}{over and ' and from' + over}"

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What has to be compared: a system and its baseline, and so for what it is measured by."""
        return [(self.system, self.baseline), *([(self.untrained, self.parent)] if self.untrained else [])]

    def result(self, results: dict[str, Any], system: str, baseline: str) -> dict[str, Any] | None:
        """What is stored of a pair."""
        row: dict[str, Any] | None = results.get(self.key(system, baseline))
        return row


def claims() -> list[Claim]:
    """The rows, in their order."""
    rows = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))
    return [Claim(**{**row, "parents": tuple(row.get("parents", ()))}) for row in rows]


def compared(claim: Claim, exp: Path, system: str, baseline: str) -> dict[str, Any]:
    """Two evaluated systems: number of words, the baseline's rate or mean, the system's, the difference and its interval.

    Raises:
        UserError: one was not evaluated so.
    """
    if claim.metric == "WER":
        first, second = map(word_errors, evaluated(claim, exp, system, baseline))
        estimate = paired_bootstrap(first[None, :, 0], second[None, :, 0], second[:, 1])
    else:
        if claim.metric == "latency":
            first, second = map(latencies, evaluated(claim, exp, system, baseline))
        else:
            first, second = frames(exp / baseline), frames(exp / system)
        estimate = difference_of_means(first, second)
    return {
        "words": int(second[:, 1].sum()),
        "baseline": float(first[:, 0].sum() / first[:, 1].sum()),
        "value": float(second[:, 0].sum() / second[:, 1].sum()),
        "difference": estimate.difference,
        "interval_95": list(estimate.interval()),
    }


def evaluated(claim: Claim, exp: Path, system: str, baseline: str) -> list[System]:
    """The baseline and the system, with an evaluation from each parent, and their utterances in one order.

    Raises:
        UserError: one was not evaluated so, or their references differ.
    """
    evaluations = {
        name: [find_evaluation(exp / arm, [claim.search]) for arm in claim.arms(name)] for name in (baseline, system)
    }
    return matched([load_system(name, found) for name, found in evaluations.items()])


def word_errors(system: System) -> np.ndarray:
    """(utterances, 2): the errors in each, the mean over parents, and its words."""
    return np.stack([system.errors.sum(2).mean(0), system.words], 1)


def latencies(system: System) -> np.ndarray:
    """(utterances, 2): the milliseconds by which the right words of each were late, summed, and their number.

    Raises:
        UserError: the run was not evaluated in chunks, on words whose times are known.
    """
    late = [utterance.late_ms for utterance in system.utterances]
    if not any(late):
        raise UserError(
            f"{system.name}: the evaluation has no emission latencies; evaluate the run on an aligned manifest"
        )
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
    counts = frame_counts(model.eval(), open_cuts(dev), annotator, settings)
    return np.array([counts[cut_id] for cut_id in sorted(counts)])


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
    wanted = {claim.key(*pair) for claim in claims() for pair in claim.pairs}
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results = {name: row for name, row in stored.items() if name in wanted}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for claim in claims():
        for system, baseline in claim.pairs:
            try:
                row = compared(claim, exp, system, baseline)
            except UserError as error:
                print(f"{system}: {error}", file=sys.stderr)
                continue
            settings = read_yaml(exp / system / CONFIG)
            results[claim.key(system, baseline)] = {
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
