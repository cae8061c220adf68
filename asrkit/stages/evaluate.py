"""evaluate: decode a manifest, count the errors, and write what a person and a script want to know."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from lhotse import CutSet

from asrkit.data.batch import evaluation_batches
from asrkit.data.checks import decodable_cuts
from asrkit.data.manifests import digest_of, speaker_of
from asrkit.decoding.choice import ContextChoice
from asrkit.decoding.evaluation import score
from asrkit.decoding.latency import emission_latencies, summarize_latencies, word_ends
from asrkit.decoding.recognizer import Recognizer, load_recognizer
from asrkit.decoding.search import Method, search
from asrkit.errors import UserError
from asrkit.reporting.evaluation_files import Evaluation, make_directory, write_evaluation
from asrkit.reporting.progress import progress
from asrkit.reporting.results import EVALUATION, Latencies, Result, manifest_name, summarize
from asrkit.reporting.wer import Scored, by_language

T = TypeVar("T")


def evaluate(
    run_path: Path,
    manifest: Path,
    *,
    methods: Sequence[Method] = ("greedy",),
    beam: int = 4,
    variant: str | None = None,
    context: ContextChoice | None = None,
    max_duration: float = 200.0,
    device: str = "auto",
    threads: int | None = None,
    out: Path | None = None,
) -> list[Evaluation]:
    """Decode ``manifest`` with a trained model by each of ``methods`` and write the results.

    Each method has its directory, ``<out>/<manifest>-<digest>-<variant>-<context>-<method>``, by default in
    ``<run>/evaluation``; the digest is the manifest's, so that manifests of one name have results of their own. A streaming
    context is decoded chunk by chunk, as on a device. An utterance with an empty reference is decoded too: every word
    recognized in it is an insertion.

    Args:
        variant: the active sub-models; None is the one the last stage trained.
        context: None is the first the variant was trained in.
        max_duration: seconds of padded audio decoded at once.
        threads: of torch; None leaves what is set.

    Raises:
        UserError: everything wrong with the run directory, the manifest and the options, before any decoding.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    methods = list(dict.fromkeys(methods))
    recognizer, cuts, warnings = _open(run_path, manifest, methods, beam, variant, context or ContextChoice(), device)
    digest = digest_of(manifest)
    directories = {
        method: (out or run_path / EVALUATION) / _name(manifest, digest, recognizer, method, beam) for method in methods
    }
    for directory in directories.values():
        make_directory(directory)
    decoded = _decode(recognizer, cuts, methods, beam, max_duration)
    order = {cut.id: number for number, cut in enumerate(cuts)}
    speakers = {cut.id: speaker_of(cut) for cut in cuts}
    evaluations = []
    for method in methods:
        named = [replace(utterance, speaker=speakers[utterance.cut_id]) for utterance in decoded[method].scored]
        utterances = sorted(named, key=lambda utterance: order[utterance.cut_id])
        latencies, seconds = decoded[method].latencies, decoded[method].seconds
        audio_seconds = float(sum(cut.duration for cut in cuts))
        result = Result(
            run=str(run_path),
            weights_sha256=recognizer.weights_sha256,
            variant=recognizer.variant,
            context=str(recognizer.context),
            latency_ms=recognizer.context.latency_ms,
            manifest=str(manifest),
            manifest_sha256=digest,
            method=method,
            beam=beam if method == "beam" else None,
            total=summarize(utterances),
            languages={language: summarize(part) for language, part in by_language(utterances).items()},
            emission_latency=None if latencies is None else Latencies(**summarize_latencies(latencies)),
            audio_seconds=round(audio_seconds, 3),
            decode_seconds=round(seconds, 3),
            real_time_factor=round(seconds / audio_seconds, 6),
            device=str(recognizer.device),
            threads=torch.get_num_threads(),
            warnings=[*recognizer.warnings, *warnings],
        )
        evaluations.append(write_evaluation(directories[method], result, utterances))
    return evaluations


def _open(
    run_path: Path,
    manifest: Path,
    methods: Sequence[Method],
    beam: int,
    variant: str | None,
    choice: ContextChoice,
    device: str,
) -> tuple[Recognizer, CutSet, list[str]]:
    """The recognizer, the cuts, and warnings; everything wrong with either and with the options is reported at once."""
    findings = [f"--beam {beam}: must be at least 1"] if beam < 1 else []
    if contradictions := choice.contradictions():
        findings += contradictions
        choice = ContextChoice()
    recognizer = _gather(findings, lambda: load_recognizer(run_path, device, variant, choice, methods))
    languages: Sequence[str] = ()
    if recognizer is not None:
        languages = recognizer.languages if recognizer.language is None else [recognizer.language]
    checked = _gather(
        findings, lambda: decodable_cuts(manifest, languages, recognizer.tokenizer if recognizer else None)
    )
    if findings or recognizer is None or checked is None:
        raise UserError.of(findings)
    return recognizer, *checked


def _gather(findings: list[str], action: Callable[[], T]) -> T | None:
    """Do ``action``; the lines of a UserError are added to ``findings``, so that all checks report together."""
    try:
        return action()
    except UserError as error:
        findings += error.lines
        return None


@dataclass
class _Decoded:
    """One method's hypotheses for a manifest; ``latencies`` (milliseconds a word) where words are aligned."""

    scored: list[Scored] = field(default_factory=list)
    latencies: list[float] | None = None
    seconds: float = 0.0


def _decode(
    recognizer: Recognizer, cuts: CutSet, methods: Sequence[Method], beam: int, max_duration: float
) -> dict[Method, _Decoded]:
    """Decode every cut by every method; seconds of each count what they share: audio, features, encoder."""
    streaming = recognizer.context.streaming
    ends = {cut.id: aligned for cut in cuts if (aligned := word_ends(cut))} if streaming else {}
    decoded = {method: _Decoded(latencies=[] if ends else None) for method in methods}
    with progress("decoding", sum(cut.duration for cut in cuts), "s of audio") as advance:
        began = time.perf_counter()
        for batch in evaluation_batches(cuts, max_duration):
            encoded = recognizer.model.encode(batch.features, batch.feature_lens, batch.languages)
            if recognizer.device.type == "cuda":
                torch.cuda.synchronize(recognizer.device)
            shared = time.perf_counter() - began
            for method, total in decoded.items():
                began = time.perf_counter()
                hypotheses = search(recognizer.model, encoded, method, beam, recognizer.tokenizer.special_ids)
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


def _name(manifest: Path, digest: str, recognizer: Recognizer, method: Method, beam: int) -> str:
    """``test-3f2a9c01-near-chunk16-left64-beam4``: a result's directory."""
    context = str(recognizer.context).replace("=", "").replace(",", "-")
    search = f"beam{beam}" if method == "beam" else method
    return f"{manifest_name(str(manifest))}-{digest[:8]}-{recognizer.variant}-{context}-{search}"
