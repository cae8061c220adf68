"""Time as a test wants it, for one module."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest


def set_clock(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Callable[..., object]) -> None:
    """Replace functions of ``time`` in one module of asrkit. Patched in ``time`` itself, they would be so for the whole
    process, and whatever waits with a timeout meanwhile, in a finalizer or another thread, would wait for ever."""
    monkeypatch.setattr(f"{module}.time", SimpleNamespace(**{**vars(time), **functions}))
