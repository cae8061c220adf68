"""Which device a command runs on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from asrkit.errors import UserError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """``auto`` (a GPU where torch can use one), ``cpu``, ``cuda`` or ``cuda:N`` as a torch device.

    A GPU always has its number, 0 where none is given: ``torch.cuda.set_device`` refuses a device without one, and
    tensors name theirs, so that ``tensor.device == device`` holds.

    Raises:
        UserError: another name, or a GPU that torch does not have here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    # torch keeps the index in 8 bits; ASCII digits only, as others would be counted as numbers too.
    match = re.fullmatch(r"cuda(?::([0-9]{1,2}))?", name)
    if match is None:
        raise UserError(f"--device {name}: is not a device; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UserError(
            f"--device {name}: torch {torch.__version__} ({built_for}) finds no GPU here; use auto or cpu, or run asrkit doctor"
        )
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        raise UserError(f"--device {name}: torch finds {count} GPU(s), cuda:0 to cuda:{count - 1}; use one of these")
    return torch.device(f"cuda:{index}")


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on ``device``. A GPU gets it through page-locked memory: the copy is queued like any other work, and nothing waits."""
    if device.type == "cpu" or tensor.device.type != "cpu" or not tensor.numel():
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded one cannot be copied as it is


def peak_memory() -> int:
    """The most bytes used at once so far: of the GPU by torch's tensors, where this process uses one; else of this process."""
    import resource

    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
