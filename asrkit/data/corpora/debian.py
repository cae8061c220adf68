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

from asrkit.disk import atomic_write, sha256_of
from asrkit.errors import UserError

SUMS = "SHA256SUMS"
ELSEWHERE = "'asrkit data import' takes recordings of your own"


def fetch_packages(names: Sequence[str], cache: Path, say: Callable[[str], None] = print) -> list[Path]:
    """The newest .deb of each package, from ``cache`` or downloaded into it; needs neither root nor package lists.

    apt-get checks what it downloads against the archive's signed lists, and SHA256SUMS in ``cache`` keeps the digests. A file that
    is not in it, or is other than it says, is downloaded again.

    Raises:
        UserError: apt-get is missing or fails.
    """
    missing = [name for name in names if _verified(name, cache) is None]
    if missing:
        if shutil.which("apt-get") is None:
            raise UserError.of(_without_apt(missing, cache))
        say(f"downloading {', '.join(missing)} to {cache}")
        with _private_apt(cache) as apt_get:
            apt_get("update")
            apt_get("download", *missing)
    packages = {name: _verified(name, cache) for name in names}
    if lost := [name for name, path in packages.items() if path is None]:
        raise UserError(f"{', '.join(lost)}: apt-get downloaded nothing; {ELSEWHERE}")
    return [path for path in packages.values() if path is not None]


def _without_apt(missing: list[str], cache: Path) -> list[str]:
    copied = [name for name in missing if any(cache.glob(f"{name}_*.deb"))]
    lines = []
    if copied:
        lines.append(
            f"{', '.join(copied)}: nothing says that the files in {cache} are Debian's own; if you trust them, run there: "
            f"sha256sum *.deb > {SUMS}"
        )
    if absent := [name for name in missing if name not in copied]:
        lines.append(
            f"{', '.join(absent)}: downloading takes apt-get, and this machine has none; copy the .deb files of Debian's archive, "
            f"with {SUMS}, to {cache}, or {ELSEWHERE}"
        )
    return lines


def _verified(name: str, cache: Path) -> Path | None:
    """The newest file of a package in the cache that is the one SHA256SUMS says."""
    digests = _digests(cache)
    whole = [path for path in sorted(cache.glob(f"{name}_*.deb")) if digests.get(path.name) == sha256_of(path)]
    return whole[-1] if whole else None


def _digests(cache: Path) -> dict[str, str]:
    """The digests in SHA256SUMS by file name, as sha256sum writes them."""
    try:
        lines = (cache / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    return {name.strip().lstrip("*"): digest for digest, _, name in (line.partition(" ") for line in lines)}


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
        digests = _digests(cache)
        for package in (Path(folder) / "new").glob("*.deb"):
            digests[package.name] = sha256_of(package)
            package.replace(cache / package.name)
        with atomic_write(cache / SUMS) as temporary:
            lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
            temporary.write_text("".join(lines), encoding="utf-8")


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
