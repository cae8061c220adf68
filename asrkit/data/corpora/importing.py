"""Recordings of the user's own: a TSV of paths and texts, or a folder of audio with a .txt beside each, to manifests."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile
from lhotse.cut import Cut

from asrkit.data.corpora.record import read_record, write_record
from asrkit.data.features import load_samples
from asrkit.data.manifest_schema import check_cut, has_surrogates
from asrkit.data.manifests import make_cut, write_cuts
from asrkit.data.names import file_name
from asrkit.data.parallel import ALONE, Workers, in_processes
from asrkit.data.text.normalization import TextError, as_written, normalize, split_of
from asrkit.data.text.tokenizer import single_spaces
from asrkit.disk import atomic_write
from asrkit.errors import UserError, clip
from asrkit.frames import SAMPLE_RATE

RECORD = "import.json"
AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".sph", ".caf", ".w64", ".rf64")
OTHER_AUDIO = (
    *(".m4a", ".mp4", ".m4b", ".aac", ".wma", ".amr", ".webm", ".3gp", ".mka", ".mkv", ".mov", ".ra", ".ape", ".wv"),
    *(".ac3", ".dts", ".spx", ".shn", ".tta", ".mpc"),
)
MAX_FINDINGS = 50
MOST_SAMPLES = 1 << 40
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Row:
    """One utterance to import: ``where`` is for messages, ``fields`` every column by its name, ``problem`` why it cannot be."""

    where: str
    audio: Path
    fields: Mapping[str, str]
    problem: str = ""

    def get(self, name: str) -> str:
        return self.fields.get(name, "").strip()


@dataclass(frozen=True)
class Splitting:
    """How utterances are shared out.

    by: "auto" (the column ``split`` where there is one, else one set named "all"), "column", "hash" (of the text),
        "none" (one set named "all"), or the name of a column whose values go to test and dev as listed, else to train.
    """

    by: str = "auto"
    test: frozenset[str] = frozenset()
    dev: frozenset[str] = frozenset()

    def split_of(self, row: Row, text: str) -> str:
        if self.by == "none":
            return "all"
        if self.by == "hash":
            return split_of(text)
        if self.by in ("auto", "column"):
            return row.get("split") or "all"
        value = row.get(self.by)
        return "test" if value in self.test else "dev" if value in self.dev else "train"


@dataclass
class Imported:
    """Cuts by split; what was left out, one line each; how many rows were not selected."""

    cuts: dict[str, list[Cut]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    not_selected: int = 0


def import_recordings(
    source: Path,
    out: Path,
    *,
    root: Path | None = None,
    language: str | None = None,
    style: str = "words",
    splitting: Splitting | None = None,
    where: Mapping[str, frozenset[str]] | None = None,
    refuse: bool = True,
    convert: bool = False,
    workers: Workers = ALONE,
) -> Imported:
    """Write OUT/SPLIT.jsonl.gz of a TSV or a folder; recordings stay where they are, at their rate.

    Args:
        root: the folder that relative paths start from; left out, the TSV's folder or the one above it.
        language: of rows that name none; it spells numbers.
        style: "words" (normalized), "raw" (as written) or "none" (without texts).
        where: columns and the values to keep.
        refuse: stop when any row is bad; otherwise leave bad rows out and report them.
        convert: write 16 kHz mono FLAC to OUT/audio and let the manifests point there, by the ``workers``.

    Raises:
        UserError: nothing to import, missing columns, or, unless skipped, bad rows: all of them at once; or ``out`` has manifests
            that were made of something else. Nothing is written.
    """
    splitting = splitting or Splitting()
    if not source.exists():
        raise UserError(
            f"{source}: no such file or folder; give a TSV with the columns path and text, or a folder of audio"
        )
    if source.is_dir() and root is not None:
        raise UserError(f"--root {root}: works with a TSV only; {source} is a folder, which is searched itself")
    with_texts = style != "none"
    converted = (out / "audio").resolve()  # a folder may hold what an earlier import of it has made
    rows = _folder_rows(source, with_texts, converted) if source.is_dir() else _tsv_rows(source, root, with_texts)
    for column in [*(where or {}), *(() if splitting.by in ("auto", "none", "hash") else (_column(splitting),))]:
        if rows and column not in rows[0].fields:
            raise UserError(f"{source}: no column '{column}'; it has {', '.join(rows[0].fields)}")
    if findings := _unknown_values(rows, where or {}, splitting):
        raise UserError.of(findings)
    selected = [row for row in rows if all(row.get(name) in values for name, values in (where or {}).items())]
    if not selected:
        raise UserError(
            f"{source}: nothing to import; {f'--where leaves none of {len(rows)} rows' if rows else 'it is empty'}"
        )
    result = _read_rows(selected, language, style, splitting)
    result.not_selected = len(rows) - len(selected)
    if result.skipped and (refuse or not result.cuts):
        raise UserError.of(_too_many(result.skipped, source, len(selected), refuse))
    record, made_of = out / RECORD, {"source": os.path.relpath(source.resolve(), out.resolve())}
    _check_out(out, source, list(result.cuts), read_record(record), made_of)
    if convert:
        _convert(result, out, workers)
    write_record(record, made_of)
    for split, cuts in result.cuts.items():
        write_cuts(out / f"{split}.jsonl.gz", cuts)
    (out / "skipped.txt").unlink(missing_ok=True)  # of an earlier import
    if result.skipped:
        with atomic_write(out / "skipped.txt") as temporary:
            temporary.write_text("\n".join(result.skipped) + "\n", encoding="utf-8")
    return result


def _check_out(
    out: Path, source: Path, made: Sequence[str], before: dict[str, Any] | None, made_of: Mapping[str, str]
) -> None:
    """Refuse a folder with manifests of another source, which would be replaced, or stay beside those that are ``made`` now."""
    there = [name for name in (*SPLITS, "all") if (out / f"{name}.jsonl.gz").exists()]
    left, them = [name for name in there if name not in made], "it" if len(there) == 1 else "them"
    names = ", ".join(f"{name}.jsonl.gz" for name in there)
    if there and before != made_of:
        of = clip(out / str(before.get("source"))) if before else "another command, or of an earlier version"
        raise UserError(f"{out}: holds {names} of {of}; choose another --out, or remove {them}")
    if left:
        raise UserError(
            f"{out}: holds {', '.join(f'{name}.jsonl.gz' for name in left)} of another import of {source}, which this one does not "
            f"make; remove {'it' if len(left) == 1 else 'them'}, or choose another --out"
        )


def _unknown_values(rows: list[Row], where: Mapping[str, frozenset[str]], splitting: Splitting) -> list[str]:
    """Findings about values to select or split by that no row has, or that should go to two sets."""
    asked = [(f"--where {name}", name, values) for name, values in where.items()]
    asked += [("--test", splitting.by, splitting.test), ("--dev", splitting.by, splitting.dev)]
    both = sorted(splitting.test & splitting.dev)
    findings = [f"--test, --dev: {', '.join(both)} cannot be in both; leave it out of one of them"] if both else []
    for option, name, values in asked:
        there = {row.get(name) for row in rows} if values else set()
        if missing := sorted(values - there):
            known = ", ".join(map(clip, sorted(there)[:10])) + (", ..." if len(there) > 10 else "")
            findings.append(
                f"{option}: no row has {', '.join(map(clip, missing))} in the column {name}; there are {known}"
            )
    return findings


def _read_rows(rows: list[Row], language: str | None, style: str, splitting: Splitting) -> Imported:
    """A cut of each row, by split, and what is wrong with the others."""

    def read(row: Row) -> tuple[str, Cut] | UserError:
        try:
            return _read(row, language, style, splitting)
        except (UserError, ValueError) as error:
            return UserError(f"{row.where}: {error}")

    result = Imported()
    first_row: dict[str, str] = {}
    with ThreadPoolExecutor() as pool:  # libsndfile works outside Python's lock
        for row, made in zip(rows, pool.map(read, rows), strict=True):
            if isinstance(made, UserError):
                result.skipped.append(made.lines[0])
                continue
            split, cut = made
            if cut.id in first_row:
                result.skipped.append(f"{row.where}: id {cut.id} is also at {first_row[cut.id]}; give each row its own")
                continue
            first_row[cut.id] = row.where
            result.cuts.setdefault(split, []).append(cut)
    return result


def _too_many(skipped: list[str], source: Path, num_rows: int, refuse: bool) -> list[str]:
    lines = skipped[:MAX_FINDINGS]
    if len(skipped) > len(lines):
        lines.append(f"{source}: {len(skipped) - len(lines)} more bad rows")
    if refuse:
        lines.append(
            f"{source}: {len(skipped)} of {num_rows} rows are bad; fix them, or leave them out with --bad skip"
        )
    return lines


def _convert(result: Imported, out: Path, workers: Workers) -> None:
    """Write every cut's recording as 16 kHz mono FLAC, and let the cut point there; all of them or none.

    Raises:
        UserError: recordings that cannot be decoded, or the disk is full; nothing is left in ``out``.
    """
    audio, staging = out.absolute() / "audio", out.absolute() / f".tmp-{os.getpid()}-audio"
    new = [folder for folder in (audio, out.absolute()) if not folder.exists()]

    def convert(cut: Cut) -> Cut | UserError:
        name = file_name(cut.id, ".flac")
        try:
            samples = load_samples(Path(cut.recording.sources[0].source))
        except UserError as error:
            return error
        try:
            soundfile.write(staging / name, samples.numpy(), SAMPLE_RATE, format="FLAC")
        except (OSError, RuntimeError) as error:  # libsndfile's are of the second kind
            return UserError(f"{audio}: cannot write ({clip(error)})")
        supervision = cut.supervisions[0]
        return make_cut(
            cut.id,
            audio / name,
            sampling_rate=SAMPLE_RATE,
            num_samples=len(samples),
            text=supervision.text,
            language=supervision.language,
            speaker=supervision.speaker,
            custom=supervision.custom,
        )

    try:
        staging.mkdir(parents=True)
        made = {
            split: list(in_processes(convert, cuts, workers, lambda cut: f"cut {clip(cut.id)}", threads=True))
            for split, cuts in result.cuts.items()
        }
        findings = [error for cuts in made.values() for error in cuts if isinstance(error, UserError)]
        if findings:
            raise UserError.of([line for error in findings[:MAX_FINDINGS] for line in error.lines])
        audio.mkdir(exist_ok=True)
        for file in staging.iterdir():
            os.replace(file, audio / file.name)
    except OSError as error:
        raise UserError(f"{audio}: cannot write ({clip(error)})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in new:
            with suppress(OSError):  # only where nothing was written
                folder.rmdir()
    result.cuts = {split: [cut for cut in cuts if not isinstance(cut, UserError)] for split, cuts in made.items()}


def _column(splitting: Splitting) -> str:
    return "split" if splitting.by == "column" else splitting.by


def _tsv_rows(source: Path, root: Path | None, with_texts: bool) -> list[Row]:
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        if source.suffix.lower() in (*AUDIO, *OTHER_AUDIO):
            raise UserError(
                f"{source}: is a recording; give the folder it is in, or a TSV that names recordings"
            ) from None
        raise UserError(f"{source}: cannot read ({error}); it must be a UTF-8 text file") from error
    header = [name.strip() for name in lines[0].rstrip("\r").split("\t")]
    if missing := [name for name in ("path", "text") if name not in header and (with_texts or name != "text")]:
        raise UserError(
            f"{source}:1: no column {' and '.join(missing)}; the first line names the columns, separated by tabs: "
            "path, text and, as wanted, id, split, lang, speaker"
        )
    bases = (root,) if root else (source.parent, source.parent.parent)
    rows, findings = [], []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        values = line.rstrip("\r").split("\t")
        if len(values) != len(header):
            findings.append(f"{source}:{number}: {len(values)} fields, the header has {len(header)}; fix the line")
            continue
        fields = dict(zip(header, values, strict=True))
        paths = [base / fields["path"].strip() for base in bases]
        audio = next(filter(_is_file, paths), paths[0])
        rows.append(Row(f"{source}:{number}", audio, fields))
    if findings:
        raise UserError.of(findings[:MAX_FINDINGS])
    return rows


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have, such as a text in its place, is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _folder_rows(source: Path, with_texts: bool, leave_out: Path) -> list[Row]:
    """Audio files, each with a .txt of the same name where there are texts; the id is the path within the folder, / as -.

    What cannot be imported is a row too, so that it is named: audio that libsndfile does not read, a text without audio.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file() and leave_out not in path.resolve().parents)
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"} if with_texts else {}
    recordings = [path for path in files if path.suffix.lower() in (*AUDIO, *OTHER_AUDIO)]
    rows = []
    for path in recordings:
        text = texts.get(path.with_suffix(""))
        problem = f"there is no {path.stem}.txt beside it" if with_texts and text is None else ""
        if path.suffix.lower() in OTHER_AUDIO:
            problem = f"libsndfile does not read {path.suffix}; convert it to WAV or FLAC"
        written = ""
        if text is not None:
            try:
                written = single_spaces(text.read_text(encoding="utf-8-sig"))
            except (OSError, UnicodeDecodeError) as error:
                problem = problem or f"cannot read {text.name} ({error}); it must be a UTF-8 text file"
        name = "-".join(path.relative_to(source).with_suffix("").parts)
        rows.append(Row(str(path), path, {"path": str(path), "text": written, "id": name}, problem))
    with_audio = {path.with_suffix("") for path in recordings}
    for stem, path in texts.items():
        if stem not in with_audio:
            problem = f"there is no recording beside it ({', '.join(AUDIO)})"
            rows.append(Row(str(path), path, {"path": str(path), "text": "", "id": path.stem}, problem))
    # Texts alone are no import: a folder of manifests may hold notes.
    return rows if recordings else []


