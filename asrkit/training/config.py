"""Settings of the training loop: length, intervals, precision and optimizer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from asrkit.config import Positive, config
from asrkit.errors import UserError
from asrkit.training.optim import OptimizerConfig


@config
class TrainingConfig:
    """Length, intervals and precision of a run."""

    steps: Positive = 4000
    """Optimizer steps in all."""
    accumulate: Positive = 1
    """Batches whose gradients are added up for one step. Raise it when a batch as large as you want does not fit in
    memory."""
    log_every: Positive = 50
    """Steps between lines of the log and of metrics.jsonl."""
    evaluate_every: Positive = 500
    """Steps between measurements on the dev manifest."""
    save_every: Positive = 250
    """Steps between saved states; at most this much work is lost when the run is killed."""
    average_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.998
    """The saved and evaluated weights are a running average of the trained ones; the decay of step n, counted from 0, is
    (1 + n) / (10 + n), at most this. 0 saves the last weights as they are."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the forward pass: auto is bfloat16 on GPUs and CPUs that compute in it, else float32."""
    keep: Literal["best", "last"] = "best"
    """Which weights the run ends with: those of the best dev WER, or the last."""
    max_skipped_in_a_row: Positive = 10
    """End the run after this many steps in a row whose loss or gradient was not finite."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""


def resolve_precision(settings: TrainingConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products on ``device``; ``auto`` depends on the hardware.

    Raises:
        UserError: float16 on a CPU.
    """
    if settings.precision == "float16" and device.type == "cpu":
        raise UserError("training.precision=float16 needs a GPU; use bfloat16 or float32 on a CPU")
    if settings.precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[settings.precision]
    if device.type == "cuda":
        # From compute capability 8 on. torch.cuda.is_bf16_supported is also true of GPUs that only emulate it.
        return (
            torch.bfloat16 if torch.version.hip or torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
        )
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A context in which matrix products use ``dtype``; float32 changes nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def make_scaler() -> Any:
    """What multiplies losses so that gradients of float16 do not vanish; torch 2 has it by another name."""
    if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler("cuda")
    return torch.cuda.amp.GradScaler()
