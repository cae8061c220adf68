"""What makes a cut unusable, found before training starts and reported by cut id; and what a manifest holds."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache, partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
from lhotse import Recording
from lhotse.cut import Cut, MixedCut, MonoCut

from asrkit.data.cut_audio import TOLERANCE, CutError, check_sound, fingerprint, read_samples, stored_features
from asrkit.data.cut_table import CutTable, spread
from asrkit.data.manifests import is_synthetic, language_of, open_cuts, text_of
from asrkit.data.parallel import ALONE, Workers, every_core, in_processes
from asrkit.data.remembered import WORTH, recall, remember
from asrkit.data.shar import PLACES
from asrkit.data.text.normalization import sentence_key
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.disk import sha256_of
from asrkit.errors import UserError, clip
from asrkit.frames import FRAME_SHIFT, count_encoder_frames, count_features, count_window

SMALL_PART = 0.5  # of a cut: where its supervisions cover less, the check says so
HISTOGRAM_EDGES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
PART, MANY_PARTS = 2000, 25  # texts that are tokenized at a time; from so many parts on by all cores
AUDIO_PART = 100  # cuts that are read at a time
MOST_FILES = 20_000  # that are looked at to know whether audio has changed
SAME_AUDIO = 0.01  # seconds by which neighboring cuts of a recording may overlap
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """``kind`` is one word of: short, text, range, language, characters, alignment, unreadable, rate, truncated, silent, values,
    features."""

    cut_id: str
    kind: str
    detail: str


def encoder_frames(seconds: float) -> int:
    """Encoder frames T' of an utterance."""
    return count_encoder_frames(count_features(seconds))


def find_bad_cuts(
    cuts: Iterable[Cut],
    tokenizer: Tokenizer | None = None,
    read_audio: bool = False,
    languages: Sequence[str] = (),
    least: int = 1,
    workers: Workers = ALONE,
    first: int | None = None,
    sound: bool = False,
) -> list[Finding]:
    """Every reason why a cut of ``cuts`` cannot be trained on, in their order. What was found in a large manifest is remembered.

    Args:
        tokenizer: with it, texts are checked against its characters, and their tokens against the encoder's frames.
        read_audio: read what training reads of every cut, its audio or its stored features: unreadable, truncated, silent, not
            finite, of another rate than the manifest says.
        languages: those the model takes as an input; with them, each cut must have one of them.
        least: encoder frames that a cut must have.
        workers: who reads and tokenizes; one process reads audio in a few more threads than there are cores.
        first: read the audio of at most so many cuts, spread evenly, unless that of all was read before.
        sound: with ``read_audio``, read the recordings of cuts with stored features too, for whoever hears those.
    """
    table = cuts if isinstance(cuts, CutTable) else CutTable(cuts)
    found = [
        (row, finding)
        for row in _not_plainly_fine(table, languages, least).tolist()
        for finding in _check_manifest(table[row], languages, least)
    ]
    if tokenizer is not None:
        found += _spelling(table, tokenizer, workers)
        found.sort(key=itemgetter(0))
    if read_audio:
        found += _audio(table, workers, first, sound)
    return [finding for _, finding in found]


def _not_plainly_fine(table: CutTable, languages: Sequence[str], least: int) -> np.ndarray:
    """Rows of the cuts whose JSON has to be looked at to know that nothing is wrong with them."""
    columns = table.columns
    known = [number for number, name in enumerate(columns.names) if name in languages]
    fine = columns.plain & (columns.durations > (count_window(least) + 1) * FRAME_SHIFT)
    if languages:
        fine &= np.isin(columns.languages, known)
    return np.flatnonzero(~fine)


Found = list[tuple[int, Finding]]  # findings with the rows of their cuts


def _spelling(table: CutTable, tokenizer: Tokenizer, workers: Workers) -> Found:
    """Texts that the tokenizer cannot spell, or whose tokens are more than the encoder's frames."""

    def check(rows: np.ndarray) -> Found:
        texts = [table.text_of(row) for row in rows.tolist()]
        enough = np.array([encoder_frames(float(seconds)) for seconds in table.durations[rows]])
        suspects = rows[~_plainly_spelled(texts, enough, tokenizer)]
        return [(row, finding) for row in suspects.tolist() for finding in _check_spelling(table, row, tokenizer)]

    def find() -> Found:
        parts = _parts(np.arange(len(table)), PART)
        own = every_core() if len(parts) >= MANY_PARTS and not workers.several else workers
        return [one for part in in_processes(check, parts, own, partial(_named, table)) for one in part]

    return _remembered(table, "spelling", [sha256_of(tokenizer.path)], find)


