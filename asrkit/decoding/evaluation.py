"""Decoding against references."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from lhotse import CutSet

from asrkit.config import to_dict
from asrkit.data.batch import Batch, evaluation_batches
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import AcousticModel
from asrkit.decoding.fusion import Fusion, FusionRequest
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.latency import emission_latencies, word_ends
from asrkit.decoding.recognizer import Recognizer
from asrkit.decoding.search import Method, decode, search
from asrkit.reporting.progress import progress
from asrkit.reporting.results import DecodingRecord
from asrkit.reporting.wer import ErrorCounts, Scored, total_chars, total_words


def score(batch: Batch, hypotheses: Sequence[Hypothesis], tokenizer: Tokenizer) -> list[Scored]:
    """Each utterance of a batch beside its reference, with the pieces that were emitted and when."""
    return [
        Scored(
            cut_id,
            ref,
            tokenizer.decode(hypothesis.tokens),
            language,
            pieces=tuple(map(tokenizer.id_to_piece, hypothesis.tokens)),
            frames=tuple(hypothesis.frames),
        )
        for cut_id, ref, hypothesis, language in zip(
            batch.cut_ids, batch.texts, hypotheses, batch.languages, strict=True
        )
    ]


def measure_wer(
    model: AcousticModel,
    batches: Iterable[Batch],
    tokenizer: Tokenizer,
    method: Method = "greedy",
    beam: int = 4,
) -> tuple[ErrorCounts, ErrorCounts, list[tuple[str, str, str]]]:
    """Word errors, character errors, and (cut id, reference, hypothesis) of every utterance."""
    scored: list[Scored] = []
    for batch in batches:
        hypotheses = decode(
            model, batch.features, batch.feature_lens, method, beam, batch.languages, tokenizer.special_ids
        )
        scored += score(batch, hypotheses, tokenizer)
    return total_words(scored), total_chars(scored), [(s.cut_id, s.ref, s.hyp) for s in scored]


@dataclass
class Decoded:
    """One method's hypotheses for a manifest; ``latencies`` (milliseconds a word) where words are aligned."""

    scored: list[Scored] = field(default_factory=list)
    latencies: list[float] | None = None
    seconds: float = 0.0


def decode_cuts(
    recognizer: Recognizer,
    cuts: CutSet,
    methods: Sequence[Method],
    beam: int,
    max_duration: float,
    fusion: Fusion | None,
) -> dict[Method, Decoded]:
    """Decode every cut by every method; seconds of each count what they share: audio, features, encoder."""
    streaming = recognizer.context.streaming
    ends = {cut.id: aligned for cut in cuts if (aligned := word_ends(cut))} if streaming else {}
    decoded = {method: Decoded(latencies=[] if ends else None) for method in methods}
    with progress("decoding", sum(cut.duration for cut in cuts), "s of audio") as advance:
        began = time.perf_counter()
        for batch in evaluation_batches(cuts, max_duration):
            encoded = recognizer.model.encode(batch.features, batch.feature_lens, batch.languages)
            if recognizer.device.type == "cuda":
                torch.cuda.synchronize(recognizer.device)
            shared = time.perf_counter() - began
            for method, total in decoded.items():
                began = time.perf_counter()
                hypotheses = search(recognizer.model, encoded, method, beam, recognizer.tokenizer.special_ids, fusion)
                total.seconds += shared + time.perf_counter() - began
                scored = score(batch, hypotheses, recognizer.tokenizer)
                if total.latencies is not None:
                    for number, hypothesis in enumerate(hypotheses):
                        words = ends.get(batch.cut_ids[number]) or ()
                        late = emission_latencies(hypothesis, recognizer.tokenizer, words, recognizer.context)
                        total.latencies += late
                        scored[number] = replace(scored[number], late_ms=tuple(round(value, 1) for value in late))
                total.scored += scored
            advance(sum(batch.durations))
            began = time.perf_counter()
    return decoded


def decoding_record(
    request: FusionRequest | None, fusion: Fusion | None, manifest: Path, manifest_sha256: str
) -> tuple[DecodingRecord | None, list[str]]:
    """What a result says of ``fusion``; and a warning where it was tuned on the very manifest that is decoded."""
    if request is None or fusion is None:
        return None, []
    tuned_on = None if request.tuned_on is None else dict(request.tuned_on)
    sources = {name: dict(source) for name, source in fusion.sources.items()}
    record = DecodingRecord(settings=to_dict(fusion.settings), sources=sources, tuned_on=tuned_on)
    if tuned_on is None or tuned_on["sha256"] != manifest_sha256:
        return record, []
    return record, [
        f"{manifest}: the decoding was tuned on these very cuts, so the errors are too few; evaluate on others"
    ]
