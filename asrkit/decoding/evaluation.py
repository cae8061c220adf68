"""Decoding against references."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lhotse.cut import Cut

from asrkit.config import to_dict
from asrkit.data.batch import Batch, evaluation_parts, named, plain_batch
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import speaker_of
from asrkit.data.parallel import Workers, in_processes
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import AcousticModel
from asrkit.decoding.domain import Search
from asrkit.decoding.fusion import Fusion, FusionRequest
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.latency import emission_latencies, summarize_latencies, word_ends
from asrkit.decoding.nbest import WordConfidence, calibrate, word_confidence
from asrkit.decoding.recognizer import Recognizer
from asrkit.decoding.search import Method, decode
from asrkit.decoding.transcripts import Transcript
from asrkit.decoding.words import timed_words
from asrkit.reporting.confidence import summarize_confidence
from asrkit.reporting.progress import progress
from asrkit.reporting.results import Confidence, DecodingRecord, Latencies, Result, summarize
from asrkit.reporting.wer import NOTHING, ErrorCounts, Scored, align, by_language, total_chars, total_words


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
    """One search's results on a manifest.

    latencies: milliseconds a word, where words are aligned. sureness, hypotheses: by cut id; the former of a search that tells
    confidences.
    """

    scored: list[Scored] = field(default_factory=list)
    latencies: list[float] | None = None
    seconds: float = 0.0
    hypotheses: dict[str, Hypothesis] = field(default_factory=dict)
    sureness: dict[str, WordConfidence] = field(default_factory=dict)

    def add(self, other: Decoded) -> None:
        """Add those of more cuts."""
        self.scored += other.scored
        self.seconds += other.seconds
        self.hypotheses |= other.hypotheses
        self.sureness |= other.sureness
        if self.latencies is not None:
            self.latencies += other.latencies or []

    @property
    def no_path(self) -> int:
        """Utterances without a path through a graph."""
        return sum(hypothesis.score == -math.inf for hypothesis in self.hypotheses.values())

    def right(self) -> list[list[bool]]:
        """Whether each word of each utterance in ``sureness`` is right, in the order of ``scored``."""
        return [
            [ref == hyp for ref, hyp in align(scored.ref.split(), self.sureness[scored.cut_id].words) if hyp != NOTHING]
            for scored in self.scored
        ]

    def temperature(self) -> float:
        """The temperature that fits the confidences best; see ``calibrate``."""
        return calibrate([self.sureness[scored.cut_id] for scored in self.scored], self.right())

    def set_confidences(self, temperature: float, calibrated_on: Path | None) -> Confidence:
        """Put the words' confidences into ``scored``; returns how well they tell which words are right."""
        rows = [self.sureness[scored.cut_id].confidences(temperature).tolist() for scored in self.scored]
        right = [word for words in self.right() for word in words]
        self.scored = [
            replace(scored, confidence=tuple(round(value, 4) for value in row))
            for scored, row in zip(self.scored, rows, strict=True)
        ]
        values = [value for row in rows for value in row]
        return summarize_confidence(values, right, temperature, None if calibrated_on is None else str(calibrated_on))

    def transcripts(self, durations: Mapping[str, float], tokenizer: Tokenizer) -> list[Transcript]:
        """The hypotheses as the transcripts of recordings that are called as the cuts."""
        return [
            Transcript(
                Path(scored.cut_id),
                round(durations[scored.cut_id], 3),
                scored.hyp,
                timed_words(self.hypotheses[scored.cut_id], tokenizer, 0.0, scored.confidence),
                name=scored.cut_id,
            )
            for scored in self.scored
        ]


