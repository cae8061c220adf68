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
from asrkit.data.shar import FIELDS, attach, places_in, shards_of, tar_of
from asrkit.errors import UserError
from asrkit.run_dir import atomic_write, sha256_of

MAX_FINDINGS = 20  # a file of another format is wrong on every line: the first few say it all


def open_cuts(path: Path, need_text: bool = True) -> CutSet:
    """Read and check a manifest: its cuts are in memory, their sound is not.

    Args:
        need_text: where it is not needed, a cut without a supervision is given one without words.

    Raises:
        UserError: missing, empty, truncated, broken JSON, a cut without text, an id twice; with line numbers.
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
    places = {cut_id: found for shard in shards for cut_id, found in places_in(shard).items()}
    cuts, findings = [], []
    for cut in _read_cuts(shards, need_text):
        try:
            cuts.append(attach(cut, places.get(cut.id, {})))
        except ValueError as error:
            findings.append(f"{folder}: {error}")
    if findings:
        raise UserError.of(_few(findings, folder))
    return CutSet.from_cuts(cuts)


def _read_cuts(paths: list[Path], need_text: bool) -> list[Cut]:
    cuts: list[Cut] = []
    findings: list[str] = []
    first_place: dict[str, str] = {}
    for path in paths:
        for number, line in _numbered_lines(path):
            place = f"{path}:{number}"
            try:
                cut = _parse_cut(line, need_text)
            except ValueError as error:
                findings.append(f"{place}: {error}")
                continue
            if cut.id in first_place:
                findings.append(f"{place}: cut {cut.id} is already at {first_place[cut.id]}; give each cut its own id")
            first_place.setdefault(cut.id, place)
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
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}:{number + 1}: cannot read on ({error}); the file is truncated or damaged, make it again"
        ) from error


def _parse_cut(line: str, need_text: bool) -> Cut:
    try:
        data: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); mend or remove the line") from error
    name = data.get("id", "without id") if isinstance(data, dict) else "?"
    try:
        cut = deserialize_item(data)
    except Exception as error:  # whatever a constructor says about fields it did not expect
        raise ValueError(f"cut {name}: not a Lhotse cut ({error}); mend or remove the line") from error
    if not isinstance(cut, Cut):
        raise ValueError(
            f"{name}: a {type(cut).__name__}, not a cut; 'lhotse cut simple' joins recordings and supervisions"
        )
    if not need_text:
        cut = _with_supervision(cut)
    if not cut.supervisions:
        raise ValueError(f"cut {name}: no supervision; add one with the text, or remove the line")
    if need_text and not all((supervision.text or "").strip() for supervision in cut.supervisions):
        raise ValueError(f"cut {name}: the text is empty; add it, or remove the line")
    if cut.duration <= 0:
        raise ValueError(f"cut {name}: duration {cut.duration} is not above 0; mend or remove the line")
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
        UserError: the place cannot be written.
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
    text: str,
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


def is_labeled(cut: Cut) -> bool:
    """Whether the text of a cut is a recognizer's, and not given."""
    return any("labeled_by" in (supervision.custom or {}) for supervision in cut.supervisions)


def digest_of(path: Path) -> str:
    """A SHA-256 that tells manifests apart by their content: of a file, its bytes; of a Shar directory, all its shards' files."""
    if path.is_file():
        return sha256_of(path)
    files = [*shards_of(path), *(tar_of(shard, field) for shard in shards_of(path) for field in FIELDS)]
    return digest([[file.name, sha256_of(file)] for file in files if file.is_file()])
