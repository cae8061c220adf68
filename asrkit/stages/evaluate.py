"""evaluate: decode a manifest, count the errors, and write what a person and a script want to know."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from lhotse import CutSet

from asrkit.data.batch import evaluation_batches
from asrkit.data.checks import decodable_cuts
from asrkit.decoding.choice import ContextChoice
from asrkit.decoding.evaluation import score
from asrkit.decoding.latency import emission_latencies, summarize_latencies, word_ends
from asrkit.decoding.recognizer import Recognizer, load_recognizer
from asrkit.decoding.search import Method, search
from asrkit.errors import UserError
from asrkit.nn.context import Context
from asrkit.reporting.progress import progress
from asrkit.reporting.wer import (
    Scored,
    by_language,
    confidence_interval,
    confusions,
    format_alignment,
    format_confusions,
    format_summary,
    total_chars,
    total_words,
)
from asrkit.run_dir import atomic_write, sha256_of

RESULT, ALIGNMENTS, CONFUSIONS, UTTERANCES = (
    "result.json",
    "alignments.txt",
    "confusions.txt",
    "utterances.jsonl",
)

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
) -> list[Evaluation]:
    """Decode ``manifest`` with a trained model by each of ``methods`` and write the results.

    Each method has its directory, ``<out>/<manifest>-<variant>-<context>-<method>``, by default in
    ``<run>/evaluation``. A streaming context is decoded chunk by chunk, as on a device.

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
    findings: list[str] = []
    if beam < 1:
        findings.append(f"--beam {beam}: must be at least 1")
    choice = context or ContextChoice()
    if contradictions := choice.contradictions():
        findings += contradictions
        choice = ContextChoice()
    recognizer = _gather(findings, lambda: load_recognizer(run_path, device, variant, choice, methods))
    languages: Sequence[str] = ()
    if recognizer is not None:
        languages = recognizer.languages if recognizer.language is None else [recognizer.language]
    checked = _gather(findings, lambda: decodable_cuts(manifest, languages))
    if findings or recognizer is None or checked is None:
        raise UserError.of(findings)
    cuts, warnings = checked
    methods = list(dict.fromkeys(methods))
    point = f"{recognizer.variant}-{_plain(recognizer.context)}"
    directories = {
        method: (out or run_path / "evaluation") / f"{_stem(manifest)}-{point}-{method}" for method in methods
    }
    for directory in directories.values():
        _make(directory)
    decoded = _decode(recognizer, cuts, methods, beam, max_duration)
    audio_seconds = float(sum(cut.duration for cut in cuts))
    place = {cut.id: number for number, cut in enumerate(cuts)}
    evaluations = []
    for method in methods:
        found = decoded[method]
        utterances = sorted(found.scored, key=lambda utterance: place[utterance.cut_id])
        result = {
            "run": str(run_path),
            "weights_sha256": recognizer.weights_sha256,
            "variant": recognizer.variant,
            "context": str(recognizer.context),
            "latency_ms": recognizer.context.latency_ms,
            "manifest": str(manifest),
            "manifest_sha256": sha256_of(manifest) if manifest.is_file() else None,
            "method": method,
            "beam": beam if method == "beam" else None,
            "total": summarize(utterances),
            "languages": {language: summarize(part) for language, part in by_language(utterances).items()},
            "emission_latency": None if found.latencies is None else summarize_latencies(found.latencies),
            "audio_seconds": round(audio_seconds, 3),
            "decode_seconds": round(found.seconds, 3),
            "real_time_factor": round(found.seconds / audio_seconds, 6),
            "device": str(recognizer.device),
            "threads": torch.get_num_threads(),
            "warnings": [*recognizer.warnings, *warnings],
        }
        _write(directories[method], result, utterances)
        evaluations.append(Evaluation(directories[method], result, utterances))
    return evaluations


def summarize(utterances: Sequence[Scored]) -> dict[str, Any]:
    """Error rates (fractions, not per cent; null where there is nothing to divide by) with their counts."""
    words, chars = total_words(utterances), total_chars(utterances)
    return {
        "utterances": len(utterances),
        "words": words.words,
        "wer": words.rate if words.words else None,
        "wer_95": confidence_interval(utterances),
        "substitutions": words.substitutions,
        "insertions": words.insertions,
        "deletions": words.deletions,
        "characters": chars.words,
        "cer": chars.rate if chars.words else None,
    }


def _gather(findings: list[str], action: Callable[[], T]) -> T | None:
    """Do ``action``; what it finds wrong joins ``findings``, so that all checks speak at once."""
    try:
        return action()
    except UserError as error:
        findings += error.lines
        return None


@dataclass
class _Decoded:
    """What one method made of a manifest; ``latencies`` (milliseconds a word) where words are aligned."""

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
            for method, found in decoded.items():
                began = time.perf_counter()
                hypotheses = search(recognizer.model, encoded, method, beam)
                found.seconds += shared + time.perf_counter() - began
                found.scored += score(batch, hypotheses, recognizer.tokenizer)
                if found.latencies is not None:
                    for cut_id, hypothesis in zip(batch.cut_ids, hypotheses, strict=True):
                        found.latencies += emission_latencies(
                            hypothesis, recognizer.tokenizer, ends.get(cut_id, ()), recognizer.context
                        )
            advance(sum(batch.durations))
            began = time.perf_counter()
    return decoded


def _make(directory: Path) -> None:
    """Create ``directory`` before the work, so that a place that cannot be written is known at once."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot write there ({error.strerror}); choose another --out") from error


def _plain(context: Context) -> str:
    """``full``, or ``chunk16-left64``: a context in a file's name."""
    return str(context).replace("=", "").replace(",", "-")


def _stem(manifest: Path) -> str:
    """``test`` of ``data/test.jsonl.gz``; a Shar directory gives its own name."""
    return manifest.name.removesuffix(".gz").removesuffix(".jsonl") or manifest.resolve().name


def _write(directory: Path, result: dict[str, Any], utterances: Sequence[Scored]) -> None:
    """Write the files of one method; result.json comes last, so where it is new, all are."""
    total = format_summary(total_words(utterances))
    point = f"{result['variant']}, {result['context']}, {result['method']}"
    heading = f"{result['manifest']} by {result['run']}, {point}: {total}\n\n"
    rows = [
        {
            "id": utterance.cut_id,
            "language": utterance.language,
            "ref": utterance.ref,
            "hyp": utterance.hyp,
            "words": utterance.words.words,
            "errors": utterance.words.errors,
        }
        for utterance in utterances
    ]
    contents = {
        ALIGNMENTS: heading + "\n".join(format_alignment(utterance) for utterance in utterances),
        CONFUSIONS: heading + format_confusions(confusions(utterances)),
        UTTERANCES: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        RESULT: json.dumps(result, indent=2, ensure_ascii=False) + "\n",
    }
    for name, content in contents.items():
        with atomic_write(directory / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
