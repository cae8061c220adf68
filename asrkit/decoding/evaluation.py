"""Decoding against references."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from lhotse.cut import Cut

from asrkit.data.batch import Batch, evaluation_parts, named, plain_batch
from asrkit.data.cut_table import CutTable
from asrkit.data.parallel import in_processes
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import AcousticModel
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.latency import emission_latencies, word_ends
from asrkit.decoding.recognizer import Recognizer
from asrkit.decoding.search import Method, decode, search
from asrkit.reporting.progress import progress
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


@dataclass
class Decoded:
    """One method's hypotheses for a manifest; ``latencies`` (milliseconds a word) where words are aligned."""

    scored: list[Scored] = field(default_factory=list)
    latencies: list[float] | None = None
    seconds: float = 0.0

    def add(self, other: Decoded) -> None:
        """Add those of more cuts."""
        self.scored += other.scored
        self.seconds += other.seconds
        if self.latencies is not None:
            self.latencies += other.latencies or []


def decode_cuts(
    recognizer: Recognizer, cuts: CutTable, methods: Sequence[Method], beam: int, max_duration: float, jobs: int
) -> dict[Method, Decoded]:
    """Decode every cut by every method, in ``jobs`` processes; seconds of each method count what they share (audio, features,
    encoder), and those of all processes add up."""
    streaming = recognizer.context.streaming
    ends = {cut.id: aligned for cut in cuts if (aligned := word_ends(cut))} if streaming else {}
    decoded = {method: Decoded(latencies=[] if ends else None) for method in methods}

    def decode_part(part: list[Cut]) -> dict[Method, Decoded]:
        return _decode_batch(recognizer, part, methods, beam, ends)

    with progress("decoding", float(cuts.durations.sum()), "s of audio") as advance:
        parts = evaluation_parts(cuts, max_duration)
        for part, of_part in zip(parts, in_processes(decode_part, parts, jobs, named), strict=True):
            for method, total in decoded.items():
                total.add(of_part[method])
            advance(sum(cut.duration for cut in part))
    return decoded


def _decode_batch(
    recognizer: Recognizer,
    cuts: list[Cut],
    methods: Sequence[Method],
    beam: int,
    ends: Mapping[str, list[tuple[str, float]]],
) -> dict[Method, Decoded]:
    """One batch; ``ends`` are those of the words of the cuts that have them aligned, in seconds."""
    began = time.perf_counter()
    batch = plain_batch(cuts)
    encoded = recognizer.model.encode(batch.features, batch.feature_lens, batch.languages)
    if recognizer.device.type == "cuda":
        torch.cuda.synchronize(recognizer.device)
    shared = time.perf_counter() - began
    decoded = {}
    for method in methods:
        began = time.perf_counter()
        hypotheses = search(recognizer.model, encoded, method, beam, recognizer.tokenizer.special_ids)
        seconds = shared + time.perf_counter() - began
        scored, latencies = score(batch, hypotheses, recognizer.tokenizer), list[float]()
        for number, hypothesis in enumerate(hypotheses if ends else ()):
            words = ends.get(batch.cut_ids[number]) or ()
            late = emission_latencies(hypothesis, recognizer.tokenizer, words, recognizer.context)
            latencies += late
            scored[number] = replace(scored[number], late_ms=tuple(round(value, 1) for value in late))
        decoded[method] = Decoded(scored, latencies, seconds)
    return decoded


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
