"""A run directory on disk: what a stage writes and the next stage, the evaluator and the exporter read.

config.yaml        the stage's resolved configuration
model.yaml         the model's spec
model.safetensors  the weights to use
tokenizer.model    sentencepiece model; tokens.txt beside it
lineage.yaml       every stage from the first, with digests
metrics.jsonl      one line a logged step
state/             what resuming needs
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from asrkit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, MODEL, WEIGHTS = "config.yaml", "model.yaml", "model.safetensors"
TOKENIZER, TOKENS, LINEAGE = "tokenizer.model", "tokens.txt", "lineage.yaml"
EXPORT = "export.yaml"  # not of a run directory: what marks an exported model
METRICS, STATE = "metrics.jsonl", "state"
# The files whose digests the last entry of the lineage holds.
DIGESTS = {"weights_sha256": WEIGHTS, "model_spec_sha256": MODEL, "tokenizer_sha256": TOKENIZER}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """Where this process writes what becomes ``path``; what killed processes left there is removed."""
    for left in path.parent.glob(f".tmp-*-{glob.escape(path.name)}"):
        process = left.name.split("-")[1]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
            with suppress(OSError):
                left.unlink()
        except (PermissionError, ValueError):
            pass  # it runs, as another user; or the file is not ours
    # The suffixes stay last: writers choose the format (.jsonl.gz) by them.
    return path.parent / f".tmp-{os.getpid()}-{path.name}"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it becomes ``path`` only when the block succeeds.

    The bytes are on disk before the rename, so a reader sees the old file or the new one, never a part.

    Raises:
        UserError: the disk is full or the place cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write ({error.strerror or error}); free some space or choose another place"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def occupied(out: Path) -> list[str]:
    """Why ``out`` cannot become a new directory, for a stage to report among its other findings; [] if it can."""
    if out.is_dir() and any(out.iterdir()):
        return [f"{out}: exists and is not empty; remove it or choose another --out"]
    if out.exists() and not out.is_dir():
        return [f"{out}: is a file; choose another --out"]
    return []


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; it becomes ``path`` only when the block succeeds.

    Its files are on disk before the rename. ``path`` must not be there, or be an empty directory.

    Raises:
        UserError: the place is taken or cannot be written, or the disk is full; nothing is left behind.
    """
    if findings := occupied(path):
        raise UserError.of(findings)
    path = Path(path).absolute()
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in (*temporary.iterdir(), temporary):
            _sync(written)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write ({error.strerror or error}); free some space or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_yaml(path: Path) -> Any:
    """Parse a YAML file; a syntax error names the file and the place."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); mend or regenerate it") from error


def write_yaml(path: Path, content: Any) -> None:
    """Write ``content`` as YAML, atomically, keys in the order given."""
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


@dataclass(frozen=True)
class RunDir:
    """What a finished (or so far best) stage left: plain data; ``models.load_model`` makes a module of it."""

    path: Path
    model_spec: dict[str, Any]
    config: dict[str, Any]
    lineage: list[dict[str, Any]]

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    def weights(self) -> dict[str, Tensor]:
        """All tensors of ``model.safetensors``, by parameter name, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / WEIGHTS)


def accepted_digests(entry: dict[str, Any], key: str = "weights_sha256") -> tuple[str | None, ...]:
    """The digests a file of the run may have: a run that dies while it replaces its weights leaves the ones before,
    which are as good."""
    return entry.get(key), entry.get(f"previous_{key}")


def open_run(path: Path) -> RunDir:
    """Read a run directory and check it against the digests of its own lineage.

    Raises:
        UserError: files are missing, unreadable, or differ from what the stage wrote; all findings at once.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory; give the --out of a training stage")
    missing = [name for name in (CONFIG, MODEL, WEIGHTS, TOKENIZER, LINEAGE) if not (path / name).is_file()]
    if missing and (path / EXPORT).is_file():
        raise UserError(f"{path}: holds an exported model, which is to be run; give the run directory it was made from")
    if missing:
        raise UserError(
            f"{path}: not a complete run directory, missing {', '.join(missing)}; run the training stage to its first checkpoint"
        )
    lineage = read_yaml(path / LINEAGE)
    if not isinstance(lineage, list) or not lineage or not isinstance(lineage[-1], dict):
        raise UserError(f"{path / LINEAGE}: holds no stages; the file is damaged, train again or restore a copy")
    findings = []
    for key, name in DIGESTS.items():
        expected, found = lineage[-1].get(key), sha256_of(path / name)
        if found not in accepted_digests(lineage[-1], key):
            findings.append(
                f"{path / name}: digest {found[:12]} differs from {str(expected)[:12]} in {LINEAGE}; "
                "the file is truncated, edited or of another run: restore it or train again"
            )
    if findings:
        raise UserError.of(findings)
    return RunDir(path, read_yaml(path / MODEL), read_yaml(path / CONFIG), lineage)
