"""A stage's claim to a run directory: what it holds, whether this run may write there, and the lock that keeps others out.

Nothing is written before all of this is known. A run that is refused before its training starts leaves nothing behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from asrkit.config import differences
from asrkit.data.manifests import digest_of
from asrkit.disk import cannot_write, remove
from asrkit.errors import UserError
from asrkit.migration import FORMAT
from asrkit.run_dir import (
    CONFIG,
    DONE,
    LINEAGE,
    MODEL,
    STATE,
    TOKENIZER,
    WEIGHTS,
    open_run,
    read_yaml,
    stored_model,
    write_yaml,
)
from asrkit.training.checkpoint import STATE_FILE

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # errors of file systems without locks
FREE = (
    "bad_cuts",
    "data.num_workers",
    "asynchronous.ray_address",
    "asynchronous.gpus_per_worker",
)  # settings that may differ when a run is resumed: they change no result, or only what becomes of cuts that cannot be read

Inputs = Mapping[str, Mapping[str, str]]  # by option: path and sha256

MOST_TRIES = 100  # of a lock whose file is never the one at its path, as on some network file systems


@dataclass
class Claim:
    """A run directory that a run has claimed.

    config: content of config.yaml, from the start of the run. fresh: there is no state to resume. new: config.yaml was written now.
    finished: trained to the last step. made: directories that were made for it, outermost first. notes: lines for the user.
    """

    config: dict[str, Any]
    fresh: bool
    new: bool
    finished: bool
    made: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def known_inputs(files: Mapping[str, Path | None]) -> dict[str, dict[str, str]]:
    """Path and SHA-256 of the files a run depends on, by option. Weights of a run directory include its model.yaml and tokenizer.

    Raises:
        UserError: files that do not exist or cannot be read.
    """
    every = {name: path for name, path in files.items() if path is not None}
    for name, path in list(every.items()):
        if path.name == WEIGHTS:
            parts = {f"{name} {part}": path.with_name(part) for part in (MODEL, TOKENIZER)}
            every |= {option: part for option, part in parts.items() if part.is_file()}
    inputs, findings = {}, []
    for name, path in every.items():
        try:
            if not path.exists():
                findings.append(f"{path}: no such file (--{name})")
            else:
                inputs[name] = {"path": str(path), "sha256": digest_of(path, sound=False)}
        except OSError as error:
            findings.append(f"{path}: cannot be read ({error.strerror or error}) (--{name})")
    if findings:
        raise UserError.of(findings)
    return inputs


def claim(path: Path, content: dict[str, Any], lock: ExitStack) -> Claim:
    """Claim ``path`` for the run that config.yaml's ``content`` describes; an interrupted run of that content is resumed.

    Args:
        lock: holds the lock of the directory afterwards.

    Raises:
        UserError: the directory holds a run of another stage, settings or inputs, is damaged, or another process trains there.
            The directory is unchanged.
    """
    made: list[Path] = []
    held = False
    try:
        _existing(path, content)  # checked before anything is written, and again under the lock
        made = [folder for folder in (path, *path.parents) if not folder.exists()][::-1]
        path.mkdir(parents=True, exist_ok=True)
        notes = lock.enter_context(locked(path))
        held = True
        begun = _existing(path, content)
        for folder in (path, path / STATE):
            for left in folder.glob(".tmp-*"):  # of any host: only the holder of the lock writes here
                remove(left)
        if begun is None:
            clear(path)  # the files of a run that saved nothing
            write_yaml(path / CONFIG, content)
    except Exception as error:
        unmake(made, held)
        lock.close()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise
    fresh, finished = not (path / STATE / STATE_FILE).is_file(), (path / DONE).is_file()
    return Claim(begun or content, fresh, begun is None, finished, made, notes)


def _existing(path: Path, content: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of the run in ``path``, if it is this run; None if there is no run, or one that saved nothing."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; choose another --out")
    if not (path / CONFIG).is_file():
        names = [item.name for item in path.iterdir()] if path.is_dir() else []
        if strangers := sorted(name for name in names if name != LOCK and not name.startswith(".tmp-")):
            raise UserError(f"{path}: holds other files ({', '.join(strangers[:3])}) and no run; choose another --out")
        return None
    begun = read_yaml(path / CONFIG)
    if not isinstance(begun, dict) or begun.get("stage") != content["stage"]:
        stage = begun.get("stage") if isinstance(begun, dict) else "unknown"
        raise UserError(f"{path}: is a run of {stage}, not of {content['stage']}; choose another --out")
    if (path / MODEL).is_file() and (number := stored_model(path).get("format", 0)) != FORMAT:
        raise UserError(
            f"{path}: was started by an older version of asrkit (format {number}, now {FORMAT}) and cannot be resumed; start from it "
            "with --from and another --out, or finish it with that version"
        )
    if changed := changes(begun, content):
        if not any((path / name).exists() for name in (f"{STATE}/{STATE_FILE}", WEIGHTS, LINEAGE, DONE)):
            return None
        if "from" in content and Path(content["from"]).resolve() == path.resolve():
            raise UserError(f"{path}: is the run that training starts from (--from); choose another --out")
        advice = "use the same settings and inputs to resume, or choose another --out"
        if (path / DONE).is_file():
            advice = f"to train it further, give --from {path} and another --out; to train anew, another --out"
        raise UserError.of([f"{path}: was started with different {line}" for line in changed] + [f"{path}: {advice}"])
    if (path / DONE).is_file() or (path / WEIGHTS).is_file():
        try:
            open_run(path)
        except UserError as error:
            advice = f"{path}: its files are damaged or missing; restore them from a copy, or remove it and train again"
            raise UserError(*error.lines, advice) from None
    return begun


def changes(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between the configurations of two runs: settings, and the content of inputs, whatever their paths."""
    before, after = _inputs(begun), _inputs(now)
    # A changed input is one line; settings that name it are not reported again.
    changed = {name for name in before if name in after and before[name]["sha256"] != after[name]["sha256"]}
    lines = [
        f"bytes: --{name} {after[name]['path']}: sha256 {before[name]['sha256'][:12]} -> {after[name]['sha256'][:12]}"
        for name in before
        if name in changed
    ]
    old, new = _by_content(begun, before, changed), _by_content(now, after, changed)
    return lines + [
        f"settings: {line}" for line in differences(old, new) if not line.startswith(tuple(f"{key}:" for key in FREE))
    ]


