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
import soundfile
from lhotse import CutSet
from lhotse.cut import Cut, MonoCut

from asrkit.data.manifests import language_of, open_cuts, text_of
from asrkit.data.shar import loaded
from asrkit.data.text.normalization import sentence_key
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.errors import UserError
from asrkit.frames import FRAME_SHIFT, RECEPTIVE_FIELD, count_encoder_frames, count_features

SILENCE_PEAK = 1e-3  # -60 dBFS
TOLERANCE = 0.02  # seconds a file may be shorter than its manifest says, as decoders differ
LIBSNDFILE = (".wav", ".flac", ".ogg", ".opus", ".aiff", ".aif", ".au", ".sph")
HISTOGRAM_EDGES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """``kind`` is one word of: short, text, range, language, characters, alignment, unreadable, rate, truncated, silent, values."""

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
) -> list[Finding]:
    """Every reason why a cut of ``cuts`` cannot be trained on, in their order.

    Args:
        tokenizer: with it, texts are checked against its characters, and their tokens against the encoder's frames.
        read_audio: decode every recording too: unreadable, truncated, silent, not finite, of another rate than the
            manifest says. ``threads`` at once, by default a few more than there are cores.
        languages: those a model is told apart; with them, each cut must have one of them.
    """
    listed = list(cuts)
    findings = [finding for cut in listed for finding in _check_manifest(cut, tokenizer, languages)]
    if read_audio:
        with ThreadPoolExecutor(threads) as pool:  # soundfile decodes outside Python's lock
            for found in pool.map(_check_audio, listed):
                findings += found
    return findings


def alignment_need(tokens: list[int]) -> int:
    """Frames the shortest CTC path takes: one a token, one more between equal neighbors."""
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))


def _check_manifest(cut: Cut, tokenizer: Tokenizer | None, languages: Sequence[str]) -> Iterable[Finding]:
    text = cut.supervisions[0].text or ""
    if count_features(cut.duration) < RECEPTIVE_FIELD:
        yield Finding(
            cut.id,
            "short",
            f"{cut.duration:.3f} s, less than the {RECEPTIVE_FIELD * FRAME_SHIFT} s the encoder needs",
        )
    if cut.has_recording and isinstance(cut, MonoCut) and cut.end > cut.recording.duration + TOLERANCE:
        detail = f"ends at {cut.end:.2f} s, its recording at {cut.recording.duration:.2f} s; mend the manifest"
        yield Finding(cut.id, "range", detail)
    if languages and language_of(cut) not in languages:
        yield Finding(cut.id, "language", f"{language_of(cut) or 'none'}; the model knows {', '.join(languages)}")
    if not text.strip():
        yield Finding(cut.id, "text", "the text is empty")
    elif tokenizer is not None:
        if missing := tokenizer.missing_characters(text):
            yield Finding(cut.id, "characters", f"the tokenizer has no {' '.join(sorted(missing))!r} (text: {text!r})")
        need, have = alignment_need(tokenizer.encode(text)), encoder_frames(cut.duration)
        if need > have:
            yield Finding(
                cut.id,
                "alignment",
                f"{cut.duration:.2f} s give {have} encoder frames, its tokens need {need}; "
                "is the text that of this recording? Longer tokens need fewer frames",
            )


def _check_audio(cut: Cut) -> list[Finding]:
    if not cut.has_recording:
        return [] if cut.has_features else [Finding(cut.id, "unreadable", "neither a recording nor features")]
    path = _plain_file(cut)
    if path is not None and not path.is_file():
        return [Finding(cut.id, "unreadable", f"no file {path}; import again where the audio is")]
    try:
        samples, findings = _read_plain(cut, path) if path else (loaded(cut, "recording").load_audio(), [])
    except Exception as error:  # libsndfile's and lhotse's are of many kinds
        return [Finding(cut.id, "unreadable", " ".join(str(error).split())[:200])]
    if findings:
        return findings
    if samples.size == 0:
        return [Finding(cut.id, "unreadable", "the audio holds no samples")]
    if not np.isfinite(samples).all():
        return [Finding(cut.id, "values", "the audio holds values that are not finite")]
    if np.abs(samples).max() < SILENCE_PEAK:
        return [Finding(cut.id, "silent", "the peak lies below -60 dBFS")]
    return []


