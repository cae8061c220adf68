"""compare: systems against a baseline on the same utterances, with tests of whether they differ by more than chance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asrkit.config import to_dict
from asrkit.disk import atomic_write
from asrkit.errors import UserError
from asrkit.reporting.compare import Comparison, Unit, compare
from asrkit.reporting.evaluations import find_evaluation, load_system, matched


@dataclass(frozen=True)
class _Named:
    """A system as the user wrote it: its name, and the paths of its seeds."""

    name: str
    paths: tuple[Path, ...]


def compare_runs(
    arguments: Sequence[str],
    *,
    baseline: str | None = None,
    by: Unit | None = None,
    seeds: bool = False,
    margin: float | None = None,
    evaluation: Sequence[str] = (),
    out: Path | None = None,
) -> list[Comparison]:
    """Compare evaluated systems with a baseline; optionally write all of it to ``out`` as JSON.

    Args:
        arguments: run directories, exported models or directories of evaluations; with ``seeds`` each is ``name=run,run``.
        baseline: one of the arguments (with ``seeds``, a name), or a further one; None is the first.
        by: what is resampled for the interval; None is speakers where they are known, else utterances.
        margin: test for equivalence within this many points of WER.
        evaluation: parts of the name of the evaluation to take, where a run has several.

    Raises:
        UserError: everything that is missing or does not fit, before anything is computed.
    """
    named = [_read_argument(argument, seeds) for argument in arguments]
    if baseline is not None:
        same = [system for system in named if baseline.rstrip("/") in (system.name, *map(str, system.paths))]
        first = same[0] if same else _read_argument(baseline, seeds)
        named = [first, *(system for system in named if system != first)]
    findings = []
    if len(named) < 2:
        findings.append("one system alone: name at least two, as in `asrkit compare exp/a exp/b`")
    names = [system.name for system in named]
    runs = [{path.resolve() for path in system.paths} for system in named]
    findings += [
        f"{name}: is named twice; compare takes each system once"
        for number, name in enumerate(names)
        if name in names[:number] or any(runs[number] & earlier for earlier in runs[:number])
    ]
    if margin is not None and not 0 < margin <= 100:
        findings.append(f"--margin {margin}: must be above 0 and at most 100 points")
    evaluations: dict[str, list[Path]] = {}
    for system in named:
        for path in system.paths:
            try:
                evaluations.setdefault(system.name, []).append(find_evaluation(path, evaluation))
            except UserError as error:
                findings += error.lines
    if findings:
        raise UserError.of(list(dict.fromkeys(findings)))
    systems = matched([load_system(name, directories) for name, directories in evaluations.items()])
    comparisons = compare(systems[0], systems[1:], by, None if margin is None else margin / 100)
    if out is not None:
        content = {
            "evaluations": {name: list(map(str, directories)) for name, directories in evaluations.items()},
            "comparisons": [to_dict(comparison) for comparison in comparisons],
        }
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return comparisons


def _read_argument(text: str, seeds: bool) -> _Named:
    """``exp/a``; with ``seeds`` ``a=exp/a-1,exp/a-2``.

    Raises:
        UserError: it is not written so.
    """
    if not seeds:
        return _Named(text.rstrip("/") or text, (Path(text),))
    name, equals, runs = text.partition("=")
    paths = tuple(Path(run) for run in runs.split(",") if run)
    if not equals or not name or len(set(paths)) < 2 or len(set(paths)) < len(paths):
        raise UserError(f"{text}: with --seeds write a name and two or more runs, as in int4=exp/int4-1,exp/int4-2")
    return _Named(name, paths)
