"""Manifests on disk: Lhotse cuts, one JSON object a line (``.jsonl``, ``.jsonl.gz``) or a Shar directory."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item

from asrkit.config import digest
from asrkit.data.manifest_schema import MAX_DEPTH, check_cut, deeper_than, has_surrogates, without_nulls
from asrkit.data.shar import FIELDS, attach, members_of, shards_of, tar_of
from asrkit.disk import atomic_write, sha256_of
from asrkit.errors import UserError, clip

MAX_FINDINGS = 20  # a file of another format is wrong on every line: the first few say it all
MAX_LINE = 64 << 20  # characters


def open_cuts(path: Path, need_text: bool = True) -> CutSet:
    """Read and check a manifest: its cuts are in memory, their audio is not. Nothing is run or fetched.

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
    return CutSet.from_cuts(_read_cuts([path], need_text))


def _open_shar(folder: Path, need_text: bool) -> CutSet:
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
    return CutSet.from_cuts(cuts)


def _read_cuts(paths: list[Path], need_text: bool) -> list[Cut]:
    cuts: list[Cut] = []
    findings: list[str] = []
    first_line: dict[str, str] = {}  # where each id was first seen
    for path in paths:
        for number, line in _numbered_lines(path):
            where = f"{path}:{number}"
            try:
                cut = _parse_cut(line, need_text)
            except ValueError as error:
                findings.append(f"{where}: {error}")
                continue
            if cut.id in first_line:
                findings.append(
                    f"{where}: cut {clip(cut.id)} is already at {first_line[cut.id]}; give each cut its own id"
                )
            first_line.setdefault(cut.id, where)
            cuts.append(cut)
    if findings:
        raise UserError.of(_few(findings, paths[0]))
    if not cuts:
        raise UserError(f"{paths[0]}: the manifest is empty; make it again, or give another")
    return cuts


def _few(findings: list[str], path: Path) -> list[str]:
    rest = len(findings) - MAX_FINDINGS
    return findings if rest <= 0 else [*findings[:MAX_FINDINGS], f"{path}: {rest} more lines like these"]


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with open(path, "rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"  # by content, as a browser may have unpacked the file
        with gzip.open(path, "rt", encoding="utf-8") if compressed else open(path, encoding="utf-8") as file:
            while line := file.readline(MAX_LINE):
                number += 1
                if len(line) == MAX_LINE:
                    raise UserError(
                        f"{path}:{number}: longer than {MAX_LINE >> 20} million characters, so not a manifest"
                    )
                if line.strip():
                    yield number, line
    except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}:{number + 1}: cannot read further ({clip(error)}); the file is truncated or damaged, make it again"
        ) from error


def _parse_cut(line: str, need_text: bool) -> Cut:
    """The cut that a line describes.

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
    if deeper_than(MAX_DEPTH, data):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep; remove the line")
    name = f"cut {clip(data['id'])}" if isinstance(data.get("id"), str) else "a cut without id"
    kind = data.get("type")
    if kind not in ("MonoCut", "MultiCut", "MixedCut", "Cut"):
        made = "Recording" if "sources" in data else "SupervisionSegment" if "text" in data else "something else"
        if kind is None and made != "something else":
            raise ValueError(f"a {made}, not a cut; 'lhotse cut simple' joins recordings and supervisions")
        raise ValueError(f"{name}: not a Lhotse cut (type {clip(repr(kind), 60)}); fix or remove the line")
    data = without_nulls(data)
    findings = check_cut(data)
    if findings:
        raise ValueError(f"{name}: {'; '.join(findings)}; fix or remove the line")
    try:
        cut = deserialize_item(data)
    except Exception as error:  # whatever a constructor says about fields it did not expect
        raise ValueError(f"{name}: not a Lhotse cut ({clip(error)}); fix or remove the line") from error
    if not need_text:
        cut = _with_supervision(cut)
    if not cut.supervisions:
        raise ValueError(f"{name}: no supervision; add one with the text, or remove the line")
    if need_text and not all((supervision.text or "").strip() for supervision in cut.supervisions):
        raise ValueError(f"{name}: the text is empty; add it, or remove the line")
    return cut


def _with_supervision(cut: Cut) -> Cut:
    """The cut, with one supervision without words if it has none."""
    if not cut.supervisions:
        recording = cut.recording_id if cut.has_recording else cut.id
        cut.supervisions = [SupervisionSegment(cut.id, recording, 0, cut.duration, text="")]
    return cut


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


def text_of(cut: Cut) -> str:
    """All supervisions' texts of a cut, in order of time, joined by a space."""
    return " ".join(s.text or "" for s in sorted(cut.supervisions, key=lambda s: s.start))


def language_of(cut: Cut) -> str:
    """The language of a cut's (first) supervision; empty where it names none."""
    return cut.supervisions[0].language or ""


def speaker_of(cut: Cut) -> str:
    """The speaker of a cut's (first) supervision; empty where it names none."""
    return cut.supervisions[0].speaker or ""


def is_labeled(cut: Cut) -> bool:
    """Whether the text of a cut is a recognizer's, and not given."""
    return any("labeled_by" in (supervision.custom or {}) for supervision in cut.supervisions)


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
