"""report: models, their training, their evaluations and their data as one HTML file that opens anywhere. Decodes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from asrkit.data.manifests import digest_of, open_cuts
from asrkit.disk import atomic_write, check_writable
from asrkit.errors import UserError
from asrkit.export.directory import is_exported
from asrkit.export.evaluated import Evaluated, open_evaluated
from asrkit.extras import require
from asrkit.models import load_model
from asrkit.models.registry import ASR, kind_of
from asrkit.reporting.evaluations import current_evaluations, fits
from asrkit.reporting.page.chain import Defaults, stage_trees
from asrkit.reporting.page.systems import Model, TestSet, short_names, test_sets
from asrkit.reporting.results import RESULT, read_result
from asrkit.run_dir import open_run
from asrkit.training.run_writer import LEFT_OUT, read_sealed


@dataclass
class _Gathered:
    """What was read; ``notes`` say what the report will lack."""

    models: list[Model] = field(default_factory=list)
    opened: dict[str, Evaluated] = field(default_factory=dict)  # by the model's name
    notes: list[str] = field(default_factory=list)


def report(
    runs: Sequence[Path],
    out: Path,
    *,
    data: Sequence[Path] = (),
    evaluation: Sequence[str] = (),
    sounds: int = 20,
    defaults: Defaults = lambda stage: None,
) -> Path:
    """Write a report to ``out`` and return it.

    Args:
        runs: run directories, exported models, and directories of single evaluations, in the order to show.
        data: manifests to describe, beside those of the runs.
        evaluation: parts of the names of the evaluations to show; all with the present weights by default.
        sounds: how many utterances to embed with their sound: so many of the worst, and so many at random.
        defaults: from a command to its settings' defaults; None where they are not known.

    Raises:
        UserError: everything that cannot be read, before anything is drawn; nothing is written then.
    """
    require("report", for_="report")
    check_writable(out)
    if not runs and not data:
        raise UserError("nothing to report: name run directories, or a manifest with --data")
    gathered = _gather(runs, evaluation)
    findings: list[str] = []
    described: dict[Path, list[Cut]] = {}
    for path in data:
        try:
            described[path] = list(open_cuts(path, need_text=False))
        except UserError as error:
            findings += error.lines
    if findings:
        raise UserError.of(findings)
    tests = test_sets(gathered.models)
    html = _drawn(gathered, tests, described, sounds, defaults)
    with atomic_write(out) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))  # texts may hold halves of characters
    return out


def _gather(runs: Sequence[Path], patterns: Sequence[str]) -> _Gathered:
    """Open what is to be shown; all findings at once."""
    gathered = _Gathered()
    findings = (
        ["a run is named twice; report takes each once"] if len({path.resolve() for path in runs}) < len(runs) else []
    )
    for path, name in zip(runs, short_names(runs), strict=True):
        try:
            gathered.models.append(_read(path, name, patterns, gathered))
        except UserError as error:
            findings += error.lines
    if findings:
        raise UserError.of(findings)
    return gathered


def _read(path: Path, name: str, patterns: Sequence[str], gathered: _Gathered) -> Model:
    """One model; that of another kind than a recognizer, such as a pretrained encoder, has stages and curves only."""
    if (path / RESULT).is_file():
        result = read_result(path)
        known = result.model_bytes
        size = None if known is None else lambda variant, method: known
        return Model(name, path, None, [], {}, size, evaluations={path: result})
    run = None if is_exported(path) else open_run(path)
    if run is not None and run.kind != ASR:
        kind_of(run)  # refuses one that this version does not know
        entry = run.lineage[-1]
        return Model(name, path, entry["stage"], run.lineage, run.config, None, entry.get("seconds"))
    opened = gathered.opened[name] = open_evaluated(path)
    evaluations = {}
    try:
        current = current_evaluations(path)
        evaluations = {directory: result for directory, result in current.items() if fits(directory.name, patterns)}
        if not evaluations:
            gathered.notes.append(f"{path}: no evaluation fits --evaluation {' --evaluation '.join(patterns)}")
    except UserError as error:
        gathered.notes += error.lines
    return _model(name, opened, evaluations)


def _model(name: str, opened: Evaluated, evaluations: Mapping[Path, Any]) -> Model:
    return Model(
        name,
        opened.path,
        opened.stage,
        opened.lineage,
        {} if opened.run is None else opened.run.config,
        opened.size,
        opened.seconds,
        None if opened.spec is None else opened.spec.variant,
        evaluations,
    )


def _drawn(
    gathered: _Gathered,
    tests: Sequence[TestSet],
    described: Mapping[Path, Sequence[Cut]],
    sounds: int,
    defaults: Defaults,
) -> str:
    """The page."""
    from asrkit.reporting.page.curves import draw_curves
    from asrkit.reporting.page.layers import describe_layers
    from asrkit.reporting.page.manifests import look_at
    from asrkit.reporting.page.render import Page, render
    from asrkit.reporting.page.trade import draw_trade

    models, notes = gathered.models, gathered.notes
    stages = [model for model in models if model.stage is not None]
    layers = [
        (model, describe_layers(load_model(opened.run)))
        for model in models
        if (opened := gathered.opened.get(model.name)) is not None and opened.run is not None
    ]
    manifests = [look_at(path, cuts) for path, cuts in described.items()]
    manifests += [look_at(path, cuts) for path, cuts in _own_manifests(models, tests, described, notes)]
    return render(
        Page(
            title=f"Report on {', '.join(model.name for model in models) or ', '.join(map(str, described))}",
            created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            trees=stage_trees(stages, defaults, partial(_left_out, notes=notes)),
            curves=draw_curves(stages),
            tests=tests,
            trades=[draw_trade(one) for one in tests],
            layers=layers,
            manifests=manifests,
            data=[_utterances(one, sounds, notes) for one in tests],
            notes=notes,
        )
    )


def _utterances(tests: TestSet, sounds: int, notes: list[str]) -> dict[str, Any]:
    """A test set for the page's script, with the sounds that are embedded."""
    from asrkit.reporting.page.errors import for_script
    from asrkit.reporting.page.sounds import embed, to_embed

    cuts = {cut.id: cut for cut in _cuts(Path(tests.manifest), tests.sha256, notes) or ()}
    chosen = to_embed([one.errors for one in tests.main], sounds)
    ids = [tests.main[0].system.utterances[index].cut_id for index in chosen]
    embedded, problems = embed(cuts[cut_id] for cut_id in ids if cut_id in cuts)
    notes += problems
    return for_script(tests, cuts, embedded)