def _plainly_spelled(texts: Sequence[str], frames: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """(N,) bool: whether nothing is wrong with a text's spelling, nor with its tokens in so many encoder frames, at a glance."""
    tokens = tokenizer.encode_all(texts)
    most = 2 * np.array([len(ids) for ids in tokens])  # frames that any order of so many tokens can take
    return np.array(tokenizer.spelled(texts, tokens), bool) & (most <= frames)


def _audio(table: CutTable, workers: Workers, first: int | None, sound: bool) -> Found:
    """Cuts whose audio, or unless it is the ``sound`` that counts, stored features, cannot be used."""
    kind = "sound" if sound else "audio"

    def check(rows: np.ndarray) -> Found:
        return [(row, finding) for row in rows.tolist() for finding in _check_audio(table[row], sound)]

    def find(rows: np.ndarray) -> Found:
        parts = _parts(rows, AUDIO_PART)
        return [
            one for part in in_processes(check, parts, workers, partial(_named, table), threads=True) for one in part
        ]

    every = np.arange(len(table))
    key = [fingerprint(table, spread(len(table), MOST_FILES))] if len(table) >= WORTH and table.digest else []
    if first is None or len(table) <= first:
        return _remembered(table, kind, key, lambda: find(every))
    if (known := _recall(table, kind, key)) is not None:
        return known
    return _remembered(table, kind, [*key, str(first)], lambda: find(spread(len(table), first)))


def _parts(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def _named(table: CutTable, rows: np.ndarray) -> str:
    """A part of the work, for a message."""
    ends = [clip(table[int(row)].id) for row in rows[[0, -1]]]
    return f"cut {ends[0]}" if len(rows) == 1 else f"cuts {ends[0]} to {ends[1]}"


def _remembered(table: CutTable, kind: str, key: Sequence[str], find: Callable[[], Found]) -> Found:
    """What ``find`` finds in a table, or found in it before, if it is a large manifest."""
    if (known := _recall(table, kind, key)) is not None:
        return known
    found = find()
    if table.digest and len(table) >= WORTH:
        content = json.dumps([[row, *astuple(finding)] for row, finding in found])
        remember(kind, [table.digest, *key], {"findings": np.frombuffer(content.encode(), np.uint8)})
    return found


def _recall(table: CutTable, kind: str, key: Sequence[str]) -> Found | None:
    if not table.digest or len(table) < WORTH or (known := recall(kind, [table.digest, *key])) is None:
        return None
    return [(row, Finding(*words)) for row, *words in json.loads(known["findings"].tobytes())]


def alignment_need(tokens: list[int]) -> int:
    """Frames the shortest CTC path takes: one a token, one more between equal neighbors."""
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))


def _check_manifest(cut: Cut, languages: Sequence[str], least: int = 1) -> Iterable[Finding]:
    if encoder_frames(cut.duration) < least:
        who = "the encoder needs" if least == 1 else f"{least} encoder frames need, of which a span can be hidden"
        detail = f"{cut.duration:.3f} s, less than the {count_window(least) * FRAME_SHIFT:.2f} s {who}"
        yield Finding(cut.id, "short", detail)
    if cut.has_recording and isinstance(cut, MonoCut) and cut.end > cut.recording.duration + TOLERANCE:
        detail = f"ends at {cut.end:.2f} s, its recording at {cut.recording.duration:.2f} s; fix the manifest"
        yield Finding(cut.id, "range", detail)
    for supervision in cut.supervisions:
        if supervision.duration > 0 and (supervision.end <= 0 or supervision.start >= cut.duration):
            detail = (
                f"supervision {clip(supervision.id)} is at {supervision.start:.2f}-{supervision.end:.2f} s, outside the "
                f"cut's {cut.duration:.2f} s, and its text counts; fix or remove the supervision"
            )
            yield Finding(cut.id, "range", detail)
    if languages and language_of(cut) not in languages:
        yield Finding(cut.id, "language", f"{language_of(cut) or 'none'}; the model knows {', '.join(languages)}")
    elif languages and len(named := {supervision.language or "none" for supervision in cut.supervisions}) > 1:
        yield Finding(
            cut.id, "language", f"its supervisions are of {', '.join(sorted(named))}; the model takes one at a time"
        )
    if not text_of(cut).strip():
        yield Finding(cut.id, "text", "the text is empty")


def _check_spelling(table: CutTable, row: int, tokenizer: Tokenizer) -> Iterable[Finding]:
    text, duration = table.text_of(row), float(table.durations[row])
    if not text.strip():
        return
    if problem := tokenizer.cannot_spell(text):
        yield Finding(table[row].id, "characters", problem)
    need, have = alignment_need(tokenizer.encode(text)), encoder_frames(duration)
    if need > have:
        yield Finding(
            table[row].id,
            "alignment",
            f"{duration:.2f} s give {have} encoder frames, its tokens need {need}; "
            "is the text that of this recording? Longer tokens need fewer frames",
        )


