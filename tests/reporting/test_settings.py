"""Every setting explains itself."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import asrkit
from asrkit.config import is_config
from asrkit.reporting.settings import field_docs

# Records that asrkit writes and reads back: nobody sets them.
RECORDS = (
    "asrkit.decoding.tuned.",
    "asrkit.export.directory.",
    "asrkit.models.ctc_graph.",
    "asrkit.reporting.compare.",
    "asrkit.reporting.results.",
)


def settings_classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(asrkit.__path__, "asrkit."):
        if module.name == "asrkit.__main__":
            continue
        for value in vars(importlib.import_module(module.name)).values():
            own = isinstance(value, type) and value.__module__ == module.name
            if own and is_config(value) and not f"{module.name}.{value.__name__}".startswith(RECORDS):
                yield value


@pytest.mark.parametrize("cls", list(settings_classes()), ids=lambda cls: cls.__name__)
def test_every_setting_has_a_docstring_under_its_field(cls: type) -> None:
    missing = [field.name for field in dataclasses.fields(cls) if not field_docs(cls).get(field.name)]  # type: ignore[arg-type]
    assert not missing, f"{cls.__module__}.{cls.__name__}: put a docstring under {', '.join(missing)}"
