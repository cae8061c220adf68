"""Optional packages: one way to import one, or to say what is missing and how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

from asrkit.errors import UserError


class Extra(NamedTuple):
    """The module to import, what it is called in messages, and what to do where it is missing."""

    module: str
    title: str
    remedy: str


def _from_pip(module: str, title: str, extra: str, note: str = "") -> Extra:
    return Extra(module, title, f"run: pip install 'asrkit[{extra}]'{note}")


EXTRAS = {
    "k2": Extra("k2", "k2", "it must be built for this torch: `asrkit doctor` prints the command that installs it"),
    "onnx": _from_pip("onnx", "onnx", "export"),
    "onnxruntime": _from_pip("onnxruntime", "onnxruntime", "export"),
    "kaldifst": _from_pip("kaldifst", "kaldifst", "export"),
    "espeak": _from_pip("espeakng_loader", "espeak-ng", "synth", " (GPL-3)"),
    "piper": _from_pip("piper", "Piper", "piper", " (GPL-3)"),
    "whisper": _from_pip("faster_whisper", "faster-whisper", "whisper"),
    "sherpa": _from_pip("sherpa_onnx", "sherpa-onnx", "sherpa"),
    "tensorboard": _from_pip("torch.utils.tensorboard", "TensorBoard", "tensorboard"),
    "report": _from_pip("asrkit.reporting.page.render", "jinja2 and matplotlib", "report"),
    "ray": _from_pip("ray", "Ray", "ray"),
    "remote": _from_pip(
        "smart_open", "smart_open", "remote", " (object stores: smart_open[s3], smart_open[gcs] and the like too)"
    ),
}


def require(name: str, *, for_: str) -> ModuleType:
    """Import the package that ``EXTRAS`` has under ``name``; ``for_`` says what needs it, as in "export" or "phones".

    Raises:
        UserError: it is missing, or its import fails; says how to get it.
    """
    extra = EXTRAS[name]
    try:
        return importlib.import_module(extra.module)
    except ModuleNotFoundError as error:
        missing = "" if extra.module.startswith(f"{error.name}") or error.name is None else f" (no module {error.name})"
        raise UserError(f"{for_}: needs {extra.title}, which is not installed{missing}; {extra.remedy}") from error
    except Exception as error:  # compiled for another torch or numpy it may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{for_}: needs {extra.title}, which cannot be imported ({reason}); {extra.remedy}") from error


def available(name: str) -> bool:
    """Whether ``require`` would return."""
    try:
        require(name, for_="")
    except UserError:
        return False
    return True
