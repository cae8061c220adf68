"""Debian's archive without root: packages by ``apt-get`` with lists of its own, and what is in them."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from asrkit.errors import UserError

ELSEWHERE = "'asrkit data import' takes recordings of your own"


def fetch_packages(names: Sequence[str], cache: Path, say: Callable[[str], None] = print) -> list[Path]:
    """The newest .deb of each package, from ``cache`` or downloaded into it; needs neither root nor package lists.

    Raises:
        UserError: apt-get is missing or fails.
    """
    missing = [name for name in names if not _cached(name, cache)]
    if missing:
        if shutil.which("apt-get") is None:
            raise UserError(
                f"{', '.join(missing)}: downloading takes apt-get, and this machine has none; "
                f"copy the .deb files of Debian's archive to {cache}, or {ELSEWHERE}"
            )
        say(f"downloading {', '.join(missing)} to {cache}")
        with _private_apt(cache) as apt_get:
            apt_get("update")
            apt_get("download", *missing)
    return [_cached(name, cache)[-1] for name in names]


def _cached(name: str, cache: Path) -> list[Path]:
    return sorted(cache.glob(f"{name}_*.deb"))


@contextmanager
def _private_apt(cache: Path) -> Iterator[Callable[..., None]]:
    """apt-get with lists and caches of its own; what it downloads moves to ``cache`` when all of it is there."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-apt-", dir=cache) as folder:
        for name in ("lists/partial", "cache/archives/partial", "new"):
            (Path(folder) / name).mkdir(parents=True)

        def apt_get(*arguments: str) -> None:
            private = ("Dir::State::Lists=lists", "Dir::Cache=cache", "APT::Sandbox::User=root")
            settings = [word for s in private for word in ("-o", re.sub("=(?=lists|cache)", f"={folder}/", s))]
            done = subprocess.run(
                ["apt-get", "-q", *settings, *arguments], cwd=Path(folder) / "new", capture_output=True, text=True
            )
            if done.returncode != 0:
                lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
                reason = " ".join(lines[:2]) or done.stderr.strip()[-200:] or f"exit code {done.returncode}"
                raise UserError(f"apt-get {' '.join(arguments)}: {reason}; is the network there? Otherwise {ELSEWHERE}")

        yield apt_get
        for package in (Path(folder) / "new").glob("*.deb"):
            package.replace(cache / package.name)


def members_of(package: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a .deb, which is an ``ar`` archive that holds data.tar.*

    Raises:
        UserError: the file is not a whole .deb.
    """
    try:
        name, content = _data_archive(package.read_bytes())
        if PurePosixPath(name).suffix == ".zst":  # Ubuntu's; the standard library cannot open it before Python 3.14
            content = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                if member.isfile() and (file := archive.extractfile(member)):
                    yield member.name, file.read()
    except (ValueError, EOFError, OSError, tarfile.TarError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"{package}: not a whole Debian package ({error}); delete it, so that it is downloaded again"
        ) from error


def _data_archive(content: bytes) -> tuple[str, bytes]:
    """Name and bytes of data.tar.*; ar is a magic word, then a 60-byte header and the bytes, padded to even, for each file."""
    if not content.startswith(b"!<arch>\n"):
        raise ValueError("no ar archive")
    at = 8
    while at + 60 <= len(content):
        name = content[at : at + 16].decode().strip().rstrip("/")
        size = int(content[at + 48 : at + 58])
        at += 60
        if name.startswith("data.tar"):
            if at + size > len(content):
                raise ValueError("truncated")
            return name, content[at : at + size]
        at += size + size % 2
    raise ValueError("no data.tar in it")