def _check_audio(cut: Cut, sound: bool) -> list[Finding]:
    """What training would hear of this cut, by the code that training reads through; or its ``sound``, whatever training reads."""
    try:
        if sound and not cut.has_recording:
            return [Finding(cut.id, "audio", "has stored features and no recording, which has to be heard here")]
        if sound or not cut.has_features:
            check_sound(cut, read_samples(cut))
        elif bool((features := stored_features(cut)).max() - features.min() < 1e-3):
            return [Finding(cut.id, "silent", "the stored features are the same everywhere")]
    except CutError as error:
        return [Finding(cut.id, error.kind, error.detail)]
    return []


def coverage(cut: Cut) -> float:
    """The share of a cut that its supervisions cover."""
    covered, end = 0.0, 0.0
    for supervision in sorted(cut.supervisions, key=lambda s: s.start):
        start, stop = max(supervision.start, end), min(supervision.end, cut.duration)
        covered, end = covered + max(0.0, stop - start), max(end, stop)
    return covered / cut.duration


@dataclass(frozen=True)
class Survey:
    """What a manifest holds; durations in seconds, ``tightest`` the smallest T' / frames needed, with a tokenizer.

    ``sparse``: ids of cuts whose supervisions cover less than half of them; all of such a cut is trained on.
    """

    cuts: int
    seconds: float
    shortest: float
    median: float
    longest: float
    histogram: dict[str, int]
    sampling_rates: dict[int, int]
    channels: dict[int, int]
    languages: dict[str, int]
    speakers: int
    words: int
    characters: str
    repeated_texts: int
    tightest: float | None
    sparse: list[str]


@dataclass(frozen=True)
class Overlap:
    """What a training and a held-out manifest have in common; cut ids are the held-out one's."""

    same_id: list[str]
    same_audio: list[str]
    same_text: list[str]
    speakers: list[str]


def survey(cuts: Sequence[Cut], tokenizer: Tokenizer | None = None) -> Survey:
    """Count what there is, without reading audio."""
    durations = np.array([cut.duration for cut in cuts])
    texts = [text_of(cut) for cut in cuts]
    edges = [0.0, *(edge for edge in HISTOGRAM_EDGES if edge < durations.max()), np.inf]
    counts, _ = np.histogram(durations, edges)
    names = [f"{a:g}-{b:g} s" if np.isfinite(b) else f"over {a:g} s" for a, b in pairwise(edges)]
    margins = (
        [
            encoder_frames(cut.duration) / max(1, alignment_need(tokenizer.encode(text)))
            for cut, text in zip(cuts, texts, strict=True)
        ]
        if tokenizer
        else []
    )
    return Survey(
        cuts=len(cuts),
        seconds=round(float(durations.sum()), 3),
        shortest=float(durations.min()),
        median=float(np.median(durations)),
        longest=float(durations.max()),
        histogram=dict(zip(names, counts.tolist(), strict=True)),
        sampling_rates=_most_common(cut.sampling_rate for cut in cuts if cut.has_recording or cut.has_features),
        channels=_most_common(_channels(cut) for cut in cuts),
        languages=_most_common(language_of(cut) or "-" for cut in cuts),
        speakers=len(_speakers(cuts)),
        words=sum(len(text.split()) for text in texts),
        characters="".join(sorted(set("".join(texts)))),
        repeated_texts=len(texts) - len(set(texts)),
        tightest=round(min(margins), 2) if margins else None,
        sparse=[cut.id for cut in cuts if coverage(cut) < SMALL_PART],
    )


def find_overlap(train: Sequence[Cut], held_out: Sequence[Cut]) -> Overlap:
    """Ids, audio files, sentences and speakers of ``held_out`` that ``train`` has too."""
    ids = {cut.id for cut in train}
    audio = _merged(stretch for cut in train for stretch in _stretches(cut))
    texts = {sentence_key(text_of(cut)) for cut in train}
    return Overlap(
        same_id=[cut.id for cut in held_out if cut.id in ids],
        same_audio=[cut.id for cut in held_out if any(_heard(stretch, audio) for stretch in _stretches(cut))],
        same_text=[cut.id for cut in held_out if sentence_key(text_of(cut)) in texts],
        speakers=sorted(_speakers(train) & _speakers(held_out)),
    )


def _most_common(values: Iterable[T]) -> dict[T, int]:
    return dict(Counter(values).most_common())


def _channels(cut: Cut) -> int:
    return cut.recording.num_channels if isinstance(cut, MonoCut) and cut.has_recording else 1


def _speakers(cuts: Iterable[Cut]) -> set[str]:
    return {supervision.speaker for cut in cuts for supervision in cut.supervisions if supervision.speaker}


