"""summary: one table of what a chain of stages achieved, on the screen and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asrkit.errors import UserError
from asrkit.reporting.results import read_results
from asrkit.run_dir import WEIGHTS, atomic_write, open_run, sha256_of


def summarise_runs(runs: Sequence[Path], out: Path | None = None) -> list[dict[str, Any]]:
    """A row for each evaluation of each run, the runs in the order given, optionally written to ``out`` as JSON.

    A row holds stage, configuration and context (those evaluated), manifest, method, wer, cer (fractions), words, bytes
    of the weights, seconds the stage took, real_time_factor of the decoding.

    Raises:
        UserError: a run is incomplete or damaged, or was not evaluated with its present weights.
    """
    rows, findings = [], []
    for path in runs:
        run = open_run(path)
        entry, present = run.lineage[-1], sha256_of(path / WEIGHTS)
        current = [result for result in read_results(path) if result["weights_sha256"] == present]
        if not current:
            findings.append(
                f"{path}: not evaluated with its present weights; run `asrkit evaluate --from {path} --manifest ...`"
            )
        for result in current:
            rows.append(
                {
                    "stage": entry["stage"],
                    "configuration": result["configuration"],
                    "context": result["context"],
                    "manifest": Path(result["manifest"]).name.split(".")[0],
                    "method": result["method"],
                    "wer": result["total"]["wer"],
                    "cer": result["total"]["cer"],
                    "words": result["total"]["words"],
                    "bytes": (path / WEIGHTS).stat().st_size,
                    "seconds": entry["seconds"],
                    "real_time_factor": result["real_time_factor"],
                }
            )
    if findings:
        raise UserError.of(findings)
    if out is not None:
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(rows, indent=2) + "\n")
    return rows
