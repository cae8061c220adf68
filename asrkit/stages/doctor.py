"""doctor: what this machine has, what each stage can use of it, and the exact command that installs what is missing.

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
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from asrkit import mkl
from asrkit.reporting.machine import has_kernels, num_cores, processor, threads
from asrkit.reporting.packages import (
    USES,
    Requirement,
    import_error,
    installed_version,
    k2_built_for,
    k2_command,
    pip_install,
    requirements,
    version_tuple,
)

Status = Literal["ok", "absent", "broken"]

# The oldest torch built for numpy 2.
NUMPY_2_TORCH = (2, 3)


@dataclass(frozen=True)
class Check:
    """One finding; a ``required`` one that is not ok keeps asrkit from training. ``fix`` is a command."""

    group: Literal["machine", "packages", "stages"]
    name: str
    status: Status
    detail: str
    fix: str = ""
    required: bool = False


def examine() -> list[Check]:
    """Run every check; takes a few seconds, as the packages are really imported."""
    needed = requirements()
    with _quiet():
        checks = [*machine(), *packages(needed), numpy_bridge(), k2()]
        return [*checks, *stages(checks, needed)]


def can_train(checks: list[Check]) -> bool:
    """Whether everything required is there and works."""
    return all(check.status == "ok" for check in checks if check.required)


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


def packages(needed: list[Requirement]) -> Iterator[Check]:
    """Every package asrkit always needs, imported for real; then torch's GPU."""
    for requirement in needed:
        if not requirement.extra:
            yield package(requirement)
    yield gpu()


def package(requirement: Requirement) -> Check:
    """One required package: is it there, does it import, and is it new enough?"""
    version = installed_version(requirement.name)
    error = import_error(requirement.module)
    status: Status = "broken"
    detail, fix = version or "unknown version", requirement.install
    if error is None:
        if not version or version_tuple(version) >= version_tuple(requirement.minimum):
            status, fix = "ok", ""
        else:
            detail += f", older than {requirement.minimum}"
    elif not isinstance(error, ModuleNotFoundError):
        detail += f" does not import: {_line(error)}"
        fix = pip_install(f"--force-reinstall --no-deps '{requirement.name}>={requirement.minimum}'")
    elif error.name == requirement.module:
        status, detail = "absent", "not installed"
    else:  # a dependency the package does not declare
        detail += f" does not import: {_line(error)}"
        fix = pip_install((error.name or requirement.name).partition(".")[0])
    return Check("packages", requirement.name, status, detail, fix, required=True)


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
        detail = f"torch {torch.__version__} cannot use numpy {numpy.__version__}: {_line(error)}"
        return Check("packages", name, "broken", detail, fix, required=True)
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
    detail = f"{', '.join(names)} (sm_{major}{minor}), CUDA {torch.version.cuda}"
    if not has_kernels((major, minor), built_for):
        detail += f"; this torch has kernels for {' '.join(built_for)} only"
        return Check("machine", "gpu", "broken", detail, "make setup ENV=modern, or install a newer torch")
    return Check("machine", "gpu", "ok", detail)


def k2() -> Check:
    """k2, and the torch it was built for. Absent is fine: the loss then runs on torch alone."""
    version = installed_version("k2")
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
    torch_version = installed_version("torch")
    if wants and torch_version and wants != torch_version.partition("+")[0]:
        reason = f"but torch is {torch_version}"
    fix = f"{k2_command()}; or do without: {sys.executable} -m pip uninstall -y k2"
    return Check("packages", "k2", "broken", f"{described}: {reason.strip()}", fix, required=True)


def stages(checks: list[Check], needed: list[Requirement]) -> Iterator[Check]:
    """What each stage can use of what is here."""
    status = {check.name: check.status for check in checks}
    backend = "k2 (torch on request)" if status["k2"] == "ok" else "torch"
    device = "cuda" if status["gpu"] == "ok" else "cpu"
    blockers = [check.name for check in checks if check.required and check.status != "ok"]
    training = f"loss backend {backend}, device {device}"
    if blockers:
        training = f"cannot run: {', '.join(blockers)}"
    yield Check("stages", "train-backbone", "broken" if blockers else "ok", training)
    criteria = "every criterion" if status["k2"] == "ok" else "mwer, sampled-mbr; mmi, bmmi, smbr and mpe need k2"
    yield Check("stages", "sequence-train", "ok", criteria)
    apt = shutil.which("apt-get")
    yield Check(
        "stages",
        "data prompts",
        "ok" if apt else "absent",
        "apt-get is here" if apt else "needs Debian's or Ubuntu's apt-get",
        "" if apt else "bring your own recordings: asrkit data import --help",
    )
    for stage, extra, module, use in USES:
        yield optional(stage, module, use, [item for item in needed if item.extra == extra])


def optional(stage: str, module: str, use: str, needed: list[Requirement]) -> Check:
    """A package that one stage can use; ``needed`` is the extra that brings it."""
    error = import_error(module)
    if error is None:
        return Check("stages", stage, "ok", use)
    names = " ".join(f"'{item.name}>={item.minimum}'" for item in needed)
    absent = isinstance(error, ModuleNotFoundError)
    detail = f"without {use}: {_line(error)}"
    return Check("stages", stage, "absent" if absent else "broken", detail, pip_install(names))


def describe(checks: list[Check]) -> list[str]:
    """Lines for a person: the findings by group, then what to do, then the verdict."""
    width = max(len(check.name) for check in checks)
    lines = []
    for group in ("machine", "packages", "stages"):
        lines.append(f"{group}:")
        lines += [
            f"  {_mark(check)}  {check.name:<{width}}  {check.detail}" for check in checks if check.group == group
        ]
    fixes = [check for check in checks if check.fix and check.status != "ok"]
    if fixes:
        lines.append("to get what is missing:")
        for check in fixes:
            lines += [f"  {check.name}{'' if check.required else ' (optional)'}:", f"    {check.fix}"]
    lines.append(
        "asrkit can train here." if can_train(checks) else "asrkit cannot train here: fix the items marked NO."
    )
    return lines


def _mark(check: Check) -> str:
    if check.status == "ok":
        return "ok"
    return "NO" if check.required or check.status == "broken" else "--"


def _line(error: BaseException) -> str:
    """The first line of an exception's message, with its type when there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep imports' own warnings off the screen: the findings say what matters."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
