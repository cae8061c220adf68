"""The run directory of a stage while it is written: claimed, described, published, finished."""

from __future__ import annotations

import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from asrkit import __version__
from asrkit.config import differences, digest
from asrkit.data.shar import shards_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.errors import UserError
from asrkit.migration import FORMAT
from asrkit.models.asr import AsrModel
from asrkit.models.registry import Spec, write_model
from asrkit.models.spec import PretrainedEncoderSpec
from asrkit.run_dir import (
    CONFIG,
    LINEAGE,
    MODEL,
    TOKENIZER,
    TOKENS,
    WEIGHTS,
    RunDir,
    atomic_directory,
    digests_of,
    open_run,
    read_yaml,
    sha256_of,
    stored_model,
    write_yaml,
)
from asrkit.training.checkpoint import STATE_FILE, save_weights
from asrkit.training.distributed import World, broadcast_object

DONE, LEFT_OUT = "done", "left_out.yaml"
LABELED = "labeled-*.jsonl.gz"  # manifests whose missing texts are a teacher's


@dataclass
class RunWriter:
    """The run directory of a training stage, locked for this run."""

    path: Path
    stage: str
    config_sha256: str
    fresh: bool
    finished: bool
    world: World
    began: bool = False
    lineage: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # what the stage adds to its entry in the lineage
    _began: float = field(default_factory=time.monotonic)
    _console: Console = field(default_factory=lambda: Console(stderr=True))

    @classmethod
    @contextmanager
    def open(
        cls,
        path: Path,
        stage: str,
        settings: dict[str, Any],
        inputs: dict[str, Path | None],
        command: str,
        world: World,
        parent: Path | None = None,
    ) -> Iterator[RunWriter]:
        """Claim ``path`` for ``stage``; an earlier run of the very same settings and inputs is continued.

        Raises:
            UserError: another process trains there, or what lies there is of another stage, settings or inputs.
        """
        missing = [
            f"{file}: no such file (--{name})"
            for name, file in inputs.items()
            if file is not None and not file.exists()
        ]
        if missing:
            raise UserError.of(missing)
        manifests = {name: str(file) for name, file in inputs.items() if file is not None}
        content = {"stage": stage, **settings, "inputs": manifests}
        with _lock(path, world):
            existing = _existing(path, stage, content)
            run = cls(
                path,
                stage,
                digest(content),
                existing is None or not (path / "state" / STATE_FILE).is_file(),
                (path / DONE).is_file(),
                world,
            )
            run.lineage = [] if parent is None else open_run(parent).lineage
            run.lineage = [*run.lineage, stage_entry(stage, run.config_sha256, inputs, command)]
            if world.is_main and existing is None:
                write_yaml(path / CONFIG, content)
            if not run.fresh and (path / LINEAGE).is_file():
                run._began -= read_yaml(path / LINEAGE)[-1]["seconds"]  # what the run took before it stopped
            if not run.fresh and (path / LEFT_OUT).is_file():
                run.left_out = read_yaml(path / LEFT_OUT)
            if run.finished:
                run.note(f"{path}: already trained to the last step; nothing to do (another --out trains anew)")
            try:
                yield run
            except UserError:
                if world.is_main and existing is None and not run.began:
                    _clear(path)
                raise

    def note(self, text: str) -> None:
        """A line on the screen, from the main process alone."""
        if self.world.is_main:
            self._console.print(text, highlight=False, soft_wrap=True)

    def leave_out(self, cut_id: str, reason: str) -> None:
        """Train without a cut, and say so."""
        self.note(f"left out: cut {cut_id}: {reason}")
        self.left_out[cut_id] = reason

    def save_left_out(self) -> None:
        """Write down which cuts are left out, so that every process and every later start leaves out the same."""
        if self.world.is_main and self.fresh and self.left_out:
            write_yaml(self.path / LEFT_OUT, self.left_out)
        broadcast_object(self.world, None)  # the others read it only once it is there

    def describe(self, spec: Spec, data: str) -> None:
        """Write model.yaml and say what is trained on what ``data``; from here on the directory is kept."""
        self.began = True
        if self.world.is_main:
            write_model(self.path, spec)
            vocabulary = "" if isinstance(spec, PretrainedEncoderSpec) else f", vocabulary {spec.vocab_size}"
            self.note(f"{self.path}: {data}{vocabulary}, {self.world.size} process(es) on {self.world.device}")

    def publish(self, model: nn.Module, step: int, metrics: dict[str, float]) -> None:
        """Replace the run's weights.

        The lineage accepts the new digest and the one before it, so whatever instant the run dies at, the weights
        on disk are whole and known.
        """
        weights = self.path / WEIGHTS
        staged = self.path / "state" / f"next-{WEIGHTS}"
        save_weights(staged, model)
        before = digests_of(self.path)
        entry = {
            **self.lineage[-1],
            **self.facts,
            "step": step,
            "metrics": {name: float(value) for name, value in metrics.items()},
            "seconds": round(time.monotonic() - self._began, 1),
            **before,
            "weights_sha256": sha256_of(staged),
            "previous_weights_sha256": before.get("weights_sha256"),
        }
        write_yaml(self.path / LINEAGE, [*self.lineage[:-1], entry])
        os.replace(staged, weights)

    def finish(self) -> None:
        """Mark the run as complete; recipes take this file as their target."""
        if self.world.is_main:
            (self.path / DONE).write_text("")


