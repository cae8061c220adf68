"""Manifests on disk: Lhotse cuts, one JSON object a line (``.jsonl``, ``.jsonl.gz``) or a Shar directory."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item

from asrkit.config import digest
from asrkit.data.cut_table import Columns, CutTable, Row, row_of, row_of_json, with_supervision
from asrkit.data.cut_table import text_of as text_of  # with the other words about a cut, below
from asrkit.data.manifest_schema import (
    MAX_DEPTH,
    allowed_sources,
    check_cut,
    deeper_than,
    has_surrogates,
    without_nulls,
)
from asrkit.data.parallel import ALONE, every_core, in_processes
from asrkit.data.remembered import WORTH, recall, remember
from asrkit.data.shar import FIELDS, attach, members_of, shards_of, tar_of
from asrkit.disk import atomic_write, sha256_of
from asrkit.errors import UserError, clip

MAX_FINDINGS = 20  # a file of another format is wrong on every line: the first few say it all
MAX_LINE = 64 << 20  # bytes
BLOCK = 16 << 20  # bytes
SYNTHETIC = "synthetic"  # what a synthetic cut's supervision says of its voice
PART, MANY_PARTS = 2000, 25  # lines that are checked at a time; from so many parts on by all cores


def open_cuts(path: Path, need_text: bool = True) -> CutTable:
    """Read and check a manifest: the text of its cuts is in memory, their audio is not. Nothing is run or fetched.

    A large manifest that was checked before, by its digest, is not checked again (``remembered.py``).

    Args:
        need_text: where it is not needed, a cut without a supervision is given one without words.

    Raises:
        UserError: missing, empty, truncated, broken JSON, values of the wrong type, sources that are not files, a cut
            without text, an id twice; all of them, with line numbers.
    """
    path = Path(path)
    if path.is_dir():
        return _open_shar(path, need_text)
    if not path.exists():
        raise UserError(f"{path}: no such manifest; 'asrkit data import' and 'asrkit data prompts' make them")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path}: not a manifest; give a .jsonl or .jsonl.gz file of cuts, or a Shar directory")
    return _read_cuts([path], need_text)


def _open_shar(folder: Path, need_text: bool) -> CutTable:
    if not (shards := shards_of(folder)):
        raise UserError(
            f"{folder}: not a Shar directory (no cuts.*.jsonl.gz in it); give a manifest file or a Shar directory"
        )
    members = {cut_id: fields for shard in shards for cut_id, fields in members_of(shard).items()}
    cuts, findings = [], []
    for cut in _read_cuts(shards, need_text):
        try:
            cuts.append(attach(cut, members.get(cut.id, {})))
        except ValueError as error:
            findings.append(f"{folder}: {error}")
    if findings:
        raise UserError.of(_few(findings, folder))
    return CutTable(cuts)


def _read_cuts(paths: list[Path], need_text: bool) -> CutTable:
    files = [_read_file(path, need_text) for path in paths]
    table = files[0].table if len(files) == 1 else CutTable.joined([file.table for file in files])
    findings = [(index, *finding) for index, file in enumerate(files) for finding in file.findings]
    findings += _twice(table, files, paths)
    if findings:
        lines = [f"{paths[index]}:{number}: {what}" for index, number, what in sorted(findings)]
        raise UserError.of(_few(lines, paths[0]))
    if not len(table):
        raise UserError(f"{paths[0]}: the manifest is empty; make it again, or give another")
    return table


def _twice(table: CutTable, files: Sequence[_File], paths: list[Path]) -> list[tuple[int, int, str]]:
    """A finding (file, line, what) for each cut of the files' ``table`` whose id an earlier one has."""
    unique, counts = np.unique(table.columns.hashes, return_counts=True)
    if len(unique) == len(table):
        return []
    findings, first = [], {}  # type: list[tuple[int, int, str]], dict[str, str]
    ends = np.cumsum([len(file.table) for file in files])
    for row in np.flatnonzero(np.isin(table.columns.hashes, unique[counts > 1])).tolist():
        index = int(np.searchsorted(ends, row, side="right"))
        number = int(files[index].numbers[row - ends[index]])  # a negative index counts from the file's end
        cut_id = table[row].id
        if cut_id in first:
            findings.append(
                (index, number, f"cut {clip(cut_id)} is already at {first[cut_id]}; give each cut its own id")
            )
        first.setdefault(cut_id, f"{paths[index]}:{number}")
    return findings


