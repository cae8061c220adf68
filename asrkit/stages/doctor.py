"""What this machine has, what each stage can use of it, and the exact command that would fix what is missing.

Every check is a small function that returns ``Check`` values and survives the absence of what it looks for.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from asrkit import mkl
from asrkit.reporting.machine import num_cores, processor

Status = Literal["ok", "absent", "broken"]

# What `pip install` calls a package, where the module has another name.
MODULES = {"PyYAML": "yaml"}
K2_WHEEL = "k2==1.23.4 --hash=sha256:5b5f709b12b9cd092b583984d0b7d940c9f898101259c998d68d1f4adefa48d4"
K2_WHEEL_TORCH = "1.13.1"
# (torch's CUDA or not) -> the page k2's own wheels are linked from.
K2_PAGES = {True: "https://k2-fsa.github.io/k2/cuda.html", False: "https://k2-fsa.github.io/k2/cpu.html"}
# The oldest torch built for numpy 2.
NUMPY_2_TORCH = (2, 3)


@dataclass(frozen=True)
class Check:
    """One finding; a ``required`` one that is not ok keeps asrkit from training. ``fix`` is a command."""

    group: Literal["machine", "packages", "stages"]
    name: str
    status: Status
    found: str
    fix: str = ""
    required: bool = False


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


def examine() -> list[Check]:
    """Run every check; takes a few seconds, as the packages are really imported."""
    needed = requirements()
    with _quiet():
        checks = [*machine(), *packages(needed), numpy_bridge(), k2()]
        return [*checks, *stages(checks, needed)]


def can_train(checks: list[Check]) -> bool:
    """Whether everything required is there and works."""
    return all(check.status == "ok" for check in checks if check.required)


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
    found = []
    for line in lines:
        match = re.match(r"([\w.-]+)(?:\s*>=\s*([\d.]+))?", line)
        extra_of = re.search(r"""extra == ['"]([\w-]+)['"]""", line)
        if match:
            found.append(Requirement(match[1], match[2] or "", extra_of[1] if extra_of else ""))
    return found


