"""evaluate of an external recognizer: the same table and files as for a run, to see what one would use instead."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from asrkit.data.checks import decodable_cuts
from asrkit.data.manifests import digest_of, language_of, speaker_of, text_of
from asrkit.decoding.external.interface import TextRecognizer, spoken_words
from asrkit.decoding.external.opening import open_text_recognizer
from asrkit.decoding.external.utterances import batched, read_whole, transcribe_pieces
from asrkit.decoding.search import Method
from asrkit.errors import UserError
from asrkit.reporting.evaluation_files import Evaluation, directories_for, write_evaluation
from asrkit.reporting.progress import progress
from asrkit.reporting.results import EVALUATION, Result, manifest_name, summarize
from asrkit.reporting.wer import Scored, by_language


def evaluate_external(
    spec: str,
    manifest: Path,
    *,
    methods: Sequence[Method] = ("greedy",),
    beam: int = 4,
    max_duration: float = 200.0,
    device: str = "auto",
    threads: int | None = None,
    out: Path | None = None,
) -> list[Evaluation]:
    """Decode ``manifest`` with the recognizer ``whisper:...`` or ``sherpa-onnx:DIR`` by each of ``methods``.

    Results go to ``<out>/<manifest>-<digest>-<recognizer>-<method>``, by default in ``evaluation`` where the command runs. Hypotheses are
    normalized to words, as references are by `asrkit data import`. An utterance longer than the recognizer takes is cut at pauses.

    Raises:
        UserError: everything wrong with the manifest and the recognizer, before any decoding.
    """
    cuts, warnings = decodable_cuts(manifest, sound=True)
    digest, evaluations = digest_of(manifest), []
    with ExitStack() as stack:
        opened = {}  # before any decodes, so that a method the recognizer lacks is refused at once
        for method in dict.fromkeys(methods):
            options: dict[str, Any] = {"method": method, "beam": beam, "device": device, "threads": threads}
            opened[method] = stack.enter_context(open_text_recognizer(spec, **options))
            _check_languages(opened[method], list(cuts))
        for method, recognizer in opened.items():
            directory = (out or Path(EVALUATION)) / _name(manifest, digest, recognizer)
            with directories_for([directory]):
                hypotheses, uncertain, seconds = _decode(recognizer, list(cuts), max_duration)
            utterances = [
                Scored(cut.id, text_of(cut), hypotheses[cut.id], language_of(cut), speaker_of(cut)) for cut in cuts
            ]
            audio_seconds = float(sum(cut.duration for cut in cuts))
            result = Result(
                run=spec,
                weights_sha256=recognizer.sha256,
                variant="external",
                context=recognizer.context,
                latency_ms=None,
                manifest=str(manifest),
                manifest_sha256=digest,
                method=method,
                beam=recognizer.beam,
                total=summarize(utterances),
                languages={language: summarize(part) for language, part in by_language(utterances).items()},
                emission_latency=None,
                audio_seconds=round(audio_seconds, 3),
                decode_seconds=round(seconds, 3),
                real_time_factor=round(seconds / audio_seconds, 6),
                device=recognizer.device,
                threads=recognizer.threads,
                warnings=[*warnings, *_text_warnings(manifest, list(cuts), uncertain)],
                external=True,
                model_bytes=recognizer.num_bytes,
            )
            evaluations.append(write_evaluation(directory, result, utterances))
    return evaluations


def _check_languages(recognizer: TextRecognizer, cuts: Sequence[Cut]) -> None:
    counts = Counter(language_of(cut) for cut in cuts)
    problems = [(problem, counts[name]) for name in counts if (problem := recognizer.check_language(name)) is not None]
    if problems:
        raise UserError.of([f"{problem} ({count} cuts)" for problem, count in problems])


def _decode(
    recognizer: TextRecognizer, cuts: Sequence[Cut], max_duration: float
) -> tuple[dict[str, str], Counter[str], float]:
    """Each cut's words, why some of them are uncertain, and the seconds it took, from reading audio to words."""
    words: dict[str, list[str]] = {cut.id: [] for cut in cuts}
    uncertain: Counter[str] = Counter()
    began = time.perf_counter()
    longest_first = sorted(cuts, key=lambda cut: (-cut.duration, cut.id))
    with progress("decoding", sum(cut.duration for cut in cuts), "s of audio") as advance:
        for pieces in batched(read_whole(longest_first, recognizer.max_seconds), max_duration):
            languages = [language_of(piece.cut) for piece in pieces]
            for piece, result in zip(pieces, transcribe_pieces(recognizer, pieces, languages), strict=True):
                text, reason = spoken_words(result.text, result.language)
                words[piece.cut.id] += text.split()
                uncertain.update([reason] if reason else [])
            advance(sum(piece.end - piece.begin for piece in pieces))
    return {cut_id: " ".join(parts) for cut_id, parts in words.items()}, uncertain, time.perf_counter() - began


def _text_warnings(manifest: Path, cuts: Sequence[Cut], uncertain: Counter[str]) -> list[str]:
    warnings = []
    if uncertain:
        reasons = ", ".join(f"{count} {reason}" for reason, count in uncertain.most_common())
        warnings.append(
            f"{uncertain.total()} hypotheses have words that are not certain ({reasons}), which are left out"
        )
    written = [cut.id for cut in cuts if spoken_words(text_of(cut), language_of(cut))[0] != text_of(cut)]
    if written:
        warnings.append(
            f"{manifest}: {len(written)} reference(s) are not normalized, the first is that of cut {written[0]}; hypotheses are, so "
            "case, punctuation and numbers count as errors"
        )
    return warnings


def _name(manifest: Path, digest: str, recognizer: TextRecognizer) -> str:
    """``test-3f2a9c01-whisper-tiny.en-beam4``, ``test-3f2a9c01-sherpa-onnx-model-5a0c3e11-ctc``: a result's directory; of a path the
    last part, and the digest of its files, as others may be called the same."""
    kind, _, name = recognizer.name.partition(":")
    label = f"{Path(name).resolve().name}-{recognizer.sha256[:8]}" if Path(name).is_dir() else name
    label = re.sub(r"[^\w.-]+", "-", f"{kind}-{label}").strip("-")
    search = recognizer.search if recognizer.beam is None else f"beam{recognizer.beam}"
    return f"{manifest_name(str(manifest))}-{digest[:8]}-{label}-{search}"
