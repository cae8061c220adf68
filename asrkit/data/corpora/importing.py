"""Recordings of the user's own: a TSV of paths and texts, or a folder of audio with a .txt beside each, to manifests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import soundfile
from lhotse.cut import Cut

from asrkit.data.features import load_samples
from asrkit.data.manifests import make_cut, write_cuts
from asrkit.data.text.normalization import TextError, as_written, normalize, split_of
from asrkit.errors import UserError
from asrkit.frames import SAMPLE_RATE
from asrkit.run_dir import atomic_write

AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")
MAX_FINDINGS = 50


@dataclass(frozen=True)
class Row:
    """One utterance to import: ``place`` is for messages, ``fields`` every column by its name."""

    place: str
    audio: Path
    fields: Mapping[str, str]

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
) -> Imported:
    """Write OUT/SPLIT.jsonl.gz of a TSV or a folder; recordings stay where they are, at their rate.

    Args:
        root: the folder that relative paths start from; left out, the TSV's folder or the one above it.
        language: of rows that name none; it spells numbers.
        where: columns and the values to keep.
        refuse: stop when any row is bad; otherwise leave bad rows out and report them.
        convert: write 16 kHz mono FLAC to OUT/audio and let the manifests point there.

    Raises:
        UserError: nothing to import, missing columns, or, unless skipped, bad rows: all of them at once.
    """
    splitting = splitting or Splitting()
    if not source.exists():
        raise UserError(
            f"{source}: no such file or folder; give a TSV with the columns path and text, or a folder of audio"
        )
    rows = _folder_rows(source) if source.is_dir() else _tsv_rows(source, root)
    for column in [*(where or {}), *(() if splitting.by in ("auto", "none", "hash") else (_column(splitting),))]:
        if rows and column not in rows[0].fields:
            raise UserError(f"{source}: no column '{column}'; it has {', '.join(rows[0].fields)}")
    chosen = [row for row in rows if all(row.get(name) in values for name, values in (where or {}).items())]
    if not chosen:
        raise UserError(
            f"{source}: nothing to import; {f'--where leaves none of {len(rows)} rows' if rows else 'it is empty'}"
        )

    def read(row: Row) -> tuple[str, Cut] | UserError:
        try:
            return _read(row, out if convert else None, language, style, splitting)
        except (UserError, ValueError) as error:
            return UserError(f"{row.place}: {error}")

    result = Imported(not_selected=len(rows) - len(chosen))
    place_of_id: dict[str, str] = {}
    with ThreadPoolExecutor() as pool:  # libsndfile works outside Python's lock
        for row, found in zip(chosen, pool.map(read, chosen), strict=True):
            if isinstance(found, UserError):
                result.skipped.append(found.lines[0])
                continue
            split, cut = found
            if cut.id in place_of_id:
                result.skipped.append(
                    f"{row.place}: id {cut.id} is also at {place_of_id[cut.id]}; give each row its own"
                )
                continue
            place_of_id[cut.id] = row.place
            result.cuts.setdefault(split, []).append(cut)
    if result.skipped and (refuse or not result.cuts):
        shown = result.skipped[:MAX_FINDINGS]
        rest = (
            [f"{source}: {len(result.skipped) - len(shown)} more bad rows"] if len(result.skipped) > len(shown) else []
        )
        way_out = (
            []
            if not refuse
            else [
                f"{source}: {len(result.skipped)} of {len(chosen)} rows are bad; mend them, or leave them out with --bad skip"
            ]
        )
        raise UserError.of([*shown, *rest, *way_out])
    for split, cuts in result.cuts.items():
        write_cuts(out / f"{split}.jsonl.gz", cuts)
    if result.skipped:
        with atomic_write(out / "skipped.txt") as temporary:
            temporary.write_text("\n".join(result.skipped) + "\n", encoding="utf-8")
    return result


def _column(splitting: Splitting) -> str:
    return "split" if splitting.by == "column" else splitting.by


def _tsv_rows(source: Path, root: Path | None) -> list[Row]:
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot read ({error}); it must be a UTF-8 text file") from error
    header = [name.strip() for name in lines[0].rstrip("\r").split("\t")]
    if missing := [name for name in ("path", "text") if name not in header]:
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
            findings.append(f"{source}:{number}: {len(values)} fields, the header has {len(header)}; mend the line")
            continue
        fields = dict(zip(header, values, strict=True))
        places = [base / fields["path"].strip() for base in bases]
        audio = next((place for place in places if place.is_file()), places[0])
        rows.append(Row(f"{source}:{number}", audio, fields))
    if findings:
        raise UserError.of(findings[:MAX_FINDINGS])
    return rows


def _folder_rows(source: Path) -> list[Row]:
    """Audio files with a .txt of the same name; the id is the path within the folder, / as -."""
    rows = []
    for audio in sorted(path for path in source.rglob("*") if path.suffix.lower() in AUDIO):
        text = audio.with_suffix(".txt")
        said = text.read_text(encoding="utf-8-sig", errors="replace") if text.is_file() else ""
        name = "-".join(audio.relative_to(source).with_suffix("").parts)
        # Nothing beside it and an empty text are the same mistake, found where texts are checked.
        rows.append(Row(str(audio), audio, {"path": str(audio), "text": " ".join(said.split()), "id": name}))
    return rows


def _read(row: Row, out: Path | None, language: str | None, style: str, splitting: Splitting) -> tuple[str, Cut]:
    written = row.get("text")
    language = row.get("lang") or language
    try:
        text = as_written(written) if style == "raw" else normalize(written, language or "")
    except TextError as error:
        raise ValueError(f"text: {error}; write it as it is said, or take texts as they are with --text raw") from error
    split = splitting.split_of(row, text)
    if not re.fullmatch(r"[\w.-]+", split):
        raise ValueError(f"split '{split}' becomes a file name; use letters, digits, - and _")
    cut_id = row.get("id") or "-".join(Path(row.get("path")).with_suffix("").parts).lstrip("/-")
    audio, rate, num_samples, channels = _audio_facts(row.audio)
    if out is not None:
        audio = out / "audio" / (re.sub(r"[^\w.-]", "_", cut_id) + ".flac")
        samples = load_samples(row.audio)
        with atomic_write(audio) as temporary:
            soundfile.write(temporary, samples.numpy(), SAMPLE_RATE, format="FLAC")
        rate, num_samples, channels = SAMPLE_RATE, len(samples), 1
    return split, make_cut(
        cut_id,
        audio,
        sampling_rate=rate,
        num_samples=num_samples,
        channels=channels,
        text=text,
        language=language,
        speaker=row.get("speaker") or None,
        custom={"raw_text": row.get("raw_text") or written},
    )


def _audio_facts(path: Path) -> tuple[Path, int, int, int]:
    """Path, sampling rate, number of samples, number of channels."""
    if not path.is_file():
        raise ValueError(f"path: no file {path}; paths start at the TSV's folder, the one above, or --root")
    try:
        info = soundfile.info(str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"path: {path} is not audio that libsndfile reads ({error}); convert it to WAV or FLAC"
        ) from error
    num_samples = info.frames
    if info.format == "MP3":  # its header may only estimate the length
        num_samples = sum(len(block) for block in soundfile.blocks(str(path), blocksize=1 << 16))
    if num_samples == 0:
        raise ValueError(f"path: {path} holds no samples; remove the row or restore the file")
    return path, info.samplerate, num_samples, info.channels