def machine() -> Iterator[Check]:
    """Python, the operating system, and the processor."""
    enough = sys.version_info >= (3, 11)
    yield Check(
        "machine",
        "python",
        "ok" if enough else "broken",
        f"{platform.python_version()} at {sys.executable}",
        "" if enough else "make setup PYTHON=/path/to/python3.11",
        required=True,
    )
    yield Check("machine", "system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Check("machine", "processor", "ok", processor())
    yield Check("machine", "threads", "ok", threads(os.environ.get("OMP_NUM_THREADS"), num_cores()))
    yield Check("machine", "matrix products", "ok", mkl.described())


def threads(asked: str | None, cores: int) -> str:
    """How many threads a process computes with on the CPU: ``OMP_NUM_THREADS`` where it is set."""
    if asked:
        return f"{asked} a process (OMP_NUM_THREADS)"
    return (
        f"{cores} for one process; torchrun gives each of several processes 1, unless OMP_NUM_THREADS says more "
        f"(export OMP_NUM_THREADS={max(1, cores // 2)} for two)"
    )


def packages(needed: list[Requirement]) -> Iterator[Check]:
    """Every package asrkit always needs, imported for real; then torch's GPU."""
    for requirement in needed:
        if not requirement.extra:
            yield package(requirement)
    yield gpu()


def package(requirement: Requirement) -> Check:
    """One required package: is it there, does it import, and is it new enough?"""
    version = _version(requirement.name)
    error = import_error(requirement.module)
    status: Status = "broken"
    found, fix = version or "unknown version", requirement.install
    if error is None:
        if not version or version_tuple(version) >= version_tuple(requirement.minimum):
            status, fix = "ok", ""
        else:
            found += f", older than {requirement.minimum}"
    elif not isinstance(error, ModuleNotFoundError):
        found += f" does not import: {_line(error)}"
        fix = pip_install(f"--force-reinstall --no-deps '{requirement.name}>={requirement.minimum}'")
    elif error.name == requirement.module:
        status, found = "absent", "not installed"
    else:  # a dependency the package does not declare
        found += f" does not import: {_line(error)}"
        fix = pip_install((error.name or requirement.name).partition(".")[0])
    return Check("packages", requirement.name, status, found, fix, required=True)


def numpy_bridge() -> Check:
    """torch and numpy share memory? An old torch beside numpy 2 imports, and fails at the first array."""
    name = "torch with numpy"
    if import_error("torch") is not None or import_error("numpy") is not None:
        return Check("packages", name, "absent", "untried without both", required=True)
    import numpy
    import torch

    try:
        torch.from_numpy(numpy.zeros(1)).numpy()
    except Exception as error:
        old = version_tuple(torch.__version__)[:2] < NUMPY_2_TORCH
        fix = pip_install("'numpy<2'" if old else "--force-reinstall numpy torch")
        found = f"torch {torch.__version__} cannot use numpy {numpy.__version__}: {_line(error)}"
        return Check("packages", name, "broken", found, fix, required=True)
    return Check("packages", name, "ok", "share memory", required=True)


def gpu() -> Check:
    """torch's GPU, and whether this torch has kernels for it."""
    if import_error("torch") is not None:
        return Check("machine", "gpu", "absent", "unknown without torch")
    import torch

    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return Check("machine", "gpu", "absent", f"none that torch ({build}) can use")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    major, minor = torch.cuda.get_device_capability()
    built_for = torch.cuda.get_arch_list()
    found = f"{', '.join(names)} (sm_{major}{minor}), CUDA {torch.version.cuda}"
    if not has_kernels((major, minor), built_for):
        found += f"; this torch has kernels for {' '.join(built_for)} only"
        return Check("machine", "gpu", "broken", found, "make setup ENV=modern, or install a newer torch")
    return Check("machine", "gpu", "ok", found)


def has_kernels(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a GPU runs code built for these architectures.

    Machine code (``sm_80``) runs on its major version from its minor on; PTX (``compute_80``)
    on all newer GPUs.
    """
    for arch in built_for:
        match = re.match(r"(sm|compute)_(\d+)(\d)", arch)
        if match:
            major, minor = int(match[2]), int(match[3])
            same_major = major == capability[0] and minor <= capability[1]
            if same_major or (match[1] == "compute" and (major, minor) <= capability):
                return True
    return False


def k2() -> Check:
    """k2, and the torch it was built for. Absent is fine: the loss then runs on torch alone."""
    version = _version("k2")
    if importlib.util.find_spec("k2") is None:
        return Check("packages", "k2", "absent", "not installed; the loss runs on torch alone", k2_command())
    wants = k2_built_for()
    described = f"{version or 'unknown version'}, built for torch {wants or '(unknown)'}"
    # In a process of its own: compiled for another torch, it may end the process that imports it.
    outcome = subprocess.run([sys.executable, "-c", "import torch, k2"], capture_output=True, text=True)
    if outcome.returncode == 0:
        return Check("packages", "k2", "ok", described, required=True)
    lines = outcome.stderr.strip().splitlines() or [f"the process ended with {outcome.returncode}"]
    reason = next((line for line in lines if "rror:" in line), lines[-1])
    torch_version = _version("torch")
    if wants and torch_version and wants != torch_version.partition("+")[0]:
        reason = f"but torch is {torch_version}"
    fix = f"{k2_command()}; or do without: {sys.executable} -m pip uninstall -y k2"
    return Check("packages", "k2", "broken", f"{described}: {reason.strip()}", fix, required=True)


def k2_built_for() -> str:
    """The torch version an installed k2 was built for, read without importing it; empty when unknown."""
    spec = importlib.util.find_spec("k2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "torch_version.py"
        match = re.search(r'^k2_torch_version = "([\d.]+)', file.read_text(), re.M) if file.is_file() else None
        if match:
            return match[1]
    match = re.search(r"torch(\d+\.\d+\.\d+)", _version("k2"))  # 1.24.4.dev20250715+cpu.torch2.7.1
    return match[1] if match else ""


def k2_command() -> str:
    """How to get the k2 that matches the installed torch."""
    torch_version = _version("torch").partition("+")[0]
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


def stages(checks: list[Check], needed: list[Requirement]) -> Iterator[Check]:
    """What each stage can use of what was found."""
    status = {check.name: check.status for check in checks}
    backend = "k2 (torch on request)" if status["k2"] == "ok" else "torch"
    device = "cuda" if status["gpu"] == "ok" else "cpu"
    blockers = [check.name for check in checks if check.required and check.status != "ok"]
    train_found = f"loss backend {backend}, device {device}"
    if blockers:
        train_found = f"cannot run: {', '.join(blockers)}"
    yield Check("stages", "train-backbone", "broken" if blockers else "ok", train_found)
    apt = shutil.which("apt-get")
    yield Check(
        "stages",
        "data prompts",
        "ok" if apt else "absent",
        "apt-get is here" if apt else "needs Debian's or Ubuntu's apt-get",
        "" if apt else "bring your own recordings: asrkit data import --help",
    )
    for stage, extra, module, use in (
        ("data synthesize", "synth", "espeakng_loader", "synthetic speech and phones by espeak-ng"),
        ("tensorboard", "tensorboard", "torch.utils.tensorboard", "training curves in TensorBoard"),
        ("plots", "plots", "matplotlib", "curves and charts as pictures"),
        ("export", "export", "onnx", "ONNX files for sherpa-onnx"),
        ("exported models", "export", "onnxruntime", "evaluate and transcribe by onnxruntime"),
    ):
        yield optional(stage, module, use, [item for item in needed if item.extra == extra])


def optional(stage: str, module: str, use: str, needed: list[Requirement]) -> Check:
    """A package that one stage can use; ``needed`` is the extra that brings it."""
    error = import_error(module)
    if error is None:
        return Check("stages", stage, "ok", use)
    names = " ".join(f"'{item.name}>={item.minimum}'" for item in needed)
    absent = isinstance(error, ModuleNotFoundError)
    found = f"without {use}: {_line(error)}"
    return Check("stages", stage, "absent" if absent else "broken", found, pip_install(names))


def import_error(module: str) -> BaseException | None:
    """Import a module; what it raised, whatever that was, or None."""
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a package's import may raise anything, SystemExit included
        return error
    return None


def describe(checks: list[Check]) -> list[str]:
    """Lines for a person: the findings by group, then what to do, then the verdict."""
    width = max(len(check.name) for check in checks)
    lines = []
    for group in ("machine", "packages", "stages"):
        lines.append(f"{group}:")
        lines += [f"  {_mark(check)}  {check.name:<{width}}  {check.found}" for check in checks if check.group == group]
    fixes = [check for check in checks if check.fix and check.status != "ok"]
    if fixes:
        lines.append("to get what is missing:")
        for check in fixes:
            lines += [f"  {check.name}{'' if check.required else ' (optional)'}:", f"    {check.fix}"]
    lines.append("asrkit can train here." if can_train(checks) else "asrkit cannot train here: mend what is marked NO.")
    return lines


def _mark(check: Check) -> str:
    if check.status == "ok":
        return "ok"
    return "NO" if check.required or check.status == "broken" else "--"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _line(error: BaseException) -> str:
    """The first line of an exception's message, with its type when there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep imports' own warnings off the screen: the findings say what matters."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
