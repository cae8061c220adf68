"""How long after the end of a word a streaming recognizer knows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lhotse.cut import Cut

from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.words import word_frames
from asrkit.frames import ENCODER_SHIFT_MS, LOOK_AHEAD_MS
from asrkit.nn.context import Context
from asrkit.reporting.wer import align


def emission_ms(frame: int, context: Context) -> float:
    """Milliseconds into the sound at which a streaming model knows encoder frame ``frame``.

    Frame t is computed with its chunk, the frames from floor(t / c) c to n = (floor(t / c) + 1) c, n not included. The
    chunk reads the features up to 4 n + 2, whose window ends with sample 160 (4 n + 2) + 280 of 16 kHz: n frames of
    40 ms, and ``LOOK_AHEAD_MS`` of 37.5 ms. Time to compute is not included. A recording's last chunk counts as if
    the sound went on to its end, as it does on a device.
    """
    if context.chunk is None:
        raise ValueError("context must be a streaming one")
    return (frame // context.chunk + 1) * context.chunk * ENCODER_SHIFT_MS + LOOK_AHEAD_MS


def word_ends(cut: Cut) -> list[tuple[str, float]] | None:
    """Each aligned word of a cut and the second of the cut it ends at; None without word alignments.

    Lhotse counts an alignment's times from the beginning of the recording. Pauses, which have no symbol, are left out.
    """
    ends = []
    for supervision in sorted(cut.supervisions, key=lambda supervision: supervision.start):
        if not supervision.alignment or "word" not in supervision.alignment:
            return None
        words = sorted(supervision.alignment["word"], key=lambda item: item.start)
        ends += [(item.symbol.strip(), item.end - cut.start) for item in words if item.symbol.strip()]
    return ends or None


def emission_latencies(
    hypothesis: Hypothesis, tokenizer: Tokenizer, ends: Sequence[tuple[str, float]], context: Context
) -> list[float]:
    """Milliseconds from the end of each rightly recognized word to the moment its last piece is known.

    Words are paired as the errors are counted, but regardless of case, as aligners often change it.
    """
    words = word_frames(hypothesis, tokenizer)
    pairs = align([word.casefold() for word, _ in ends], [word.text.casefold() for word in words])
    latencies, ref_index, hyp_index = [], 0, 0
    for ref, hyp in pairs:
        if ref == hyp:
            latencies.append(emission_ms(words[hyp_index].last, context) - 1000 * ends[ref_index][1])
        ref_index += bool(ref)
        hyp_index += bool(hyp)
    return latencies


def summarize_latencies(latencies: Sequence[float]) -> dict[str, Any]:
    """``mean_ms`` and ``p90_ms`` (nulls where no word was right) of ``words`` words."""
    if not latencies:
        return {"mean_ms": None, "p90_ms": None, "words": 0}
    mean, high = float(np.mean(latencies)), float(np.percentile(latencies, 90))
    return {"mean_ms": round(mean, 1), "p90_ms": round(high, 1), "words": len(latencies)}
