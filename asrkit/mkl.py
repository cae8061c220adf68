"""Matrix products on AMD processors by the MKL of an old torch.

The MKL 2020.0 inside torch 1 takes its slowest path on processors that are not Intel's: 25 GFLOPS instead of 75 on AMD
Zen 3, one thread. ``MKL_DEBUG_CPU_TYPE=5`` makes it use AVX2; it is read once, at the first product. Newer MKLs ignore
the variable and need none. The results differ by rounding alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "MKL_DEBUG_CPU_TYPE"
AVX2_PATH = "5"


def use_avx2_path(environment: MutableMapping[str, str] = os.environ, cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Set the variable where it helps and nobody has set it; called before torch computes anything.

    Processes started from here (loaders, torchrun's) inherit it.
    """
    if VARIABLE not in environment and is_amd_with_avx2(cpuinfo) and has_old_mkl(torch_version()):
        environment[VARIABLE] = AVX2_PATH


def is_amd_with_avx2(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """What Linux says of the first processor; False where it says nothing."""
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as file:
            first = file.read(8192)  # all of it takes long on machines of many cores
    except OSError:
        return False
    vendor, flags = re.search(r"^vendor_id\s*: (.*)$", first, re.M), re.search(r"^flags\s*: (.*)$", first, re.M)
    return vendor is not None and vendor[1] == "AuthenticAMD" and flags is not None and "avx2" in flags[1].split()


def has_old_mkl(version: str) -> bool:
    """Whether this torch's wheels carry an MKL that honors the variable: torch 1; "" is no torch."""
    return version.partition(".")[0] == "1"


def torch_version() -> str:
    """The installed torch's, found without importing it; "" where there is none."""
    import importlib.metadata

    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def described(environment: MutableMapping[str, str] = os.environ, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """For a person: which path matrix products take here, and why."""
    needed = is_amd_with_avx2(cpuinfo) and has_old_mkl(torch_version())
    value = environment.get(VARIABLE)
    if value is not None:
        why = "the MKL of torch 1 is slow on AMD processors without it" if needed else "not needed here"
        return f"{VARIABLE}={value}: {why}"
    if needed:
        return f"slow: set {VARIABLE}={AVX2_PATH}, which the MKL of torch 1 needs on AMD processors"
    return "MKL chooses its own path"
