"""The hardware: what a measurement was made on, and what a build of torch can use of it."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(asked: str | None, cores: int) -> str:
    """How many threads a process computes with on the CPU: ``asked`` of OMP_NUM_THREADS, if it is set."""
    if asked:
        return f"{asked} a process (OMP_NUM_THREADS)"
    return (
        f"{cores} for one process; torchrun gives each of several processes 1, unless OMP_NUM_THREADS says more "
        f"(export OMP_NUM_THREADS={max(1, cores // 2)} for two)"
    )


def processor() -> str:
    """Cores this process may use, and the instructions that make bf16 products fast."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*: (.*)$", text, re.M)
    flags = re.search(r"^flags\s*: (.*)$", text, re.M)
    known = flags[1].split() if flags else []
    fast = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if flag in known]
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {num_cores()} cores, {' '.join(fast) or 'no wide vector instructions reported'}"


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