def _read(row: Row, language: str | None, style: str, splitting: Splitting) -> tuple[str, Cut]:
    """The split and the cut of a row.

    Raises:
        ValueError: what is wrong with it.
    """
    if row.problem:
        raise ValueError(row.problem)
    if not row.get("path"):
        raise ValueError("path: is empty; name a recording, or remove the row")
    if has_surrogates(row.get("path")):
        raise ValueError("path: the file's name is not UTF-8; rename the file")
    written = row.get("text")
    language = row.get("lang") or language
    text = None
    try:
        if style != "none":
            text = as_written(written) if style == "raw" else normalize(written, language or "")
    except TextError as error:
        known = "" if language else "say in which language it is with --lang, "
        raise ValueError(
            f"text: {error}; {known}write it as it is spoken, or keep texts as they are with --text raw"
        ) from error
    split = splitting.split_of(row, text or "")
    if not re.fullmatch(r"[\w.-]+", split):
        raise ValueError(f"split '{clip(split)}' becomes a file name; use letters, digits, - and _")
    cut_id = row.get("id") or "-".join(Path(row.get("path")).with_suffix("").parts).lstrip("/-")
    audio, rate, num_samples, channels = _audio_facts(row.audio)
    cut = make_cut(
        cut_id,
        audio,
        sampling_rate=rate,
        num_samples=num_samples,
        channels=channels,
        text=text,
        language=language,
        speaker=row.get("speaker") or None,
        custom=None if text is None else {"raw_text": row.get("raw_text") or written},
    )
    if findings := check_cut(cut.to_dict()):  # what no other command would read
        raise ValueError("; ".join(findings))
    return split, cut


def _audio_facts(path: Path) -> tuple[Path, int, int, int]:
    """Path, sampling rate, number of samples, number of channels."""
    if not _is_file(path):
        raise ValueError(f"path: no file {clip(path)}; paths start at the TSV's folder, the one above, or --root")
    try:
        info = soundfile.info(str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"path: {path} is not audio that libsndfile reads ({error}); convert it to WAV or FLAC"
        ) from error
    if info.frames > MOST_SAMPLES:  # as an encoder leaves it that wrote into a pipe
        raise ValueError(f"path: {path} has no length in its header; rewrite it, for example with ffmpeg")
    num_samples = info.frames
    if info.format == "MP3":  # its header may only estimate the length
        num_samples = sum(len(block) for block in soundfile.blocks(str(path), blocksize=1 << 16))
    if num_samples == 0:
        raise ValueError(f"path: {path} holds no samples; remove the row or restore the file")
    return path, info.samplerate, num_samples, info.channels