def _stretches(cut: Cut) -> Iterator[tuple[str, float, float]]:
    """The stretches of audio that a cut's words are in: the file, by whatever name, where it begins and where it ends."""
    if isinstance(cut, MixedCut):
        for track in cut.tracks:
            if getattr(track.cut, "supervisions", None):  # the others are noise, which several cuts may share
                yield from _stretches(track.cut)
    elif getattr(cut, "recording", None) is not None:
        place = ((cut.custom or {}).get(PLACES) or {}).get("recording")
        files = [source.source for source in cut.recording.sources if source.type == "file"]
        factor = _factor(cut.recording)
        for name in [f"{_real(place[0])}:{place[1]}"] if place else map(_real, files):
            yield name, factor * cut.start, factor * cut.end


def _real(path: str) -> str:
    """A file's own name; folders are looked up once."""
    folder, name = os.path.split(path)
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(_real_folder(folder), name)


@cache
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def _factor(recording: Recording) -> float:
    """Seconds of the file in a second of a recording that lhotse plays faster or slower."""
    factor = 1.0
    for transform in recording.transforms or []:
        content = transform if isinstance(transform, dict) else transform.to_dict()
        if content["name"] in ("Speed", "Tempo"):
            factor *= float(content["kwargs"]["factor"])
    return factor


def _merged(stretches: Iterable[tuple[str, float, float]]) -> dict[str, list[tuple[float, float]]]:
    """By file, what is covered by the stretches, in order and apart from each other."""
    covered: dict[str, list[tuple[float, float]]] = {}
    for name, begin, end in sorted(stretches):
        parts = covered.setdefault(name, [])
        if parts and begin <= parts[-1][1]:
            parts[-1] = parts[-1][0], max(end, parts[-1][1])
        else:
            parts.append((begin, end))
    return covered


def _heard(stretch: tuple[str, float, float], covered: Mapping[str, list[tuple[float, float]]]) -> bool:
    """Whether a stretch overlaps with what is covered, by more than the rounding of neighbors."""
    name, begin, end = stretch
    parts = covered.get(name, [])
    last = bisect_left(parts, (end - SAME_AUDIO,)) - 1
    return last >= 0 and parts[last][1] > begin + SAME_AUDIO


def decodable_cuts(
    manifest: Path,
    languages: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    workers: Workers = ALONE,
    sound: bool = False,
) -> tuple[CutTable, list[str]]:
    """The manifest's cuts, and warnings: a silent cut is decoded, its words count as any others; a cut with an empty text, or
    without a supervision, is decoded too, and every word recognized in it counts as an insertion; a text that the tokenizer
    cannot spell is scored, and no model with this tokenizer can get it right; synthetic speech is no test (100 cuts are looked at).

    Args:
        languages: those the model takes as an input, if it has one.
        sound: see ``find_bad_cuts``.

    Raises:
        UserError: an unreadable manifest, or a line for each cut that cannot be decoded.
    """
    cuts = open_cuts(manifest, need_text=False)
    findings = find_bad_cuts(cuts, None, read_audio=True, languages=languages, workers=workers, sound=sound)
    empty = [finding.cut_id for finding in findings if finding.kind == "text"]
    lines = {
        finding: f"{manifest}: cut {clip(finding.cut_id)}: {finding.kind}: {finding.detail}"
        for finding in findings
        if finding.kind != "text"
    }
    fatal = [line for finding, line in lines.items() if finding.kind != "silent"]
    if fatal:
        raise UserError.of([*fatal, f"{manifest}: {len(fatal)} cuts cannot be decoded; fix or remove them"])
    warnings = list(lines.values())
    if empty:
        warnings.append(
            f"{manifest}: {len(empty)} cut(s) have an empty reference, the first is {clip(empty[0])}; every word recognized in "
            "them is an insertion"
        )
    looked_at = [cuts[row] for row in spread(len(cuts), 100).tolist()]
    if spoken := [cut.id for cut in looked_at if is_synthetic(cut)]:
        warnings.append(
            f"{manifest}: holds synthetic speech, such as cut {clip(spoken[0])}; errors on it say little about recorded speech"
        )
    if tokenizer is not None:
        texts = [cuts.text_of(row) for row in range(len(cuts))]
        fine = tokenizer.spelled(texts, tokenizer.encode_all(texts))
        problems = [
            (cuts[row].id, problem)
            for row, text in enumerate(texts)
            if not fine[row] and (problem := tokenizer.cannot_spell(text))
        ]
        if problems:
            warnings.append(
                f"{manifest}: {len(problems)} reference(s) cannot be recognized without an error, the first is that of cut "
                f"{clip(problems[0][0])}: {problems[0][1]}"
            )
    return cuts, warnings
