"""What can be evaluated, as those who read evaluations see it: a trained run directory, an exported directory, or, by the directory of
its evaluation, an external recognizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.export.directory import CTC, DECODER, ENCODER, JOINER, SUFFIXES, is_exported, open_exported
from asrkit.models.registry import spec_of
from asrkit.models.sizes import stored_sizes
from asrkit.models.spec import ModelSpec
from asrkit.reporting.results import is_external_evaluation, read_result
from asrkit.run_dir import EXPORT, RunDir, open_run


@dataclass(frozen=True)
class Evaluated:
    """A model on disk.

    seconds: what its last stage took; None of an export. size: (variant, method) -> bytes of what that needs to recognize: as `asrkit info`
    counts them, of others those of their files. lineage: every stage from the first, an export included; [] of an external recognizer,
    whose name is the stage. run, spec: None of others than run directories.
    """

    path: Path
    stage: str
    seconds: float | None
    size: Callable[[str, str], int]
    lineage: list[dict[str, Any]]
    run: RunDir | None = None
    spec: ModelSpec | None = None


def open_evaluated(path: Path) -> Evaluated:
    """Read a run directory of a recognizer, an exported directory, or a recognizer's evaluation, without the weights.

    Raises:
        UserError: it is incomplete or damaged, or holds no recognizer.
    """
    if is_external_evaluation(path):
        result = read_result(path)
        return Evaluated(path, result.run, None, lambda variant, method: result.model_bytes or 0, [])
    return _exported(path) if is_exported(path) else _trained(path)


def _trained(path: Path) -> Evaluated:
    run = open_run(path)
    spec, entry = spec_of(run), run.lineage[-1]

    def size(variant: str, method: str) -> int:
        if variant not in spec.variants:
            raise UserError(
                f"{path}: has an evaluation of variant {variant}, but no such variant; delete the evaluation"
            )
        unused = {f"submodel {name}" for name in set(spec.submodels) - set(spec.variants[variant].submodels)}
        unused |= {"predictor", "joiner"} if method.startswith("ctc") else {"ctc_head"}
        return sum(part["bytes"] for name, part in stored_sizes(run, spec, variant).items() if name not in unused)

    return Evaluated(path, entry["stage"], entry.get("seconds"), size, run.lineage, run, spec)


def _exported(path: Path) -> Evaluated:
    exported = open_exported(path)

    def size(variant: str, method: str) -> int:
        wanted = (CTC,) if method.startswith("ctc") else (ENCODER, DECODER, JOINER)
        return sum(exported.files[f"{file}{SUFFIXES[exported.format]}"].bytes for file in wanted)

    entry = {"stage": "export", "weights_sha256": sha256_of(path / EXPORT), "versions": exported.versions}
    return Evaluated(path, "export", None, size, [*exported.run.lineage, entry])
