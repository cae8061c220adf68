"""Files that are whole or do not exist, whenever the process or the machine dies, and the message if they cannot be written."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from asrkit.errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Errors of file systems that cannot sync a directory, such as CIFS and some of FUSE.
NO_SUCH_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error to raise if ``path`` cannot be written."""
    remedy = "free some space" if error.errno in NO_SPACE else "fix that"
    return UserError(f"{path}: cannot write ({error.strerror or error}); {remedy} or choose another location")


def sync(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on disk, where the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SUCH_SYNC):
            raise
    finally:
        os.close(descriptor)


def replace(source: Path, path: Path) -> None:
    """Let ``source``, whose bytes are on disk, become ``path``."""
    os.replace(source, path)
    sync(path.parent)


@cache
def _this_host() -> str:
    """This machine in eight letters; on a shared disk its process numbers say nothing of other machines' processes."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


@cache  # once a process: a directory may hold many files
def _remove_left_behind(folder: Path) -> None:
    """Remove what killed processes of this machine were writing in a directory."""
    with suppress(OSError):
        for left in os.listdir(folder):
            match = re.match(rf"\.tmp-(\d+)-{_this_host()}-", left)
            if match is not None and not _runs(int(match[1])):
                remove(folder / left)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # it runs as another user; or nobody can say
    return True


def remove(path: Path) -> None:
    """Remove a file, or a directory with all in it, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _temporary(path: Path) -> Path:
    """Where this process writes what becomes ``path``."""
    _remove_left_behind(path.parent.absolute())
    # The suffixes stay last: writers choose the format (.jsonl.gz) by them.
    return path.parent / f".tmp-{os.getpid()}-{_this_host()}-{path.name}"


def special(path: Path) -> bool:
    """Whether a path is taken by what is neither a file nor a directory, such as ``/dev/stdout``: renaming would replace the device itself."""
    if path.is_symlink() and str(path.readlink()).startswith("/proc/"):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it becomes ``path`` only when the block succeeds.

    The bytes are on disk before the rename, so a reader sees the old file or the new one, never a part.

    Raises:
        UserError: the disk is full or the location cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    if special(path):
        raise UserError(f"{path}: is a device or a pipe, not a file; choose another location")
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_not_read(out: Path, inputs: Iterable[Path | None], option: str = "--out") -> None:
    """Refuse to write a file over one that the same command reads.

    Raises:
        UserError: ``out`` is one of the ``inputs``, by whatever name.
    """
    for path in inputs:
        if path is not None and path.exists() and out.exists() and out.samefile(path):
            raise UserError(
                f"{option} {out}: is a file that this command reads, and would be replaced; choose another name"
            )


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work that it is to hold; creates nothing.

    Raises:
        UserError: it is a directory, a part of the path is a file, or the folder cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give a file")
    if special(path):
        raise UserError(f"{path}: is a device or a pipe, not a file; choose another location")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"{path}: {folder} is a file, not a folder; choose another location")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: cannot write (Permission denied); fix that or choose another location")


def occupied(out: Path) -> list[str]:
    """Why ``out`` cannot become a new directory, for a stage to report among its other findings; [] if it can."""
    if out.is_symlink() or out.absolute().is_mount():
        return [
            f"{out}: is a {'link' if out.is_symlink() else 'mount point'}, which a new directory cannot replace; choose another --out"
        ]
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
        UserError: the path is taken or cannot be written, or the disk is full; nothing is left behind.
    """
    if findings := occupied(path):
        raise UserError.of(findings)
    path = Path(path).absolute()
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            sync(written)
        replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
