"""evaluate: decode a manifest, count the errors, and write what a person and a script want to know."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lhotse import CutSet

from asrkit.config import digest as content_digest
from asrkit.config import to_dict
from asrkit.data.checks import decodable_cuts
from asrkit.data.manifests import digest_of, speaker_of
from asrkit.decoding.choice import ContextChoice
from asrkit.decoding.evaluation import decode_cuts, decoding_record
from asrkit.decoding.fusion import Fusion, FusionRequest, load_fusion
from asrkit.decoding.latency import summarize_latencies
from asrkit.decoding.recognizer import Recognizer, load_recognizer
from asrkit.decoding.search import Method, cannot_fuse
from asrkit.disk import atomic_write
from asrkit.errors import UserError
from asrkit.reporting.results import (
    EVALUATION,
    RESULT,
    UTTERANCES,
    DecodingRecord,
    Latencies,
    Result,
    manifest_name,
    summarize,
    utterance_line,
)
from asrkit.reporting.wer import (
    Scored,
    by_language,
    confusions,
    format_alignment,
    format_confusions,
    format_summary,
    total_words,
)

ALIGNMENTS, CONFUSIONS = "alignments.txt", "confusions.txt"

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """One method's result: the utterances, and ``result``, which is result.json."""

    directory: Path
    result: dict[str, Any]
    utterances: list[Scored]


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
    fusion: FusionRequest | None = None,
) -> list[Evaluation]:
    """Decode ``manifest`` with a trained model by each of ``methods`` and write the results.

    Each method has its directory, ``<out>/<manifest>-<digest>-<variant>-<context>-<method>``, by default in
    ``<run>/evaluation``; the digest is the manifest's, so that manifests of one name have results of their own. A beam that heeds
    a language model and the like has the digest of all that in its name too. A streaming
    context is decoded chunk by chunk, as on a device. An utterance with an empty reference is decoded too: every word
    recognized in it is an insertion.

    Args:
        variant: the active sub-models; None is the one the last stage trained.
        context: None is the first the variant was trained in.
        max_duration: seconds of padded audio decoded at once.
        threads: of torch; None leaves what is set.
        fusion: what else the beam search heeds; None: nothing.

    Raises:
        UserError: everything wrong with the run directory, the manifest and the options, before any decoding.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    methods = list(dict.fromkeys(methods))
    recognizer, fused, cuts, warnings = _open(
        run_path, manifest, methods, beam, variant, context or ContextChoice(), device, fusion
    )
    digest = digest_of(manifest)
    record, tuned_here = decoding_record(fusion, fused, manifest, digest)
    directories = {
        method: (out or run_path / EVALUATION) / _name(manifest, digest, recognizer, method, beam, record)
        for method in methods
    }
    for directory in directories.values():
        _make(directory)
    decoded = decode_cuts(recognizer, cuts, methods, beam, max_duration, fused)
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
            warnings=[*recognizer.warnings, *warnings, *tuned_here],
            decoding=record,
        )
        _write(directories[method], result, utterances)
        evaluations.append(Evaluation(directories[method], to_dict(result), utterances))
    return evaluations


def _open(
    run_path: Path,
    manifest: Path,
    methods: Sequence[Method],
    beam: int,
    variant: str | None,
    choice: ContextChoice,
    device: str,
    fusion: FusionRequest | None,
) -> tuple[Recognizer, Fusion | None, CutSet, list[str]]:
    """The recognizer, what else counts, the cuts, and warnings; everything wrong with either and with the options is reported at once."""
    findings = [f"--beam {beam}: must be at least 1"] if beam < 1 else []
    if fusion is not None:
        findings += [cannot_fuse(method) for method in methods if method != "beam"]
    if contradictions := choice.contradictions():
        findings += contradictions
        choice = ContextChoice()
    recognizer = _gather(findings, lambda: load_recognizer(run_path, device, variant, choice, methods))
    languages: Sequence[str] = ()
    fused = None
    if recognizer is not None:
        if fusion is not None:
            fused = _gather(findings, partial(load_fusion, fusion, recognizer.tokenizer, recognizer.device))
        languages = recognizer.languages if recognizer.language is None else [recognizer.language]
    checked = _gather(
        findings, lambda: decodable_cuts(manifest, languages, recognizer.tokenizer if recognizer else None)
    )
    if findings or recognizer is None or checked is None:
        raise UserError.of(findings)
    return recognizer, fused, *checked


def _gather(findings: list[str], action: Callable[[], T]) -> T | None:
    """Do ``action``; the lines of a UserError are added to ``findings``, so that all checks report together."""
    try:
        return action()
    except UserError as error:
        findings += error.lines
        return None


def _make(directory: Path) -> None:
    """Create ``directory`` before the work, so that a path that cannot be written is reported at once."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot write there ({error.strerror}); choose another --out") from error


def _name(
    manifest: Path, digest: str, recognizer: Recognizer, method: Method, beam: int, record: DecodingRecord | None
) -> str:
    """``test-3f2a9c01-near-chunk16-left64-beam4``: a result's directory."""
    context = str(recognizer.context).replace("=", "").replace(",", "-")
    search = f"beam{beam}" if method == "beam" else method
    if record is not None:
        search += f"-{content_digest(to_dict(record))[:8]}"
    return f"{manifest_name(str(manifest))}-{digest[:8]}-{recognizer.variant}-{context}-{search}"


def _write(directory: Path, result: Result, utterances: Sequence[Scored]) -> None:
    """Write the files of one method; result.json comes last, so where it is new, all are."""
    total = format_summary(total_words(utterances))
    heading = f"{result.manifest} by {result.run}, {result.variant}, {result.context}, {result.search}: {total}\n\n"
    contents = {
        ALIGNMENTS: heading + "\n".join(format_alignment(utterance) for utterance in utterances),
        CONFUSIONS: heading + format_confusions(confusions(utterances)),
        UTTERANCES: "".join(utterance_line(utterance) for utterance in utterances),
        RESULT: json.dumps(to_dict(result), indent=2, ensure_ascii=False) + "\n",
    }
    for name, content in contents.items():
        with atomic_write(directory / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
