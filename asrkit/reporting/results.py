"""What ``evaluate`` left in a run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asrkit.errors import UserError

NEEDED = ("manifest", "variant", "context", "method", "total", "real_time_factor", "weights_sha256")


def read_results(run: Path) -> list[dict[str, Any]]:
    """Every result.json below ``evaluation/``, in the order of the directories' names.

    Raises:
        UserError: a file is damaged, or of a version that knew no variants.
    """
    results, findings = [], []
    for file in sorted(run.glob("evaluation/*/result.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            missing = [key for key in NEEDED if key not in result]
            missing += [f"total.{key}" for key in ("wer", "cer", "words") if key not in result.get("total", {})]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            findings.append(f"{file}: not a result of evaluate ({error}); delete its directory and evaluate again")
            continue
        if missing:
            findings.append(f"{file}: has no {', '.join(missing)}; delete its directory and evaluate again")
        results.append(result)
    if findings:
        raise UserError.of(findings)
    return results
