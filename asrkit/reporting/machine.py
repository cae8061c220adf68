"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
