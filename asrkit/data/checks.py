"""What makes a cut unusable, found before training starts and reported by cut id."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from lhotse.cut import Cut

from asrkit.data.features import FRAME_SHIFT
from asrkit.data.tokenizer import Tokenizer

SILENCE_PEAK = 1e-3  # -60 dBFS
MIN_FRAMES = 7  # of 10 ms: what the subsampling needs for one encoder frame


@dataclass(frozen=True)
class Finding:
    """``kind`` is one word of: short, text, characters, alignment, unreadable, rate, silent, values."""

    cut_id: str
    kind: str
    detail: str


def encoder_frames(seconds: float) -> int:
    """T' of an utterance: 10 ms frames T, then (T - 3) // 4."""
    return max(0, (round(seconds / FRAME_SHIFT) - 3) // 4)


def find_bad_cuts(cuts: Iterable[Cut], tokenizer: Tokenizer | None = None, read_audio: bool = False,
                  threads: int = 4) -> list[Finding]:
    """Every reason why a cut of ``cuts`` cannot be trained on, in their order.

    Args:
        tokenizer: with it, texts are checked against its characters, and their tokens against the encoder's frames.
        read_audio: decode every recording too: unreadable, truncated, silent, not finite, of another rate.
    """
    listed = list(cuts)
    findings = [finding for cut in listed for finding in _check_manifest(cut, tokenizer)]
    if read_audio:
        with ThreadPoolExecutor(threads) as pool:  # soundfile decodes outside Python's lock
            for found in pool.map(_check_audio, listed):
                findings += found
    return findings


def alignment_need(tokens: list[int]) -> int:
    """Frames the shortest CTC path takes: one a token, one more between equal neighbours."""
    return len(tokens) + sum(a == b for a, b in zip(tokens, tokens[1:], strict=False))


def _check_manifest(cut: Cut, tokenizer: Tokenizer | None) -> Iterable[Finding]:
    text = cut.supervisions[0].text or ""
    frames = round(cut.duration / FRAME_SHIFT)
    if frames < MIN_FRAMES:
        yield Finding(cut.id, "short", f"{cut.duration:.3f} s, less than the {MIN_FRAMES * FRAME_SHIFT} s the encoder needs")
    if not text.strip():
        yield Finding(cut.id, "text", "the text is empty")
    elif tokenizer is not None:
        if missing := tokenizer.missing_characters(text):
            yield Finding(cut.id, "characters", f"the tokenizer has no {' '.join(sorted(missing))!r} (text: {text!r})")
        need, have = alignment_need(tokenizer.encode(text)), encoder_frames(cut.duration)
        if need > have:
            yield Finding(cut.id, "alignment", f"{cut.duration:.2f} s give {have} encoder frames, its tokens need {need}; "
                                               "is the text that of this recording? Longer tokens need fewer frames")


def _check_audio(cut: Cut) -> list[Finding]:
    if not cut.has_recording:
        return [] if cut.has_features else [Finding(cut.id, "unreadable", "neither a recording nor features")]
    try:
        samples = cut.load_audio()
    except Exception as error:  # lhotse raises many kinds
        return [Finding(cut.id, "unreadable", " ".join(str(error).split())[:200])]
    if samples.size == 0:
        return [Finding(cut.id, "unreadable", "the audio holds no samples")]
    if not np.isfinite(samples).all():
        return [Finding(cut.id, "values", "the audio holds values that are not finite")]
    if np.abs(samples).max() < SILENCE_PEAK:
        return [Finding(cut.id, "silent", "the peak lies below -60 dBFS")]
    return []
