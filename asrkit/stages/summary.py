"""summary: one table of what a chain of stages achieved, on the screen and as JSON. Read from files, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asrkit.config import to_dict
from asrkit.disk import atomic_write
from asrkit.errors import UserError
from asrkit.export.evaluated import open_evaluated
from asrkit.reporting.compare import compare, corrected
from asrkit.reporting.evaluations import counterpart, current_evaluations, load_system, matched
from asrkit.reporting.results import Result, manifest_name


def summarize_runs(runs: Sequence[Path], out: Path | None = None, baseline: Path | None = None) -> list[dict[str, Any]]:
    """A row for each evaluation of each run, the runs in the order given, optionally written to ``out`` as JSON.

    A row holds stage, variant and context (those evaluated), manifest (its name), manifest_sha256, method, beam,
    search (both, and what else counted, such as a language model), wer, cer
    (fractions), words, insertions, bytes (of what that variant and method need to recognize, as `asrkit info` counts them; of an
    exported model those of its files), seconds the stage took (None of an export), real_time_factor of the decoding, and
    comparison: what `asrkit compare` says of it and the evaluation of ``baseline`` on the same manifest by the same search, without
    the parts; None where there is no such evaluation, or where it is this very one.

    Raises:
        UserError: a run is incomplete or damaged, or was not evaluated with its present weights.
    """
    rows: list[dict[str, Any]] = []
    evaluations: list[tuple[Path, Result]] = []
    findings: list[str] = []
    for path in runs:
        system = open_evaluated(path)
        try:
            current = current_evaluations(path)
        except UserError as error:
            findings += error.lines
            continue
        for directory, result in current.items():
            evaluations.append((directory, result))
            rows.append(
                {
                    "stage": system.stage,
                    "variant": result.variant,
                    "context": result.context,
                    "manifest": manifest_name(result.manifest),
                    "manifest_sha256": result.manifest_sha256,
                    "method": result.method,
                    "beam": result.beam,
                    "search": result.search,
                    "wer": result.total.wer,
                    "cer": result.total.cer,
                    "words": result.total.words,
                    "insertions": result.total.insertions,
                    "bytes": system.size(result.variant, result.method),
                    "seconds": system.seconds,
                    "real_time_factor": result.real_time_factor,
                    "comparison": None,
                }
            )
    if findings:
        raise UserError.of(findings)
    if baseline is not None:
        _compare(rows, evaluations, baseline)
    if out is not None:
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def _compare(rows: Sequence[dict[str, Any]], evaluations: Sequence[tuple[Path, Result]], baseline: Path) -> None:
    """Put each row's comparison with the baseline in it; p-values are corrected for the number of them."""
    candidates = current_evaluations(baseline)
    compared, comparisons = [], []
    for row, (directory, result) in zip(rows, evaluations, strict=True):
        against = counterpart(result, candidates)
        if against is not None and against.resolve() != directory.resolve():
            first, second = matched([load_system(str(path), [path]) for path in (against, directory)])
            if sum(count > 0 for count in first.words) < 2:  # one utterance shows nothing
                continue
            compared.append(row)
            comparisons += compare(first, [second])
    for row, comparison in zip(compared, corrected(comparisons), strict=True):
        content = to_dict(comparison)
        row["comparison"] = {
            key: value for key, value in content.items() if not isinstance(value, list) or key == "interval_95"
        }