def _few(findings: list[str], path: Path) -> list[str]:
    rest = len(findings) - MAX_FINDINGS
    return findings if rest <= 0 else [*findings[:MAX_FINDINGS], f"{path}: {rest} more lines like these"]


class _File(NamedTuple):
    """The cuts of one file, the line number of each, and what is wrong with other lines: (number, what)."""

    table: CutTable
    numbers: np.ndarray
    findings: list[tuple[int, str]]


class _Opened(NamedTuple):
    """A file without findings whose text some table still has; where its lines are, and what is known of their cuts."""

    text: weakref.ref[np.ndarray]
    starts: np.ndarray
    ends: np.ndarray
    numbers: np.ndarray
    columns: Columns


# A training opens its manifest more than once. Nothing is kept of a manifest whose cuts nobody has any more.
_OPENED: dict[tuple[str, bool, frozenset[str]], _Opened] = {}


def _read_file(path: Path, need_text: bool) -> _File:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _damaged(path, 1, error) from error
    digest, sources = hashlib.sha256(raw).hexdigest(), allowed_sources()
    key = (digest, need_text, sources)
    if (opened := _OPENED.get(key)) is not None and (text := opened.text()) is not None:
        table = CutTable.of_lines(text, opened.starts, opened.ends, opened.columns, digest)
        return _File(table, opened.numbers, [])
    text = _unpacked(path, raw)
    del raw
    starts, ends, numbers = _lines(text)
    kind, told = "manifest", [digest, str(need_text), *sorted(sources)]
    known = recall(kind, told) if len(starts) >= WORTH else None
    if known is not None:
        names = tuple(json.loads(known.pop("names").tobytes()))
        columns, findings, rows = Columns(**known, names=names), list[tuple[int, str]](), None
    else:
        columns, findings, rows = _check_lines(path, text, starts, ends, numbers, need_text)
        if not findings and len(starts) >= WORTH:
            names_text = np.frombuffer(json.dumps(columns.names).encode(), np.uint8)
            remember(kind, told, {**vars(columns), "names": names_text})
    if rows is not None:
        starts, ends, numbers = starts[rows], ends[rows], numbers[rows]
    if not findings:
        here = weakref.ref(text, lambda _: _OPENED.pop(key, None))
        _OPENED[key] = _Opened(here, starts, ends, numbers, columns)
    return _File(CutTable.of_lines(text, starts, ends, columns, digest), numbers, findings)


def _damaged(path: Path, number: int, error: Exception) -> UserError:
    return UserError(
        f"{path}:{number}: cannot read further ({clip(error)}); the file is truncated or damaged, make it again"
    )


def _unpacked(path: Path, raw: bytes) -> np.ndarray:
    """The text of a manifest, (bytes,) uint8.

    Raises:
        UserError: it is truncated or damaged, or has a line without end.
    """
    if raw[:2] != b"\x1f\x8b":  # by content, as a browser may have unpacked the file
        return np.frombuffer(raw, dtype=np.uint8)
    text, line = bytearray(), 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            while block := file.read(BLOCK):
                line = line + len(block) if (last := block.rfind(b"\n")) < 0 else len(block) - last
                if line > MAX_LINE:
                    raise _too_long(path, text.count(b"\n") + block.count(b"\n") + 1)
                text += block
    except (EOFError, OSError, zlib.error) as error:
        raise _damaged(path, text.count(b"\n") + 1, error) from error
    return np.frombuffer(text, dtype=np.uint8)