def decode_cuts(
    recognizer: Recognizer, cuts: CutTable, searches: Mapping[str, Search], max_duration: float, workers: Workers
) -> dict[str, Decoded]:
    """Decode every cut by every search; the utterances are in the order of the cuts. Seconds of each count what they share (audio, features, encoder), and
    those of all processes add up."""
    streaming = recognizer.context.streaming
    ends = {cut.id: aligned for cut in cuts if (aligned := word_ends(cut))} if streaming else {}
    decoded = {name: Decoded(latencies=[] if ends else None) for name in searches}

    def decode_part(part: list[Cut]) -> dict[str, Decoded]:
        return _decode_batch(recognizer, part, searches, ends)

    with progress("decoding", float(cuts.durations.sum()), "s of audio") as advance:
        parts = evaluation_parts(cuts, max_duration)
        for part, of_part in zip(parts, in_processes(decode_part, parts, workers, named), strict=True):
            for name, total in decoded.items():
                total.add(of_part[name])
            advance(sum(cut.duration for cut in part))
    order, speakers = {cut.id: number for number, cut in enumerate(cuts)}, {cut.id: speaker_of(cut) for cut in cuts}
    for total in decoded.values():
        utterances = [replace(utterance, speaker=speakers[utterance.cut_id]) for utterance in total.scored]
        total.scored = sorted(utterances, key=lambda utterance: order[utterance.cut_id])
    return decoded


def _decode_batch(
    recognizer: Recognizer,
    cuts: list[Cut],
    searches: Mapping[str, Search],
    ends: Mapping[str, list[tuple[str, float]]],
) -> dict[str, Decoded]:
    """One batch; ``ends`` are those of the words of the cuts that have them aligned, in seconds."""
    began = time.perf_counter()
    batch = plain_batch(cuts)
    encoded = recognizer.model.encode(batch.features, batch.feature_lens, batch.languages)
    if recognizer.device.type == "cuda":
        torch.cuda.synchronize(recognizer.device)
    shared = time.perf_counter() - began
    decoded = {}
    for name, search in searches.items():
        began = time.perf_counter()
        n_best = search.run(encoded)
        seconds = shared + time.perf_counter() - began
        hypotheses = [alternatives[0] for alternatives in n_best]
        scored, latencies = score(batch, hypotheses, recognizer.tokenizer), list[float]()
        for number, hypothesis in enumerate(hypotheses if ends else ()):
            words = ends.get(batch.cut_ids[number]) or ()
            late = emission_latencies(hypothesis, recognizer.tokenizer, words, recognizer.context)
            latencies += late
            scored[number] = replace(scored[number], late_ms=tuple(round(value, 1) for value in late))
        sureness = {
            cut_id: word_confidence(alternatives, recognizer.tokenizer)
            for cut_id, alternatives in zip(batch.cut_ids, n_best if search.confident else (), strict=False)
        }
        by_id = dict(zip(batch.cut_ids, hypotheses, strict=True))
        decoded[name] = Decoded(scored, latencies, seconds, by_id, sureness)
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
        f"{manifest}: the decoding was tuned on this manifest, so the error rate is too low; evaluate on another"
    ]


def result_of(
    recognizer: Recognizer,
    cuts: CutTable,
    done: Decoded,
    search: Search,
    about: dict[str, Any],
    warnings: Sequence[str],
) -> Result:
    """result.json; ``about`` are the fields that name what was decoded."""
    audio_seconds = float(sum(cut.duration for cut in cuts))
    without = (
        [] if done.no_path == 0 else [f"{done.no_path} utterances have no path through the graph; widen its beams"]
    )
    return Result(
        **about,
        weights_sha256=recognizer.weights_sha256,
        variant=recognizer.variant,
        context=str(recognizer.context),
        latency_ms=recognizer.context.latency_ms,
        total=summarize(done.scored),
        languages={language: summarize(part) for language, part in by_language(done.scored).items()},
        emission_latency=None if done.latencies is None else Latencies(**summarize_latencies(done.latencies)),
        audio_seconds=round(audio_seconds, 3),
        decode_seconds=round(done.seconds, 3),
        real_time_factor=round(done.seconds / audio_seconds, 6),
        device=str(recognizer.device),
        warnings=[*recognizer.warnings, *warnings, *without],
        graph=None if search.graph is None else replace(search.graph, no_path=done.no_path),
    )
