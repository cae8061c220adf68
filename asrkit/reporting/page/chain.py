"""How the models of a report came about: the tree of their stages, and the settings that differ from the defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asrkit.reporting.page.systems import Model, key_of

# Of config.yaml: what is shown elsewhere.
NOT_SETTINGS = ("stage", "inputs", "from_weights_sha256")
Defaults = Callable[[str], Mapping[str, Any] | None]


@dataclass
class Stage:
    """A stage in the tree: its entry in the lineage, the model if it is one of the report's, and the stages that start from it."""

    entry: Mapping[str, Any]
    model: Model | None = None
    settings: list[tuple[str, str, str]] = field(default_factory=list)
    left_out: Mapping[str, str] = field(default_factory=dict)
    children: list[Stage] = field(default_factory=list)

    def walk(self) -> Iterator[Stage]:
        """This stage and all after it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def stage_trees(
    models: Sequence[Model], defaults: Defaults, left_out: Callable[[Path], Mapping[str, str]]
) -> list[Stage]:
    """The stages of all models, each once, as trees.

    Args:
        defaults: from a command to its settings' defaults, as nested plain values; None where they are not known.
        left_out: from a run directory to the cuts that were left out of its training, and why.
    """
    roots: list[Stage] = []
    for model in models:
        siblings, stage = roots, None
        for entry in model.lineage:
            key = key_of(entry)
            stage = next((known for known in siblings if key_of(known.entry) == key), None)
            if stage is None:
                stage = Stage(entry)
                siblings.append(stage)
            siblings = stage.children
        if stage is not None and stage.model is None:
            stage.model = model
            stage.settings = changed_settings(model.config, defaults(str(stage.entry.get("stage"))))
            stage.left_out = left_out(model.path)
    return roots


def changed_settings(config: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """(key, default, value) of the settings of a run that differ from the defaults; all of it where no default is known.
    What is no setting but an argument of the command has no default."""
    plain = dict(_leaves(defaults or {}))
    return [
        (key, _shown(plain[key]) if key in plain else "", _shown(value))
        for key, value in _leaves(config)
        if key.partition(".")[0] not in NOT_SETTINGS and plain.get(key) != value
    ]


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    """As YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
