"""The run directory of a stage while it is written: claimed, described, published, finished."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from asrkit import __version__
from asrkit.config import digest
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.disk import atomic_directory, atomic_write, cannot_write, replace, sha256_of
from asrkit.errors import UserError
from asrkit.models.asr import AsrModel
from asrkit.models.registry import Spec, write_model
from asrkit.models.spec import PretrainedEncoderSpec
from asrkit.reporting.console import PlainConsole
from asrkit.run_dir import (
    CONFIG,
    DONE,
    LINEAGE,
    STATE,
    TOKENIZER,
    WEIGHTS,
    RunDir,
    check_lineage,
    digests_of,
    open_run,
    read_yaml,
    write_yaml,
)
from asrkit.training.checkpoint import save_weights, saved_seconds
from asrkit.training.claim import LOCK, Inputs, claim, clear, known_inputs, unmake
from asrkit.training.distributed import World, broadcast_object, from_main

LEFT_OUT = "left_out.yaml"
LABELED = "labeled-*.jsonl.gz"  # manifests whose missing texts a teacher has transcribed


def write_sealed(path: Path, content: Any) -> None:
    """Write what a resumed run has to know again, with its digest."""
    write_yaml(path, {"sha256": digest(content), "content": content})


def read_sealed(path: Path) -> Any:
    """What ``write_sealed`` wrote.

    Raises:
        UserError: it is not that any more.
    """
    stored = read_yaml(path)
    if not isinstance(stored, dict) or digest(stored.get("content")) != stored.get("sha256"):
        raise UserError(
            f"{path}: is damaged, or of an earlier version; restore a copy, or train again with another --out"
        )
    return stored["content"]


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
    facts: dict[str, Any] = field(default_factory=dict)  # the stage's additions to its entry in the lineage
    recorded: dict[str, Any] = field(default_factory=dict)  # that entry as an earlier start of this run left it
    _began: float = field(default_factory=time.monotonic)
    _console: PlainConsole = field(default_factory=lambda: PlainConsole(stderr=True))

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
        """Claim ``path`` for ``stage``; an interrupted run with the same settings and inputs is resumed.

        Raises:
            UserError: files that are not there, another process trains there, or what lies there is of another stage, settings
                or inputs.
        """
        files = {**inputs, "from": None if parent is None else parent / WEIGHTS}
        known = from_main(world, lambda: known_inputs(files))
        content = {"stage": stage, **settings, "inputs": known}
        with ExitStack() as lock:
            claimed = from_main(world, lambda: claim(path, content, lock))
            run = cls(path, stage, digest(claimed.config), claimed.fresh, claimed.finished, world)
            try:
                run._read(parent, stage_entry(stage, run.config_sha256, known, command))
                for note in claimed.notes:
                    run.note(note)
                yield run
            except UserError:
                if world.is_main and claimed.new and not run.began:
                    clear(path)
                    if claimed.made:
                        unmake(claimed.made, held=True)
                    else:
                        (path / LOCK).unlink(missing_ok=True)
                raise

    def _read(self, parent: Path | None, entry: dict[str, Any]) -> None:
        """Read what the parent and earlier starts of this run have recorded."""
        path = self.path
        self.lineage = [*([] if parent is None else open_run(parent).lineage), entry]
        if not self.fresh:
            self._began -= saved_seconds(path)  # the time the run took before it stopped
        if not self.fresh and (path / LINEAGE).is_file():
            self.recorded = check_lineage(read_yaml(path / LINEAGE), path / LINEAGE)[-1]
        if not self.fresh and (path / LEFT_OUT).is_file():
            self.left_out = read_sealed(path / LEFT_OUT)
        if self.finished:
            self.note(
                f"{path}: already trained to the last step, so there is nothing to do; to train again, choose another --out"
            )

    def note(self, text: str) -> None:
        """Print a line, in the main process only."""
        if self.world.is_main:
            self._console.print(text, soft_wrap=True)

    def leave_out(self, cut_id: str, reason: str) -> None:
        """Leave a cut out of the training, and print that."""
        self.note(f"left out: cut {cut_id}: {reason}")
        self.left_out[cut_id] = reason

    def save_left_out(self) -> None:
        """Record the cuts that are left out, so that every process and every later start leaves out the same ones."""
        if self.world.is_main and self.fresh and self.left_out:
            write_sealed(self.path / LEFT_OUT, self.left_out)
        broadcast_object(self.world, None)  # the others read it only once it is there

    def state(self, facts: dict[str, Any]) -> None:
        """Add ``facts`` to the run's entry in the lineage.

        Raises:
            UserError: the run was stopped, and what a digest among them is of has been replaced since.
        """
        for name, value in facts.items():
            if name.endswith("_sha256") and self.recorded.get(name, value) != value:
                what = name.removesuffix("_sha256").replace("_", " ")
                raise UserError(
                    f"{self.path}: the {what} is not the one it was trained with before it was stopped; restore that, or remove "
                    f"{self.path} and train again"
                )
        self.facts = facts

    def describe(self, spec: Spec, data: str) -> None:
        """Write model.yaml and print a summary of model and ``data``; from now on the directory is kept."""
        self.began = True
        if self.world.is_main:
            write_model(self.path, spec)
            vocabulary = "" if isinstance(spec, PretrainedEncoderSpec) else f", vocabulary {spec.vocab_size}"
            self.note(f"{self.path}: {data}{vocabulary}, {self.world.size} process(es) on {self.world.device}")

    def publish(self, model: nn.Module, step: int, metrics: dict[str, float]) -> None:
        """Replace the run's weights.

        The lineage accepts the new digest and the one before it, so whatever instant the run dies at, the weights
        on disk are whole and known.

        Raises:
            UserError: no room to write.
        """
        weights = self.path / WEIGHTS
        before = sha256_of(weights) if weights.is_file() else None
        staged = self.path / STATE / f"next-{WEIGHTS}"
        save_weights(staged, model)
        entry = {
            **self.lineage[-1],
            **self.facts,
            "step": step,
            "metrics": {name: float(value) for name, value in metrics.items()},
            "seconds": round(time.monotonic() - self._began, 1),
            **digests_of(self.path),
            "weights_sha256": sha256_of(staged),
            "previous_weights_sha256": before,
        }
        write_yaml(self.path / LINEAGE, [*self.lineage[:-1], entry])
        try:
            replace(staged, weights)
        except OSError as error:
            raise cannot_write(weights, error) from error

    def finish(self) -> None:
        """Mark the run as complete, with the time that all of it took; recipes take this file as their target.

        Raises:
            UserError: its files are damaged or missing, or there is no room to write.
        """
        if self.world.is_main:
            open_run(self.path)
            lineage = read_yaml(self.path / LINEAGE)
            lineage[-1]["seconds"] = round(time.monotonic() - self._began, 1)
            write_yaml(self.path / LINEAGE, lineage)
            with atomic_write(self.path / DONE) as temporary:
                temporary.touch()


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
    start = {"from": str(parent.path), "from_weights_sha256": sha256_of(parent.path / WEIGHTS)}
    with whole_run(out, stage, {**start, **settings}, model.spec, inputs or {}, parent.lineage, command) as (
        folder,
        entry,
    ):
        Tokenizer(parent.tokenizer_path).copy_to(folder / TOKENIZER)
        save_weights(folder / WEIGHTS, model)
        entry |= extra or {}
    return out


@contextmanager
def whole_run(
    out: Path,
    stage: str,
    settings: Mapping[str, Any],
    spec: Spec,
    inputs: Mapping[str, Path | None],
    lineage: Sequence[dict[str, Any]] = (),
    command: str = "",
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a directory for the files of a model, beside ``out``, and the stage's entry in the lineage, for what it should say in
    addition; they become the run directory ``out`` when the block succeeds.

    Args:
        lineage: the entries of the stages before.

    Raises:
        UserError: ``out`` is taken or cannot be written, or inputs that do not exist.
    """
    began = time.monotonic()
    known = known_inputs(inputs)
    content = {"stage": stage, **settings, "inputs": known}
    entry = {**stage_entry(stage, digest(content), known, command), "metrics": {}}
    with atomic_directory(out) as folder:
        write_yaml(folder / CONFIG, content)
        write_model(folder, spec)
        yield folder, entry
        entry |= {"seconds": round(time.monotonic() - began, 1), **digests_of(folder)}
        write_yaml(folder / LINEAGE, [*lineage, entry])
        (folder / DONE).write_text("")


def stage_entry(stage: str, config_sha256: str, inputs: Inputs, command: str) -> dict[str, Any]:
    """A stage's entry in the lineage, without what is known only after training."""
    return {
        "stage": stage,
        "command": command or " ".join(["asrkit", *sys.argv[1:]]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config_sha256": config_sha256,
        # The parent has its own entries, with its digests.
        "manifests": {entry["path"]: entry["sha256"] for name, entry in inputs.items() if not name.startswith("from")},
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
