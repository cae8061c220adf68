"""What makes a cut unusable, found before training starts and reported by cut id; and what a manifest holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut, MonoCut

from asrkit.data.cut_audio import TOLERANCE, CutError, read_samples, stored_features
from asrkit.data.manifests import language_of, open_cuts, text_of
from asrkit.data.text.normalization import sentence_key
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.errors import UserError, clip
from asrkit.frames import FRAME_SHIFT, count_encoder_frames, count_features, count_window

SILENCE_PEAK = 1e-3  # -60 dBFS
SMALL_PART = 0.5  # of a cut: where its supervisions cover less, the check says so
HISTOGRAM_EDGES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
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
    threads: int | None = None,
    languages: Sequence[str] = (),
    least: int = 1,
) -> list[Finding]:
    """Every reason why a cut of ``cuts`` cannot be trained on, in their order.

    Args:
        tokenizer: with it, texts are checked against its characters, and their tokens against the encoder's frames.
        read_audio: read what training reads of every cut, its audio or its stored features: unreadable, truncated, silent, not
            finite, of another rate than the manifest says. ``threads`` at once, by default a few more than there are cores.
        languages: those the model takes as an input; with them, each cut must have one of them.
        least: encoder frames that a cut must have.
    """
    listed = list(cuts)
    findings = [finding for cut in listed for finding in _check_manifest(cut, tokenizer, languages, least)]
    if read_audio:
        with ThreadPoolExecutor(threads) as pool:  # soundfile decodes outside Python's lock
            for of_cut in pool.map(_check_audio, listed):
                findings += of_cut
    return findings


def alignment_need(tokens: list[int]) -> int:
    """Frames the shortest CTC path takes: one a token, one more between equal neighbors."""
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))


def _check_manifest(
    cut: Cut, tokenizer: Tokenizer | None, languages: Sequence[str], least: int = 1
) -> Iterable[Finding]:
    text = text_of(cut)
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
    if not text.strip():
        yield Finding(cut.id, "text", "the text is empty")
    elif tokenizer is not None:
        if problem := tokenizer.cannot_spell(text):
            yield Finding(cut.id, "characters", problem)
        need, have = alignment_need(tokenizer.encode(text)), encoder_frames(cut.duration)
        if need > have:
            yield Finding(
                cut.id,
                "alignment",
                f"{cut.duration:.2f} s give {have} encoder frames, its tokens need {need}; "
                "is the text that of this recording? Longer tokens need fewer frames",
            )


def _check_audio(cut: Cut) -> list[Finding]:
    """What training would hear of this cut, by the code that training reads through."""
    try:
        if cut.has_features:
            features = stored_features(cut)
            silent = bool(features.max() - features.min() < 1e-3)
        else:
            silent = bool(read_samples(cut).abs().max() < SILENCE_PEAK)
    except CutError as error:
        return [Finding(cut.id, error.kind, error.detail)]
    if not silent:
        return []
    if cut.has_features:
        return [Finding(cut.id, "silent", "the stored features are the same everywhere")]
    return [Finding(cut.id, "silent", f"the peak lies below -60 dBFS{_other_channels(cut)}")]


def _other_channels(cut: Cut) -> str:
    """A hint, where a cut points to one channel of several."""
    if not isinstance(cut, MonoCut) or cut.recording.num_channels < 2:
        return ""
    return f" in channel {cut.channel}, the one this cut points to, of {cut.recording.num_channels}"


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
        sampling_rates=_most_common(cut.sampling_rate for cut in cuts),
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
    audio = {path for cut in train if (path := _audio_of(cut))}
    texts = {sentence_key(text_of(cut)) for cut in train}
    return Overlap(
        same_id=[cut.id for cut in held_out if cut.id in ids],
        same_audio=[cut.id for cut in held_out if _audio_of(cut) in audio],
        same_text=[cut.id for cut in held_out if sentence_key(text_of(cut)) in texts],
        speakers=sorted(_speakers(train) & _speakers(held_out)),
    )


def _most_common(values: Iterable[T]) -> dict[T, int]:
    return dict(Counter(values).most_common())


def _channels(cut: Cut) -> int:
    return cut.recording.num_channels if isinstance(cut, MonoCut) and cut.has_recording else 1


def _speakers(cuts: Iterable[Cut]) -> set[str]:
    return {supervision.speaker for cut in cuts for supervision in cut.supervisions if supervision.speaker}


def _audio_of(cut: Cut) -> tuple[str, float] | None:
    """The stretch of audio a cut stands for: its file and where it starts."""
    if not isinstance(cut, MonoCut) or not cut.has_recording or cut.recording.sources[0].type != "file":
        return None
    return str(cut.recording.sources[0].source), cut.start


def decodable_cuts(
    manifest: Path, languages: Sequence[str] = (), tokenizer: Tokenizer | None = None
) -> tuple[CutSet, list[str]]:
    """The manifest's cuts, and warnings: a silent cut is decoded, its words count as any others; a cut with an empty text, or
    without a supervision, is decoded too, and every word recognized in it counts as an insertion; a text that the tokenizer
    cannot spell is scored, and no model with this tokenizer can get it right.

    Args:
        languages: those the model takes as an input, if it has one.

    Raises:
        UserError: an unreadable manifest, or a line for each cut that cannot be decoded.
    """
    cuts = open_cuts(manifest, need_text=False)
    findings = find_bad_cuts(cuts, None, read_audio=True, languages=languages)
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
    if tokenizer is not None:
        problems = [(cut.id, problem) for cut in cuts if (problem := tokenizer.cannot_spell(text_of(cut)))]
        if problems:
            warnings.append(
                f"{manifest}: {len(problems)} reference(s) cannot be recognized without an error, the first is that of cut "
                f"{clip(problems[0][0])}: {problems[0][1]}"
            )
    return cuts, warnings
