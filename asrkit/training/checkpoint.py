"""The state of a run in one safetensors file: tensors by name, everything else as JSON in its header. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from asrkit.disk import atomic_write, sha256_of
from asrkit.errors import UserError, clip
from asrkit.run_dir import STATE

STATE_FILE = "latest.safetensors"
SEAL = ".sha256"  # suffix of a file with the digest of the safetensors file beside it


@dataclass
class Progress:
    """The progress of a run.

    metrics: sums and their divisors since the last logged step.
    measure_due: the step is done, but a signal interrupted its measurement.
    schedule: what a parameter server has handed out; see ``Schedule.state``.
    """

    step: int = 0
    slices: int = 1
    best: dict[str, float] = field(default_factory=dict)
    last_dev: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    measure_due: bool = False
    schedule: dict[str, Any] = field(default_factory=dict)


def save_state(
    run: Path,
    progress: Progress,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    older: Mapping[int, list[Tensor]] | None = None,
) -> None:
    """Write ``state/latest.safetensors`` atomically. ``older`` are the trained parameters after earlier steps, as far as a driver still
    needs them."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        known = {key: value for key, value in state.items() if value is not None}  # sgd without momentum has a None
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in known.items()}
    for step, weights in (older or {}).items():
        tensors |= {f"older.{step}.{index}": weight for index, weight in enumerate(weights)}
    # clone: safetensors refuses tensors that share memory
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(run / STATE / STATE_FILE) as temporary:
        text = json.dumps(asdict(progress))
        _save(plain, temporary, {"progress": text, "sha256": _digest(plain, text)})


def _digest(tensors: Mapping[str, Tensor], progress: str) -> str:
    """The SHA-256 of a whole state: names, types, shapes and bytes of its tensors, and its progress."""
    digest = hashlib.sha256(progress.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(models: Mapping[str, nn.Module], step: int) -> None:
    """Refuse weights that are not finite, before they replace usable ones.

    Raises:
        UserError: names the tensors with values that are not finite.
    """
    tensors = {
        f"{name} ({which})": tensor
        for which, model in models.items()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    finite = torch.stack(
        [tensor.isfinite().all() for tensor in tensors.values()]
    ).tolist()  # one transfer from the device
    bad = [name for name, fine in zip(tensors, finite, strict=True) if not fine]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"after step {step}: weights are not finite: {', '.join(bad[:3])}{more}; they were not saved: start a new run with a "
            "lower training.optimizer.learning_rate, or run the command again to resume from the last save"
        )


def saved_slices(run: Path) -> int | None:
    """Batches per step of the saved run; None if nothing is saved."""
    return int(_saved(run, "slices")) or None


def saved_seconds(run: Path) -> float:
    """How long the saved run has trained; 0 if nothing is saved."""
    return float(_saved(run, "seconds"))


def _saved(run: Path, name: str) -> Any:
    """A number of the saved progress; 0 if there is none."""
    path = run / STATE / STATE_FILE
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            number = json.loads(file.metadata()["progress"])[name]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return 0  # damaged: load_state reports it
    return number if isinstance(number, int | float) else 0


def load_state(
    run: Path,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    older: dict[int, list[Tensor]] | None = None,
) -> Progress | None:
    """Restore a saved state in place; None when there is none. ``older`` is filled with what was saved as such.

    Raises:
        UserError: the file is damaged or of another model.
    """
    path = run / STATE / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iteration)
        if _digest(tensors, metadata["progress"]) != metadata["sha256"]:
            raise ValueError("its digest differs from what was saved: the file is damaged")
        progress = Progress(**json.loads(metadata["progress"]))
        model.load_state_dict(_below("model.", tensors))
        average.load_state_dict(_below("average.", tensors))
        packed = optimizer.state_dict()
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below("optimizer.", tensors).items():
            index, key = name.split(".", 1)
            states.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**packed, "state": states})
        if older is not None:
            older |= _by_step(_below("older.", tensors))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot resume from it ({reason}); delete {path.parent} to start again") from error
    return progress


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's parameters and buffers, float32 (masks as they are), atomically; not what only its training needs."""
    only_training = ("teacher_maps.", "snapshots.")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(only_training)}
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
    plain = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    save_tensors(path, {name: tensor.contiguous().clone() for name, tensor in plain.items()})


def save_sealed(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as ``save_tensors`` does, and then their file's SHA-256 beside it."""
    save_tensors(path, tensors)
    with atomic_write(path.with_suffix(SEAL)) as temporary:
        temporary.write_text(sha256_of(path))


def open_sealed(path: Path) -> Any:
    """The open safetensors file that ``save_sealed`` wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        if (seal := path.with_suffix(SEAL).read_text(errors="replace")) != (digest := sha256_of(path)):
            raise ValueError(f"digest {digest[:12]} differs from {clip(seal, 12)} beside it")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: is damaged ({clip(error)}); delete {path.parent} and run the command again"
        ) from error


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors of the CPU, none of which share memory, atomically."""
    with atomic_write(path) as temporary:
        _save(tensors, temporary, {})


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
        path.chmod(0o666 & ~_umask())  # it writes files that only their owner may read
    except SafetensorError as error:  # it holds the operating system's error as text, in one of two forms
        code = re.search(r"\b(?:code: |os error )(\d+)", str(error))
        number = int(code[1]) if code else None
        raise OSError(number, os.strerror(number) if number else str(error)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _by_step(tensors: Mapping[str, Tensor]) -> dict[int, list[Tensor]]:
    """Tensors named STEP.INDEX as a list for each step."""
    steps: dict[int, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        step, index = map(int, name.split("."))
        steps.setdefault(step, {})[index] = tensor
    return {step: [weights[index] for index in range(len(weights))] for step, weights in sorted(steps.items())}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
