"""Run directories of earlier versions, as today's code reads them: one function for each format number of model.yaml.

A migration happens in memory when a run directory is opened, after its files were checked against their digests; nothing on disk changes.
config.yaml is not migrated: a run can be used by later stages, but not resumed by a version that writes another format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FORMAT = 1  # of the run directories this version writes


@dataclass(frozen=True)
class Migrated:
    """What a run directory holds, in today's words.

    ``model``: model.yaml, with the keys ``format``, ``kind`` and ``spec``. ``rename``: from the name of a tensor in the file to today's.
    """

    model: dict[str, Any]
    lineage: list[dict[str, Any]]
    rename: Callable[[str], str]


def migrate(model: dict[str, Any], lineage: list[dict[str, Any]]) -> Migrated:
    """Bring a run directory of any earlier format, one number after the other, to the present one.

    Raises:
        KeyError, TypeError, AttributeError: it is of no format this version knows.
    """
    renames: list[Callable[[str], str]] = []
    while (number := model.get("format", 0)) != FORMAT:
        step = MIGRATIONS[number](model, lineage)
        model, lineage = step.model, step.lineage
        renames.append(step.rename)

    def rename(name: str) -> str:
        for each in renames:
            name = each(name)
        return name

    return Migrated(model, lineage, rename)


def from_format_0(model: dict[str, Any], lineage: list[dict[str, Any]]) -> Migrated:
    """Format 0 had the spec alone in model.yaml, without a number or a kind, in British spelling, and called variants configurations."""
    spec = dict(model)
    kind = "lm" if "unit" in spec else "asr"
    if kind == "asr":
        spec["submodels"] = {name: _moved(part, "place", "position") for name, part in spec["submodels"].items()}
        spec["compression"] = {path: _recentered(how) for path, how in spec["compression"].items()}
        spec = _moved(_moved(spec, "configurations", "variants"), "configuration", "variant")
    stages = {"quantise": "quantize"}
    entries = [{**entry, "stage": stages.get(entry.get("stage", ""), entry.get("stage"))} for entry in lineage]
    prefix = "encoder.normalise."
    return Migrated(
        {"format": 1, "kind": kind, "spec": spec},
        entries,
        lambda name: f"encoder.normalize.{name.removeprefix(prefix)}" if name.startswith(prefix) else name,
    )


def migrate_result(result: dict[str, Any]) -> dict[str, Any]:
    """result.json of an evaluation, in today's words: runs of format 0 have configurations in it."""
    return _moved(result, "configuration", "variant") if "variant" not in result else result


def _moved(content: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The same with one key renamed, in its position."""
    return {new if key == old else key: value for key, value in content.items()}


def _recentered(how: dict[str, Any]) -> dict[str, Any]:
    weights = how.get("weights")
    if weights and weights.get("bound") == "centre":
        return {**how, "weights": {**weights, "bound": "center"}}
    return how


MIGRATIONS: dict[int, Callable[[dict[str, Any], list[dict[str, Any]]], Migrated]] = {0: from_format_0}