def _plain_file(cut: Cut) -> Path | None:
    """The one file libsndfile reads for this cut; None where lhotse has more to do."""
    if not isinstance(cut, MonoCut) or cut.recording.transforms or len(cut.recording.sources) != 1:
        return None
    source = cut.recording.sources[0]
    path = Path(str(source.source)) if source.type == "file" else None
    return path if path is not None and path.suffix.lower() in LIBSNDFILE else None


def _read_plain(cut: MonoCut, path: Path) -> tuple[np.ndarray, list[Finding]]:
    """The samples, (num_samples, channels); lhotse's own reading does not notice a shorter file or another rate."""
    with soundfile.SoundFile(path) as file:
        if file.samplerate != cut.recording.sampling_rate:
            detail = f"{path} is at {file.samplerate} Hz, the manifest says {cut.recording.sampling_rate}; import again"
            return np.zeros(0), [Finding(cut.id, "rate", detail)]
        first = round(cut.start * file.samplerate)
        wanted = round(cut.duration * file.samplerate)
        file.seek(min(first, file.frames))
        samples = file.read(wanted, dtype="float32", always_2d=True)
    if 0 < len(samples) < wanted - file.samplerate * TOLERANCE:
        detail = (
            f"{path} ends {(wanted - len(samples)) / file.samplerate:.2f} s early; restore the file or import again"
        )
        return samples, [Finding(cut.id, "truncated", detail)]
    return samples, []


@dataclass(frozen=True)
class Survey:
    """What a manifest holds; durations in seconds, ``tightest`` the smallest T' / frames needed, with a tokenizer."""

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
        languages=_most_common(cut.supervisions[0].language or "-" for cut in cuts),
        speakers=len(_speakers(cuts)),
        words=sum(len(text.split()) for text in texts),
        characters="".join(sorted(set("".join(texts)))),
        repeated_texts=len(texts) - len(set(texts)),
        tightest=round(min(margins), 2) if margins else None,
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
    return {speaker for cut in cuts if (speaker := cut.supervisions[0].speaker)}


def _audio_of(cut: Cut) -> tuple[str, float] | None:
    """The stretch of audio a cut stands for: its file and where it starts."""
    if not isinstance(cut, MonoCut) or not cut.has_recording or cut.recording.sources[0].type != "file":
        return None
    return str(cut.recording.sources[0].source), cut.start


def decodable_cuts(manifest: Path, languages: Sequence[str] = ()) -> tuple[CutSet, list[str]]:
    """The manifest's cuts, and warnings: a silent cut is decoded, its words count as any others; a cut with an empty text, or
    without a supervision, is decoded too, and every word recognized in it counts as an insertion.

    Args:
        languages: those the model takes as an input, if it has one.

    Raises:
        UserError: an unreadable manifest, or a line for each cut that cannot be decoded.
    """
    cuts = open_cuts(manifest, need_text=False)
    findings = find_bad_cuts(cuts, None, read_audio=True, languages=languages)
    lines = {
        finding: f"{manifest}: cut {finding.cut_id}: {finding.kind}: {finding.detail}"
        for finding in findings
        if finding.kind != "text"
    }
    fatal = [line for finding, line in lines.items() if finding.kind != "silent"]
    if fatal:
        raise UserError.of([*fatal, f"{manifest}: {len(fatal)} cuts cannot be decoded; fix or remove them"])
    if empty := [finding.cut_id for finding in findings if finding.kind == "text"]:
        return cuts, [
            *lines.values(),
            f"{manifest}: {len(empty)} cut(s) have an empty reference, the first is {empty[0]}; every word recognized in them "
            "is an insertion",
        ]
    return cuts, list(lines.values())
