"""result.json: what ``evaluate`` writes, and what reads it back.

Rates are fractions, not per cent, and None where there is nothing to divide by.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from asrkit.config import config, from_dict
from asrkit.errors import UserError
from asrkit.migration import migrate_result
from asrkit.reporting.wer import Scored, confidence_interval, total_chars, total_words

RESULT = "result.json"
Count = Annotated[int, Field(ge=0)]


@config
class Errors:
    """Word and character errors of some utterances; ``wer_95`` is a 95 % interval of the WER."""

    utterances: Count
    words: Count
    wer: float | None
    wer_95: tuple[float, float] | None
    substitutions: Count
    insertions: Count
    deletions: Count
    characters: Count
    cer: float | None


@config
class Latencies:
    """How late ``words`` rightly recognized words were known, in milliseconds; None where there is no such word."""

    mean_ms: float | None
    p90_ms: float | None
    words: Count


@config
class Result:
    """One evaluation: what was decoded (run, variant, context, manifest, method), how well, and how fast.

    ``latency_ms``: the context's algorithmic latency, None of one that waits for the end. ``beam``: None of other methods.
    """

    run: str
    weights_sha256: str
    variant: str
    context: str
    latency_ms: float | None
    manifest: str
    manifest_sha256: str | None
    method: str
    beam: int | None
    total: Errors
    languages: dict[str, Errors]
    emission_latency: Latencies | None
    audio_seconds: float
    decode_seconds: float
    real_time_factor: float
    device: str
    threads: int
    warnings: list[str]

    @property
    def search(self) -> str:
        """The method, and the size of a beam: ``greedy``, ``beam 4``."""
        return self.method if self.beam is None else f"{self.method} {self.beam}"


def summarize(utterances: Sequence[Scored]) -> Errors:
    """The errors of all ``utterances`` together."""
    words, chars = total_words(utterances), total_chars(utterances)
    return Errors(
        utterances=len(utterances),
        words=words.words,
        wer=words.rate if words.words else None,
        wer_95=confidence_interval(utterances),
        substitutions=words.substitutions,
        insertions=words.insertions,
        deletions=words.deletions,
        characters=chars.words,
        cer=chars.rate if chars.words else None,
    )


def read_results(run: Path) -> list[Result]:
    """Every result.json below ``evaluation/``, in the order of the directories' names.

    Raises:
        UserError: a line for each file that is damaged, or of another version of asrkit.
    """
    results, findings = [], []
    for file in sorted(run.glob(f"evaluation/*/{RESULT}")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it holds no object")
            results.append(from_dict(Result, migrate_result(content), RESULT))
        except UserError as error:
            more = f"; and {len(error.lines) - 1} more" if len(error.lines) > 1 else ""
            findings.append(_not_a_result(file, f"{error.lines[0]}{more}"))
        except (OSError, ValueError, RecursionError) as error:
            findings.append(_not_a_result(file, " ".join(str(error).split())))
    if findings:
        raise UserError.of(findings)
    return results


def _not_a_result(file: Path, reason: str) -> str:
    return f"{file}: is not a result of this version's evaluate ({reason}); delete its directory and evaluate again"


def manifest_name(manifest: str) -> str:
    """``test`` of ``data/test.jsonl.gz``; a Shar directory has its own name."""
    path = Path(manifest)
    return path.name.removesuffix(".gz").removesuffix(".jsonl") or path.resolve().name
