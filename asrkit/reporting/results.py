"""result.json and utterances.jsonl: what ``evaluate`` writes, and what reads it back.

Rates are fractions, not per cent, and None where there is nothing to divide by.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from asrkit.config import config, digest, from_dict, to_dict
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.migration import migrate_result
from asrkit.reporting.wer import Scored, confidence_interval, total_chars, total_words
from asrkit.run_dir import EXPORT, WEIGHTS

RESULT, UTTERANCES = "result.json", "utterances.jsonl"
EVALUATION = "evaluation"  # the folder of a run directory that holds a directory for each evaluation
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
class DecodingRecord:
    """What a search used in addition to the acoustic model.

    settings: those of ``decoding.fusion.FusionConfig``. sources: path and digest of each part, by option: lm, lodr, hotwords.
    tuned_on: path and digest of the manifest the settings were tuned on; None if it is not known.
    """

    settings: dict[str, float | str]
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    tuned_on: dict[str, str] | None = None


@config
class GraphUse:
    """The decoding graph that CTC was searched over, and how; ``bytes`` are those of its file. no_path: utterances without a path
    through it, whose text is empty."""

    path: str
    sha256: str
    bytes: Count
    scale: float
    search_beam: float
    output_beam: float
    max_active: Count
    paths: Count
    no_path: Count = 0


@config
class Confidence:
    """How well the confidences of recognized words tell which are right: the share that is, the mean confidence, and the expected
    calibration error over ``bins`` bins of equal width; None where there is no word. ``temperature`` divided the scores of the
    n-best texts; ``calibrated_on``: the manifest it was fitted on, None of one that was given."""

    words: Count
    right: float | None
    mean: float | None
    ece: float | None
    bins: Count
    temperature: float
    calibrated_on: str | None


@config
class Result:
    """One evaluation: what was decoded (run, variant, context, manifest, method), how well, and how fast.

    ``latency_ms``: the context's algorithmic latency, None of one that waits for the end. ``beam``: None of other methods.
    ``decoding``: None of a search by the acoustic model alone. ``confidence``: None of a search without alternatives.
    ``external``, ``model_bytes``: whether an external recognizer was evaluated, and the bytes of its files.
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
    decoding: DecodingRecord | None = None
    graph: GraphUse | None = None
    confidence: Confidence | None = None
    external: bool = False
    model_bytes: Count | None = None

    @property
    def search(self) -> str:
        """The method, the size of a beam, and what else counted: ``greedy``, ``beam 4``, ``beam 4 lm 0.3 hotwords``."""
        words = [self.method if self.beam is None else f"{self.method} {self.beam}"]
        words += [] if self.graph is None else [Path(self.graph.path).name, f"{self.graph.scale:g}"]
        if self.decoding is not None:
            scales = {name: self.decoding.settings.get(f"{name}_scale", "") for name in self.decoding.sources}
            words += [f"{name} {scale}".rstrip() for name, scale in scales.items()]
            words += ["tuned decoding"] if not self.decoding.sources else []
        return " ".join(words)

    @property
    def whole_search(self) -> tuple[str, str]:
        """``search``, and what it does not say: the other settings, and the digests of the files that counted."""
        graph = None if self.graph is None else {**to_dict(self.graph), "path": "", "no_path": 0}
        settings = sources = None
        if self.decoding is not None:
            settings = self.decoding.settings
            sources = {name: source.get("sha256") for name, source in self.decoding.sources.items()}
        return self.search, digest([settings, sources, graph])


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


@config
class Utterance:
    """A line of utterances.jsonl. Results written before speakers, or pieces and their times, were kept have none."""

    id: str
    language: str
    speaker: str = ""
    ref: str
    hyp: str
    words: Count
    errors: Count
    pieces: list[str] = field(default_factory=list)
    frames: list[Count] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)

    @property
    def scored(self) -> Scored:
        timed = (tuple(self.pieces), tuple(self.frames), tuple(self.late_ms), tuple(self.confidence))
        return Scored(self.id, self.ref, self.hyp, self.language, self.speaker, *timed)


def utterance_line(utterance: Scored) -> str:
    """The line of utterances.jsonl."""
    row = Utterance(
        id=utterance.cut_id,
        language=utterance.language,
        speaker=utterance.speaker,
        ref=utterance.ref,
        hyp=utterance.hyp,
        words=utterance.words.words,
        errors=utterance.words.errors,
        pieces=list(utterance.pieces),
        frames=list(utterance.frames),
        late_ms=list(utterance.late_ms),
        confidence=list(utterance.confidence),
    )
    return json.dumps(to_dict(row), ensure_ascii=False) + "\n"


def read_results(run: Path) -> list[Result]:
    """Every result.json below ``evaluation/``, in the order of the directories' names.

    Raises:
        UserError: a line for each file that is damaged, or of another version of asrkit.
    """
    return list(read_evaluations(run).values())


def read_evaluations(run: Path) -> dict[Path, Result]:
    """The same by the evaluations' directories."""
    results: dict[Path, Result] = {}
    findings: list[str] = []
    for file in sorted(run.glob(f"{EVALUATION}/*/{RESULT}")):
        try:
            results[file.parent] = read_result(file.parent)
        except UserError as error:
            findings += error.lines
    if findings:
        raise UserError.of(findings)
    return results


def is_external_evaluation(path: Path) -> bool:
    """Whether ``path`` is the directory of an evaluation of an external recognizer, which has no other directory.

    Raises:
        UserError: its result is damaged, or of another version of asrkit.
    """
    return (path / RESULT).is_file() and read_result(path).external


def read_result(directory: Path) -> Result:
    """The result.json of an evaluation's directory.

    Raises:
        UserError: it is damaged, or of another version of asrkit.
    """
    file = directory / RESULT
    try:
        return from_dict(Result, migrate_result(_object(file.read_text(encoding="utf-8"))), RESULT)
    except UserError as error:
        more = f"; and {len(error.lines) - 1} more" if len(error.lines) > 1 else ""
        raise _not_a_result(file, f"{error.lines[0]}{more}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _not_a_result(file, " ".join(str(error).split())) from error


def read_utterances(directory: Path) -> list[Scored]:
    """The utterances of an evaluation's directory, in the manifest's order.

    Raises:
        UserError: the file is missing or damaged.
    """
    file, rows = directory / UTTERANCES, []
    try:
        # Only a line feed ends a line: a text may hold other characters that Python takes for line ends.
        for number, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
            rows.append(from_dict(Utterance, _object(line), f"line {number}"))
    except UserError as error:
        raise _not_a_result(file, error.lines[0]) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _not_a_result(file, " ".join(str(error).split())) from error
    return [row.scored for row in rows]


def weights_digest(path: Path) -> str:
    """SHA-256 of what a run directory or an exported model recognizes with, as a result names it."""
    return sha256_of(path / (EXPORT if (path / EXPORT).is_file() else WEIGHTS))


def _object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    return content


def _not_a_result(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file}: is not a result of this version's evaluate ({reason}); delete its directory and evaluate again"
    )


def manifest_name(manifest: str) -> str:
    """``test`` of ``data/test.jsonl.gz``; a Shar directory has its own name."""
    path = Path(manifest)
    return path.name.removesuffix(".gz").removesuffix(".jsonl") or path.resolve().name