def _too_long(path: Path, number: int) -> UserError:
    return UserError(f"{path}:{number}: longer than {MAX_LINE >> 20} million characters, so not a manifest")


def _lines(text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the lines of a text that are not blank begin and end, and their numbers from 1: int64 (N,) each."""
    blocks = range(0, len(text), BLOCK)
    breaks = [np.flatnonzero(text[first : first + BLOCK] == ord("\n")) + first for first in blocks]
    ends = np.concatenate([*breaks, [len(text)]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    filled = np.zeros(len(starts), bool)
    filled[ends > starts] = text[starts[ends > starts]] == ord("{")
    for row in np.flatnonzero(~filled & (ends > starts)):
        filled[row] = bool(text[starts[row] : ends[row]].tobytes().strip())
    rows = np.flatnonzero(filled)
    return starts[rows], ends[rows], rows + 1


def _check_lines(
    path: Path, text: np.ndarray, starts: np.ndarray, ends: np.ndarray, numbers: np.ndarray, need_text: bool
) -> tuple[Columns, list[tuple[int, str]], np.ndarray | None]:
    """What is known of the cuts, what is wrong with other lines, and the rows of the good ones, if these are not all.

    Raises:
        UserError: bytes that are no text; a line without end.
    """

    bounds = list(zip(numbers.tolist(), starts.tolist(), ends.tolist(), strict=True))

    def check(rows: range) -> tuple[Columns, list[tuple[int, str]], list[int]]:
        findings: list[tuple[int, str]] = []
        good: list[int] = []

        def of_cuts() -> Iterator[Row]:
            for row in rows:
                number, start, end = bounds[row]
                if end - start > MAX_LINE:
                    raise _too_long(path, number)
                try:
                    line = text[start:end].tobytes().decode()
                except UnicodeDecodeError as error:
                    raise _damaged(path, number, error) from error
                try:
                    known = _parse_line(line, need_text)
                except ValueError as error:
                    findings.append((number, str(error)))
                else:
                    good.append(row)
                    yield known

        return Columns.of_rows(of_cuts()), findings, good

    parts = [range(first, min(first + PART, len(starts))) for first in range(0, len(starts), PART)] or [range(0)]
    workers = every_core() if len(parts) >= MANY_PARTS else ALONE
    checked = list(in_processes(check, parts, workers, lambda rows: f"{path}:{numbers[rows.start]}"))
    findings = [finding for _, wrong, _ in checked for finding in wrong]
    rows = np.array([row for *_, good in checked for row in good], np.int64) if findings else None
    return Columns.joined([columns for columns, *_ in checked]), findings, rows


def _parse_line(line: str, need_text: bool) -> Row:
    """What is known of the cut that a line describes.

    Raises:
        ValueError: everything that is wrong with it.
    """
    try:
        data: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); fix or remove the line") from error
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep; remove the line") from error
    except ValueError as error:  # a number of more digits than Python takes
        raise ValueError(f"JSON that cannot be read ({clip(error)}); fix or remove the line") from error
    if r"\ud" in line.lower() and has_surrogates(data):
        raise ValueError("half a character (a lone surrogate) in a text, which no file takes; fix or remove the line")
    if not isinstance(data, dict):
        raise ValueError(f"not a Lhotse cut but {clip(repr(data), 60)}; fix or remove the line")
    if line.count("{") + line.count("[") > MAX_DEPTH and deeper_than(MAX_DEPTH, data):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep; remove the line")
    kind = data.get("type")
    if kind not in ("MonoCut", "MultiCut", "MixedCut", "Cut"):
        made = "Recording" if "sources" in data else "SupervisionSegment" if "text" in data else "something else"
        if kind is None and made != "something else":
            raise ValueError(f"a {made}, not a cut; 'lhotse cut simple' joins recordings and supervisions")
        raise ValueError(f"{_name(data)}: not a Lhotse cut (type {clip(repr(kind), 60)}); fix or remove the line")
    if "null" in line:
        data = without_nulls(data)
    findings = check_cut(data)
    if findings:
        raise ValueError(f"{_name(data)}: {'; '.join(findings)}; fix or remove the line")
    if (known := row_of_json(data)) is not None:
        return known
    try:
        cut = deserialize_item(data)
    except Exception as error:  # whatever a constructor says about fields it did not expect
        raise ValueError(f"{_name(data)}: not a Lhotse cut ({clip(error)}); fix or remove the line") from error
    if not need_text:
        cut = with_supervision(cut)
    if not cut.supervisions:
        raise ValueError(f"{_name(data)}: no supervision; add one with the text, or remove the line")
    if need_text and not all((supervision.text or "").strip() for supervision in cut.supervisions):
        raise ValueError(f"{_name(data)}: the text is empty; add it, or remove the line")
    return row_of(cut)


def _name(data: dict[str, Any]) -> str:
    return f"cut {clip(data['id'])}" if isinstance(data.get("id"), str) else "a cut without id"


def write_cuts(path: Path, cuts: Iterable[Cut]) -> None:
    """Write cuts as ``.jsonl.gz``, atomically; equal cuts give equal bytes, so that digests mean something.

    Raises:
        UserError: the file cannot be written.
    """
    # No name and no time in the gzip header: they would differ from run to run.
    with (
        atomic_write(path) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file,
    ):
        for cut in cuts:
            file.write(json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\n")


def make_cut(
    cut_id: str,
    audio: Path,
    *,
    sampling_rate: int,
    num_samples: int,
    channels: int = 1,
    text: str | None,
    language: str | None = None,
    speaker: str | None = None,
    custom: dict[str, Any] | None = None,
) -> MonoCut:
    """A cut over a whole audio file (its first channel), with one supervision; the path is made absolute."""
    duration = num_samples / sampling_rate
    recording = Recording(
        id=cut_id,
        sources=[AudioSource("file", list(range(channels)), str(audio.absolute()))],
        sampling_rate=sampling_rate,
        num_samples=num_samples,
        duration=duration,
    )
    supervision = SupervisionSegment(
        id=cut_id,
        recording_id=cut_id,
        start=0,
        duration=duration,
        text=text,
        language=language,
        speaker=speaker,
        custom=custom or None,
    )
    return MonoCut(id=cut_id, start=0, duration=duration, channel=0, recording=recording, supervisions=[supervision])


def language_of(cut: Cut) -> str:
    """The language of a cut's (first) supervision; empty where it names none."""
    return cut.supervisions[0].language or ""


def speaker_of(cut: Cut) -> str:
    """The speaker of a cut's (first) supervision; empty where it names none."""
    return cut.supervisions[0].speaker or ""


def is_labeled(cut: Cut) -> bool:
    """Whether the text of a cut is a recognizer's, and not given."""
    return any("labeled_by" in (supervision.custom or {}) for supervision in cut.supervisions)


def is_synthetic(cut: Cut) -> bool:
    """Whether `asrkit data synthesize` made the cut."""
    return any(SYNTHETIC in (supervision.custom or {}) for supervision in cut.supervisions)


def digest_of(path: Path, sound: bool = True) -> str:
    """A SHA-256 that tells manifests apart by their content: of a file, its bytes; of a Shar directory, all its shards' files.

    Args:
        sound: False takes the tar files of a Shar directory by name and size, and reads the cuts alone.
    """
    if path.is_file():
        return sha256_of(path)
    shards = shards_of(path)
    tars = [tar for shard in shards for field in FIELDS if (tar := tar_of(shard, field)).is_file()]
    known = [[tar.name, sha256_of(tar) if sound else tar.stat().st_size] for tar in tars]
    return digest([*([shard.name, sha256_of(shard)] for shard in shards), *known])
