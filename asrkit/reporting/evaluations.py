"""Evaluations as systems to compare: which one of a run directory, and whether two have the same references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from asrkit.errors import UserError
from asrkit.reporting.compare import System, reference_differences
from asrkit.reporting.results import (
    RESULT,
    Result,
    is_external_evaluation,
    read_evaluations,
    read_result,
    read_utterances,
    weights_digest,
)
from asrkit.reporting.wer import Scored
from asrkit.run_dir import EXPORT, WEIGHTS

SHOWN = 3  # differing references that an error names


def find_evaluation(path: Path, patterns: Sequence[str]) -> Path:
    """The directory of one evaluation: ``path`` itself, or the only one below a run or export that fits every pattern.

    Of a run directory or an exported model, evaluations with its present weights count. A pattern is part of the directory's
    name (``test``, ``3f2a9c01``, ``beam4``), or all of it with ``*`` and ``?`` for what may vary.

    Raises:
        UserError: there is none, or more than one; the line lists them.
    """
    if (path / RESULT).is_file():
        return path
    current = current_evaluations(path)
    matching = [directory for directory in current if fits(directory.name, patterns)]
    if len(matching) == 1:
        return matching[0]
    names = ", ".join(directory.name for directory in matching or current)
    if matching:
        raise UserError(f"{path}: has {len(matching)} evaluations; choose one with --evaluation, by a part of: {names}")
    raise UserError(f"{path}: no evaluation fits --evaluation {' --evaluation '.join(patterns)}; it has {names}")


def current_evaluations(path: Path) -> dict[Path, Result]:
    """The evaluations of a run directory or an exported model with its present weights, by their directories; of a recognizer from
    outside the one that ``path`` is.

    Raises:
        UserError: it is something else, a result is damaged, or there is none.
    """
    if is_external_evaluation(path):
        return {path: read_result(path)}
    if not any((path / name).is_file() for name in (WEIGHTS, EXPORT)):
        raise UserError(
            f"{path}: is no run directory, exported model or evaluation; `asrkit evaluate` writes evaluations"
        )
    digest = weights_digest(path)
    current = {
        directory: result for directory, result in read_evaluations(path).items() if result.weights_sha256 == digest
    }
    if not current:
        raise UserError(
            f"{path}: was not evaluated with its present weights; run `asrkit evaluate --from {path} --manifest ...`"
        )
    return current


def counterpart(result: Result, candidates: Mapping[Path, Result]) -> Path | None:
    """The candidate on the same manifest by the same search; of several, the one in the same context, then variant too.

    None where there is none, or still more than one. Evaluations that differ by their words' confidences alone have the same words.
    """
    same = [
        (directory, other)
        for directory, other in candidates.items()
        if other.manifest_sha256 is not None
        and (other.manifest_sha256, other.whole_search) == (result.manifest_sha256, result.whole_search)
    ]
    for key in ("context", "variant"):
        if len(same) > 1:
            same = [(directory, other) for directory, other in same if getattr(other, key) == getattr(result, key)]
    first = same[0] if same else None
    alike = first and all(
        (other.context, other.variant, other.total) == (first[1].context, first[1].variant, first[1].total)
        for _, other in same
    )
    return first[0] if first and alike else None


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether an evaluation's directory fits every pattern; see ``find_evaluation``."""
    return all(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern if set("*?[") & set(pattern) else f"*{pattern}*")


def load_system(name: str, evaluations: Sequence[Path]) -> System:
    """A system of one evaluation, or of several that differ by the training seed."""
    return System(name, tuple(tuple(read_utterances(evaluation)) for evaluation in evaluations))


def matched(systems: Sequence[System]) -> list[System]:
    """The systems with their utterances in the order of the first, each with the speaker that any of them knows.

    Raises:
        UserError: the references of two differ, with the first differences; an id occurs twice.
    """
    first = systems[0].utterances
    if len({utterance.cut_id for utterance in first}) < len(first):
        raise UserError(f"{systems[0].name}: two cuts have the same id; give each its own and evaluate again")
    findings = []
    for system in systems:
        for seed in system.seeds:
            lines = reference_differences(first, seed)
            if lines or len(seed) != len(first):
                findings.append(_different(systems[0].name, system.name, lines))
    if findings:
        raise UserError.of(list(dict.fromkeys(findings)))
    speakers: dict[str, str] = {}
    for utterance in (utterance for system in systems for seed in system.seeds for utterance in seed):
        speakers[utterance.cut_id] = speakers.get(utterance.cut_id) or utterance.speaker
    return [System(system.name, tuple(_in_order(seed, speakers) for seed in system.seeds)) for system in systems]


def _in_order(utterances: Sequence[Scored], speakers: dict[str, str]) -> tuple[Scored, ...]:
    by_id = {utterance.cut_id: utterance for utterance in utterances}
    return tuple(replace(by_id[cut_id], speaker=speaker) for cut_id, speaker in speakers.items())


def _different(first: str, second: str, lines: Sequence[str]) -> str:
    shown = "; ".join(lines[:SHOWN]) or "a cut occurs twice"
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return (
        f"{first} and {second} were not evaluated on the same references ({shown}{more}); "
        "evaluate both with one manifest, or choose the evaluations with --evaluation"
    )
