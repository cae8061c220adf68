"""summary: one table of what a chain of stages achieved, on the screen and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asrkit.errors import UserError
from asrkit.export.directory import SUFFIXES, is_exported, open_exported
from asrkit.export.graphs import CTC, DECODER, ENCODER, JOINER
from asrkit.models import load_model
from asrkit.models.sizes import sizes
from asrkit.reporting.results import manifest_name, read_results
from asrkit.run_dir import EXPORT, WEIGHTS, atomic_write, open_run, sha256_of


def summarize_runs(runs: Sequence[Path], out: Path | None = None) -> list[dict[str, Any]]:
    """A row for each evaluation of each run, the runs in the order given, optionally written to ``out`` as JSON.

    A row holds stage, variant and context (those evaluated), manifest (its name), manifest_sha256, method, beam, wer, cer
    (fractions), words, insertions, bytes (of what that variant and method need to recognize, as `asrkit info` counts them; of an
    exported model those of its files), seconds the stage took (None of an export), real_time_factor of the decoding.

    Raises:
        UserError: a run is incomplete or damaged, or was not evaluated with its present weights.
    """
    rows, findings = [], []
    for path in runs:
        system = _exported(path) if is_exported(path) else _trained(path)
        current = [result for result in read_results(path) if result.weights_sha256 == system.sha256]
        if not current:
            findings.append(
                f"{path}: was not evaluated with its present weights; run `asrkit evaluate --from {path} --manifest ...`"
            )
        for result in current:
            rows.append(
                {
                    "stage": system.stage,
                    "variant": result.variant,
                    "context": result.context,
                    "manifest": manifest_name(result.manifest),
                    "manifest_sha256": result.manifest_sha256,
                    "method": result.method,
                    "beam": result.beam,
                    "wer": result.total.wer,
                    "cer": result.total.cer,
                    "words": result.total.words,
                    "insertions": result.total.insertions,
                    "bytes": system.size(result.variant, result.method),
                    "seconds": system.seconds,
                    "real_time_factor": result.real_time_factor,
                }
            )
    if findings:
        raise UserError.of(findings)
    if out is not None:
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


@dataclass(frozen=True)
class _System:
    """What was evaluated; ``size`` takes a variant and a method to bytes."""

    stage: str
    sha256: str
    seconds: float | None
    size: Callable[[str, str], int]


def _trained(path: Path) -> _System:
    run = open_run(path)
    model, entry = load_model(run), run.lineage[-1]

    def size(variant: str, method: str) -> int:
        model.select(variant)
        unused = {f"submodel {name}" for name in set(model.spec.submodels) - set(model.submodels_of(variant))}
        unused |= {"predictor", "joiner"} if method == "ctc" else {"ctc_head"}
        return sum(part["bytes"] for name, part in sizes(model).items() if name not in unused)

    return _System(entry["stage"], sha256_of(path / WEIGHTS), entry["seconds"], size)


def _exported(path: Path) -> _System:
    exported = open_exported(path)

    def size(variant: str, method: str) -> int:
        wanted = (CTC,) if method == "ctc" else (ENCODER, DECODER, JOINER)
        return sum(exported.files[f"{file}{SUFFIXES[exported.format]}"].bytes for file in wanted)

    return _System("export", sha256_of(path / EXPORT), None, size)