@contextmanager
def _lock(path: Path, world: World) -> Iterator[None]:
    """Hold the directory's lock in the main process; the file stays, the lock goes with the process."""
    refused = ""
    handle = None
    if world.is_main:
        try:
            path.mkdir(parents=True, exist_ok=True)
            handle = open(path / ".lock", "w")  # noqa: SIM115 (held until the run ends)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refused = f"{path}: another run is training there; wait for it or choose another --out"
        except OSError as error:
            refused = f"{path}: cannot write there ({error.strerror}); choose another --out"
    refused = str(broadcast_object(world, refused))
    if refused:
        raise UserError(refused)
    try:
        yield
    finally:
        if handle is not None:
            handle.close()


def _existing(path: Path, stage: str, content: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration already in ``path``, which must be this one; None in an unused directory."""
    if not (path / CONFIG).is_file():
        strangers = [item.name for item in path.iterdir() if item.name != ".lock" and not item.name.startswith(".tmp-")]
        if strangers:
            raise UserError(
                f"{path}: holds other files ({', '.join(sorted(strangers)[:3])}) and no run; choose another --out"
            )
        return None
    found = read_yaml(path / CONFIG)
    if not isinstance(found, dict) or found.get("stage") != stage:
        other = found.get("stage") if isinstance(found, dict) else "unknown"
        raise UserError(f"{path}: is a run of {other}, not of {stage}; choose another --out")
    if (path / MODEL).is_file() and (number := stored_model(path).get("format", 0)) != FORMAT:
        raise UserError(
            f"{path}: was begun by an older version of asrkit (format {number}, now {FORMAT}) and cannot be resumed; start from it "
            "with --from in another --out, or go on with that version"
        )
    if changed := differences(found, content):
        raise UserError.of(
            [f"{path}: was begun with other settings: {line}" for line in changed]
            + [f"{path}: repeat the settings to resume, or choose another --out"]
        )
    return found


def _clear(path: Path) -> None:
    """Leave no trace of a run that was refused before it began."""
    for file in (*(path / name for name in (CONFIG, TOKENIZER, TOKENS, LEFT_OUT, ".lock")), *path.glob(LABELED)):
        file.unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def write_untrained_run(
    out: Path,
    parent: RunDir,
    stage: str,
    settings: Mapping[str, Any],
    model: AsrModel,
    *,
    inputs: Mapping[str, Path] | None = None,
    extra: Mapping[str, Any] | None = None,
    command: str = "",
) -> Path:
    """Write ``model`` as a complete run directory that continues the lineage of ``parent``; returns ``out``.

    Everything is written beside ``out`` and renamed at the end, so that ``out`` is whole or not there.

    Args:
        settings: what the stage was told; config.yaml and the config digest are of these, the inputs and the parent.
        inputs: files other than the parent that went in, by the name of their option; the lineage holds their digests.
        extra: what else the lineage should say.

    Raises:
        UserError: ``out`` is taken or cannot be written.
    """
    began = time.monotonic()
    files: dict[str, Path | None] = dict(inputs or {})
    content = {
        "stage": stage,
        "from": str(parent.path),
        "from_weights_sha256": sha256_of(parent.path / WEIGHTS),
        **settings,
        "inputs": {name: str(file) for name, file in files.items()},
    }
    with atomic_directory(out) as folder:
        write_yaml(folder / CONFIG, content)
        write_model(folder, model.spec)
        Tokenizer(parent.tokenizer_path).copy_to(folder / TOKENIZER)
        save_weights(folder / WEIGHTS, model)
        entry = {
            **stage_entry(stage, digest(content), files, command),
            **(extra or {}),
            "metrics": {},
            "seconds": round(time.monotonic() - began, 1),
            **digests_of(folder),
        }
        write_yaml(folder / LINEAGE, [*parent.lineage, entry])
        (folder / DONE).write_text("")
    return out


def stage_entry(stage: str, config_sha256: str, inputs: dict[str, Path | None], command: str) -> dict[str, Any]:
    """A stage's entry in the lineage, as far as it is known before the weights are; a Shar directory has no digest."""
    given = [file for file in inputs.values() if file is not None and (file.is_file() or shards_of(file))]
    return {
        "stage": stage,
        "command": command or " ".join(["asrkit", *sys.argv[1:]]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config_sha256": config_sha256,
        "manifests": {str(file): sha256_of(file) if file.is_file() else None for file in given},
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    import lhotse
    import torch

    return {
        "asrkit": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lhotse": lhotse.__version__,
    }