def _own_manifests(
    models: Sequence[Model], tests: Sequence[TestSet], described: Mapping[Path, Any], notes: list[str]
) -> Iterator[tuple[Path, list[Cut]]]:
    """The manifests that the models were trained and tested on, one after the other, as far as they are there and unchanged."""
    named: dict[str, str | None] = {one.manifest: one.sha256 for one in tests}
    for model in models:
        for entry in model.lineage:
            for path, sha256 in (entry.get("manifests") or {}).items():
                if str(path).endswith((".jsonl", ".jsonl.gz")) or Path(path).is_dir():
                    named.setdefault(str(path), sha256)
    known = {str(path) for path in described}
    for path, sha256 in named.items():
        if path not in known and (cuts := _cuts(Path(path), sha256, notes)):
            yield Path(path), cuts


def _cuts(path: Path, sha256: str | None, notes: list[str]) -> list[Cut] | None:
    """A manifest's cuts if it is there and has this digest; else None, and a note."""
    try:
        if not path.exists():
            problem = (
                "is not there, so neither are its sounds and numbers; run the command where its paths lead somewhere"
            )
        elif sha256 is not None and digest_of(path) != sha256:
            problem = "has changed since it was used, so its sounds and numbers are left out"
        else:
            return list(open_cuts(path, need_text=False))
    except UserError as error:
        problem = error.lines[0]
    if (note := f"{path}: {problem}") not in notes:
        notes.append(note)
    return None


def _left_out(run: Path, notes: list[str]) -> dict[str, str]:
    """The cuts that were left out of a run's training, and why; a file that is damaged is noted."""
    try:
        return dict(read_sealed(run / LEFT_OUT)) if (run / LEFT_OUT).is_file() else {}
    except UserError as error:
        notes += error.lines
        return {}