def _inputs(content: Mapping[str, Any]) -> Inputs:
    """The inputs of a configuration that have digests; earlier versions wrote paths only."""
    inputs = content.get("inputs")
    if not isinstance(inputs, Mapping):
        return {}
    return {
        name: entry for name, entry in inputs.items() if isinstance(entry, Mapping) and {*entry} >= {"path", "sha256"}
    }


def _by_content(content: Mapping[str, Any], inputs: Inputs, changed: set[str]) -> dict[str, Any]:
    """A configuration with the paths of inputs, and of the run directories they are in, replaced by digests."""
    tokens: dict[str, str] = {}
    for name, entry in inputs.items():
        token = name if name in changed else entry["sha256"]
        tokens[entry["path"]] = tokens[entry["sha256"]] = token
        if Path(entry["path"]).name == WEIGHTS:
            tokens[str(Path(entry["path"]).parent)] = token

    def known(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {tokens.get(key, key): known(part) for key, part in value.items()}
        if isinstance(value, list):
            return [known(part) for part in value]
        return tokens.get(value, value) if isinstance(value, str) else value

    without_digest = {name: entry for name, entry in (content.get("inputs") or {}).items() if name not in inputs}
    named = {name: tokens[entry["sha256"]] for name, entry in inputs.items()}
    return {
        **known({key: value for key, value in content.items() if key != "inputs"}),
        "inputs": {**without_digest, **named},
    }


@contextmanager
def locked(path: Path) -> Iterator[list[str]]:
    """Hold the lock of a directory; yields lines for the user.

    A record lock (POSIX) belongs to a process: a forked process does not inherit it, and it disappears with the process. Where
    another process has removed the file between its opening and the lock, the next one is taken; else two could lock two files of that name.

    Raises:
        UserError: another process holds it. OSError: the lock file cannot be made.
    """
    descriptor, notes = _lock(path)
    try:
        os.ftruncate(descriptor, 0)
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {began}\n".encode())
        yield notes
    finally:
        os.close(descriptor)


def _lock(path: Path) -> tuple[int, list[str]]:
    """A descriptor of the locked file, and lines for the user."""
    for tries in count():
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path / LOCK)):
                return descriptor, []
            if tries == MOST_TRIES:
                return descriptor, [_without_locks(path)]
        except FileNotFoundError:  # removed since it was opened
            pass
        except OSError as error:
            if error.errno in NO_LOCKS:
                return descriptor, [_without_locks(path)]
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise UserError(
                f"{path}: another run is training there ({holder or 'unknown'}); wait for it or choose another --out"
            ) from None
        os.close(descriptor)
    raise AssertionError  # count() has no end


def _without_locks(path: Path) -> str:
    return f"{path}: its file system has no locks; make sure that no other run writes there"


def clear(path: Path) -> None:
    """Remove everything a run wrote, except its lock."""
    for item in path.iterdir():
        if item.name != LOCK:
            remove(item)


def unmake(made: list[Path], held: bool) -> None:
    """Remove directories that were made for the run and hold nothing, or only its own lock, which must still be ``held``."""
    for folder in reversed(made):
        with suppress(OSError):
            if held and [item.name for item in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
            folder.rmdir()
