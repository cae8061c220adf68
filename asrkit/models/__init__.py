"""From a spec to an ``nn.Module``.

The names below are imported when they are asked for: specs and sizes need no torch, which takes over a second to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asrkit.models.asr import AsrModel
    from asrkit.models.registry import load_model
    from asrkit.models.spec import SIZES, ModelSpec

__all__ = ["SIZES", "AsrModel", "ModelSpec", "load_model"]
_MODULES = {"SIZES": "spec", "AsrModel": "asr", "ModelSpec": "spec", "load_model": "registry"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
