"""Shar directories on web servers and in object stores, copied to this machine as the user asks for it; no manifest can ask for it."""

from __future__ import annotations

import gzip
import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, cast

from lhotse.serialization import open_best
from lhotse.utils import SmartOpen

from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import open_cuts
from asrkit.data.parallel import in_processes
from asrkit.data.shar import FIELDS, shards_of
from asrkit.disk import atomic_write
from asrkit.errors import UserError, clip
from asrkit.extras import available, require

SCHEMES = ("https", "http", "s3", "gs", "azure", "ais", "msc")  # nothing that runs a program, as lhotse's pipe: does
MAX_SHARDS = 100_000
CUTS = re.compile(r"cuts\.(?:\d+|\{(\d+)\.\.(\d+)\})\.jsonl(?:\.gz)?")
ADDRESS = "address.sha256"  # of the folder that the shards came from; an address itself may have a password
BLOCK = 1 << 20  # bytes
TIMEOUT = 60.0  # seconds that a web server may say nothing


def fetch_shar(
    pattern: str, out: Path, fields: tuple[str, ...] = ("recording",), there: Callable[[Path], None] = lambda path: None
) -> CutTable:
    """Copy the shards of a Shar directory to ``out``, which is then one; files that are there are not fetched again.

    Every file is read by lhotse's ``open_best``, which takes what the URL needs: smart_open, or the client of AIStore.

    Args:
        pattern: URL of the cuts of one shard, or of several: https://HOST/corpus/cuts.{000000..000009}.jsonl.gz.
        fields: recording, features or both: those whose tar files are fetched from beside the cuts.
        there: called with each file, in order, once it is there.

    Returns:
        The cuts, checked as those of any manifest.

    Raises:
        UserError: a URL that names no shard, or cannot be read; ``out`` has shards of another address; what came is no Shar directory.
    """
    urls = list(shard_urls(pattern))
    for field in fields:
        if field not in FIELDS:
            raise UserError(f"--field {field}: choose from {', '.join(FIELDS)}")
    _check_address(pattern.rpartition("/")[0], out)
    _set_timeout(pattern)
    tars = [_tar_of(url, field) for field in dict.fromkeys(fields) for url in urls]
    for files in (tars, urls):  # what is interrupted between them is no Shar directory yet
        for path in in_processes(partial(_fetch, out=out), files, threads=True):
            there(path)
    return open_cuts(out, need_text=False)


def shard_urls(pattern: str) -> Iterator[str]:
    """The URLs that a pattern stands for.

    Raises:
        UserError: no URL of a known kind, or none of the cuts of a shard.
    """
    scheme, colon, _ = pattern.partition("://")
    if not colon or scheme not in SCHEMES:
        raise UserError(f"{pattern}: give a URL that begins with one of {', '.join(f'{name}://' for name in SCHEMES)}")
    base, _, name = pattern.rpartition("/")
    match = CUTS.fullmatch(name)
    if match is None:
        raise UserError(
            f"{pattern}: does not end as the cuts of a Shar directory do; write .../cuts.000000.jsonl.gz, or for several shards "
            ".../cuts.{000000..000009}.jsonl.gz"
        )
    if match[1] is None:
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + MAX_SHARDS:
        raise UserError(
            f"{pattern}: {{{match[1]}..{match[2]}}} is no range of at most {MAX_SHARDS} shards; give the lower number first"
        )
    for number in range(first, last + 1):
        yield f"{base}/{name[: match.start(1) - 1]}{number:0{len(match[1])}d}{name[match.end(2) + 1 :]}"


def _check_address(base: str, out: Path) -> None:
    """Refuse a folder with shards of another address: files of the same name would be taken for those asked for."""
    path, digest = out / ADDRESS, hashlib.sha256(base.encode()).hexdigest()
    if not path.exists():
        if out.is_dir() and shards_of(out):
            raise UserError(f"{out}: has shards that `asrkit data fetch` did not copy; choose another --out")
        with atomic_write(path) as temporary:
            temporary.write_text(f"{digest}\n", encoding="ascii")
    elif path.read_text(encoding="utf-8", errors="replace").strip() != digest:
        if shards_of(out):
            raise UserError(f"{out}: has shards of another address than {base}; choose another --out")
        path.unlink()  # nothing came from there, as of a mistyped one
        _check_address(base, out)


def _set_timeout(url: str) -> None:
    """Let a web server that stops answering end the command. The clients of object stores have timeouts of their own."""
    if available("remote"):
        SmartOpen.transport_params = None  # lhotse warns of others than those it has
        SmartOpen.setup({"timeout": TIMEOUT} if url.startswith("http") else None)


def _tar_of(url: str, field: str) -> str:
    base, _, name = url.rpartition("/")
    return f"{base}/{field}.{name.split('.')[1]}.tar"


def _fetch(url: str, out: Path) -> Path:
    name = url.rpartition("/")[2]
    path = out / (name if name.endswith((".gz", ".tar")) else f"{name}.gz")
    if not path.exists():
        with atomic_write(path) as temporary, _opened(temporary, path.suffix) as copy:
            for block in _blocks(url):
                copy.write(block)
            copy.flush()
            if path.suffix == ".tar":
                _check_tar(temporary, url)
    return path


def _check_tar(path: Path, url: str) -> None:
    """Refuse what a server has sent in place of a tar file, such as a page to log in, before it is kept."""
    try:
        with tarfile.open(path, "r:") as tar:
            tar.next()
    except tarfile.TarError as error:
        raise UserError(
            f"{url}: the answer is not a tar file ({clip(error)}); check the URL, and run the command again"
        ) from error


def _blocks(url: str) -> Iterator[bytes]:
    """The content of a URL. Errors of reading have a type of their own, because those of writing are an ``OSError`` too."""
    try:
        with open_best(url, "rb") as source:
            while block := source.read(BLOCK):
                yield block
    except Exception as error:  # the libraries' errors are of many kinds; lhotse puts its own in their place
        if not available("remote"):
            require("remote", for_=url)
        raise UserError(
            f"{url}: cannot read it ({clip(error.__context__ or error)}); check the URL, and run the command again"
        ) from error


def _opened(path: Path, suffix: str) -> IO[bytes]:
    """A file to write; cuts come unpacked, as lhotse reads them, and are packed again."""
    return open(path, "wb") if suffix == ".tar" else cast(IO[bytes], gzip.open(path, "wb", 1))
