"""The packages asrkit depends on: which these are, what is installed, and the commands that install them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

# What `pip install` calls a package, where the module has another name.
MODULES = {"PyYAML": "yaml", "piper-tts": "piper"}
# What an extra is for: the stage, the extra, the module that shows that it is there, and its use.
USES = (
    ("data synthesize", "synth", "espeakng_loader", "synthetic speech and phones by espeak-ng"),
    ("tensorboard", "tensorboard", "torch.utils.tensorboard", "training curves in TensorBoard"),
    ("report", "report", "jinja2", "reports to look at and to listen to"),
    ("export", "export", "onnx", "ONNX files for sherpa-onnx"),
    ("exported models", "export", "onnxruntime", "evaluate and transcribe by onnxruntime"),
    ("replicas", "ray", "ray", "training by replicas on several processors or machines"),
    ("natural voices", "piper", "piper", "synthetic speech by Piper, from voices as files"),
    ("label, whisper", "whisper", "faster_whisper", "labels by any recognizer, Whisper to evaluate and as a teacher"),
    ("label, sherpa-onnx", "sherpa", "sherpa_onnx", "models of others to label with and to evaluate"),
)
K2_WHEEL = "k2==1.23.4 --hash=sha256:5b5f709b12b9cd092b583984d0b7d940c9f898101259c998d68d1f4adefa48d4"
K2_WHEEL_TORCH = "1.13.1"
# (torch's CUDA or not) -> the page k2's own wheels are linked from.
K2_PAGES = {True: "https://k2-fsa.github.io/k2/cuda.html", False: "https://k2-fsa.github.io/k2/cpu.html"}


@dataclass(frozen=True)
class Requirement:
    """A dependency of asrkit: ``extra`` is empty when asrkit always needs it."""

    name: str
    minimum: str
    extra: str

    @property
    def module(self) -> str:
        return MODULES.get(self.name, self.name.replace("-", "_"))

    @property
    def install(self) -> str:
        return pip_install(f"'{self.name}>={self.minimum}'" if self.minimum else self.name)


def pip_install(what: str) -> str:
    """The command that installs ``what`` into the Python that runs now."""
    return f"{sys.executable} -m pip install {what}"


def version_tuple(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> ``(2, 13, 0)``: the leading numbers, which is all that lower bounds compare."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def requirements() -> list[Requirement]:
    """asrkit's own dependencies, from pyproject.toml beside a checkout or else from the installed package.

    A checkout moves on under an editable installation, whose metadata stays as it was.
    """
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {}) if pyproject.is_file() else {}
    if project.get("name") == "asrkit":  # in site-packages it would be a file some other package left there
        lines = list(project["dependencies"])
        for extra, names in project["optional-dependencies"].items():
            lines += [f'{name}; extra == "{extra}"' for name in names]
    else:
        lines = importlib.metadata.requires("asrkit") or []
    needed = []
    for line in lines:
        match = re.match(r"([\w.-]+)(?:\s*>=\s*([\d.]+))?", line)
        extra_of = re.search(r"""extra == ['"]([\w-]+)['"]""", line)
        if match:
            needed.append(Requirement(match[1], match[2] or "", extra_of[1] if extra_of else ""))
    return needed


def k2_built_for() -> str:
    """The torch version an installed k2 was built for, read without importing it; empty when unknown."""
    spec = importlib.util.find_spec("k2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "torch_version.py"
        match = re.search(r'^k2_torch_version = "([\d.]+)', file.read_text(), re.M) if file.is_file() else None
        if match:
            return match[1]
    match = re.search(r"torch(\d+\.\d+\.\d+)", installed_version("k2"))  # 1.24.4.dev20250715+cpu.torch2.7.1
    return match[1] if match else ""


def k2_command() -> str:
    """How to get the k2 that matches the installed torch."""
    torch_version = installed_version("torch").partition("+")[0]
    if torch_version == K2_WHEEL_TORCH and sys.version_info[:2] == (3, 11):
        tools = pip_install("'pip<24' graphviz")
        wheel = pip_install("--no-deps --require-hashes -r /dev/stdin")
        return f"{tools} && echo '{K2_WHEEL}' | {wheel}"
    if not torch_version:
        return "make setup ENV=k2"
    cuda = import_error("torch") is None and importlib.import_module("torch").version.cuda is not None
    page = K2_PAGES[cuda]
    install = f"{pip_install(f'--no-deps k2==VERSION -f {page}')} && {pip_install('graphviz')}"
    return f"make setup ENV=k2; or find the VERSION for torch {torch_version} on {page}, then {install}"


def import_error(module: str) -> BaseException | None:
    """Import a module; what it raised, whatever that was, or None."""
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a package's import may raise anything, SystemExit included
        return error
    return None


def installed_version(distribution: str) -> str:
    """The version of an installed distribution; empty where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
