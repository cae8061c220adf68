"""Optional packages that are there, missing or broken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from asrkit import extras
from asrkit.errors import UserError
from asrkit.extras import EXTRAS, Extra, available, require


def test_a_package_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "here", Extra("json", "JSON", "no way to miss it"))
    assert require("here", for_="a test").loads("[1]") == [1] and available("here")


@pytest.mark.parametrize("name", sorted(EXTRAS))
def test_what_is_missing_is_said_with_the_way_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXTRAS[name].module, None)
    with pytest.raises(UserError) as error:
        require(name, for_="a test")
    assert str(error.value) == f"a test: needs {EXTRAS[name].title}, which is not installed; {EXTRAS[name].remedy}"
    assert not available(name)


def test_a_broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for another torch, it raises OSError; or what it imports itself is missing."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, source, reason in (
        (
            "broken_one",
            "raise OSError('undefined symbol:\\n_ZN5torch')",
            "cannot be imported (undefined symbol: _ZN5torch)",
        ),
        ("broken_two", "import not_there_at_all", "is not installed (no module not_there_at_all)"),
    ):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setitem(extras.EXTRAS, "broken", Extra(name, "It", "run: x"))
        with pytest.raises(UserError) as error:
            require("broken", for_="a test")
        assert str(error.value) == f"a test: needs It, which {reason}; run: x"
