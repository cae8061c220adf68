"""The models of a report, and their evaluations by test set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from asrkit.config import digest
from asrkit.errors import clip
from asrkit.reporting.compare import Comparison, System, compare, corrected
from asrkit.reporting.evaluations import load_system, matched
from asrkit.reporting.results import Result, manifest_name


@dataclass(frozen=True)
class Model:
    """A run directory, an exported model, or a single evaluation of something else.

    name: what the report calls it. stage: None of a single evaluation. size: (variant, method) -> bytes; None where they are not known.
    default: the variant that its last stage trained.
    """

    name: str
    path: Path
    stage: str | None
    lineage: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    size: Callable[[str, str], int] | None
    seconds: float | None = None
    default: str | None = None
    evaluations: Mapping[Path, Result] = field(default_factory=dict)

    @cached_property
    def keys(self) -> list[str]:
        """``key_of`` every stage it went through, its own last."""
        return [key_of(entry) for entry in self.lineage]


def key_of(entry: Mapping[str, Any]) -> str:
    """What tells a stage's entry in a lineage from all others: its model and what it was told, as twelve hexadecimal digits."""
    known = ("stage", "weights_sha256", "arpa_sha256", "model_spec_sha256", "config_sha256")
    return digest([str(entry.get(name)) for name in known])[:12]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell it from the others; without control characters."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = [clip("/".join(part[-length:])) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [clip(path) for path in paths]


@dataclass(frozen=True)
class Measured:
    """A model in one evaluation. ``main`` marks the one that stands for its model where one has to."""

    model: Model
    directory: Path
    result: Result
    label: str
    system: System
    main: bool = False

    @cached_property
    def bytes(self) -> int | None:
        return None if self.model.size is None else self.model.size(self.result.variant, self.result.method)

    @property
    def errors(self) -> list[int]:
        """Of each utterance."""
        return [utterance.words.errors for utterance in self.system.utterances]


@dataclass(frozen=True)
class TestSet:
    """A manifest and every evaluation on it, in the order of the models; all have the same utterances in the same order."""

    __test__ = False  # pytest: no test

    manifest: str
    sha256: str | None
    systems: list[Measured]
    changes: Mapping[
        str, Comparison
    ]  # by a main system's label: against the model it was made from, or else the one before

    @property
    def name(self) -> str:
        return manifest_name(self.manifest)

    @property
    def main(self) -> list[Measured]:
        return [system for system in self.systems if system.main]


def test_sets(models: Sequence[Model]) -> list[TestSet]:
    """The evaluations of all models, by the manifest that was decoded; the set that most models were evaluated on comes first.

    Raises:
        UserError: utterances are damaged, or differ although the manifest is the same.
    """
    groups: dict[str, list[tuple[Model, Path, Result]]] = {}
    for model in models:
        for directory, result in model.evaluations.items():
            groups.setdefault(result.manifest_sha256 or result.manifest, []).append((model, directory, result))
    made = []
    for found in sorted(groups.values(), key=lambda found: -len({model.name for model, _, _ in found})):
        systems = matched([load_system(str(directory), [directory]) for _, directory, _ in found])
        named = [
            Measured(model, directory, result, label, replace(system, name=label))
            for (model, directory, result), label, system in zip(found, _labels(found), systems, strict=True)
        ]
        chosen = _with_main(named)
        result = found[0][2]
        made.append(TestSet(result.manifest, result.manifest_sha256, chosen, _changes(chosen)))
    return made


test_sets.__test__ = False  # type: ignore[attr-defined]


def _labels(found: Sequence[tuple[Model, Path, Result]]) -> list[str]:
    """The model's name, and what tells its evaluations apart: variant, context and search, else the names of their directories."""
    labels = []
    for model, _, result in found:
        own = [other for one, _, other in found if one is model]
        told = [
            getattr(result, key)
            for key in ("variant", "context", "search")
            if len({getattr(other, key) for other in own}) > 1
        ]
        labels.append(", ".join([model.name, *told]))
    alike = Counter(labels)
    return [
        label if alike[label] == 1 else f"{model.name}, {directory.name}"
        for label, (model, directory, _) in zip(labels, found, strict=True)
    ]


def _with_main(systems: Sequence[Measured]) -> list[Measured]:
    """Mark one system of each model: of the search that most models have, in the variant that was trained last."""
    having = Counter(search for _, search in {(one.model.name, one.result.search) for one in systems})
    rank = sorted(having, key=lambda search: (-having[search], not search.startswith("beam"), search))
    best: dict[str, Measured] = {}
    for one in systems:
        if one.model.name not in best or _preference(one, rank) < _preference(best[one.model.name], rank):
            best[one.model.name] = one
    return [replace(one, main=best[one.model.name] is one) for one in systems]


def _preference(one: Measured, rank: Sequence[str]) -> tuple[int, bool]:
    return rank.index(one.result.search), one.result.variant != one.model.default


def _changes(systems: Sequence[Measured]) -> dict[str, Comparison]:
    """Each main system against the nearest model that it was made from, or else the one before it; p-values are corrected."""
    main = [one for one in systems if one.main]
    if not main or sum(count > 0 for count in main[0].system.words) < 2:  # one utterance shows nothing
        return {}
    labels, rows = [], []
    for number, one in enumerate(main[1:], 1):
        before = _ancestor(one, main[:number] + main[number + 1 :]) or main[number - 1]
        labels.append(one.label)
        rows += compare(before.system, [one.system])
    return dict(zip(labels, corrected(rows), strict=True))


def _ancestor(one: Measured, others: Sequence[Measured]) -> Measured | None:
    """The other whose weights come last in the lineage of ``one``."""
    ends = {other.model.keys[-1]: other for other in others if other.model.lineage}
    return next((ends[key] for key in reversed(one.model.keys[:-1]) if key in ends), None)


def described(one: Measured) -> str:
    """A system's numbers in a line."""
    result, parts = one.result, [one.label]
    if result.total.wer is not None:
        parts.append(f"WER {100 * result.total.wer:.2f} %")
    if result.total.wer_95 is not None:
        parts.append(f"95 % {100 * result.total.wer_95[0]:.2f} to {100 * result.total.wer_95[1]:.2f}")
    if one.bytes is not None:
        parts.append(f"{one.bytes:,} bytes")
    parts.append(f"RTF {result.real_time_factor:.4f} ({result.device}, {result.threads} thread(s))")
    return ", ".join(parts)
