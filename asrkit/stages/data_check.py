"""data check: what manifests hold, which cuts cannot be used, what training and held-out data share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from asrkit.data.checks import Finding, Overlap, Survey, find_bad_cuts, find_overlap, survey
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import open_cuts
from asrkit.data.parallel import ALONE, Workers
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.disk import atomic_write
from asrkit.errors import UserError, printable

EXAMPLES, SHOWN = 5, 50  # names and findings on the screen; the JSON has all


@dataclass
class Report:
    """Surveys and findings by manifest, overlaps by (training manifest, held-out manifest)."""

    surveys: dict[str, Survey] = field(default_factory=dict)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    overlaps: dict[tuple[str, str], Overlap] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        shared = any(overlap.same_id or overlap.same_audio for overlap in self.overlaps.values())
        return shared or any(self.findings.values())

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        content = {
            "manifests": {name: asdict(held) for name, held in self.surveys.items()},
            "findings": [
                {"manifest": name, **asdict(finding)}
                for name, findings in self.findings.items()
                for finding in findings
            ],
            "overlaps": [
                {"train": train, "held_out": held_out, **asdict(overlap)}
                for (train, held_out), overlap in self.overlaps.items()
            ],
        }
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_manifests(
    train: Sequence[Path],
    held_out: Sequence[Path],
    tokenizer_path: Path | None = None,
    *,
    read_audio: bool = True,
    workers: Workers = ALONE,
) -> Report:
    """Check every manifest, and each training one against each held-out one.

    Raises:
        UserError: a manifest or the tokenizer cannot be opened; all of them at once.
    """
    report = Report()
    opened: dict[Path, CutTable] = {}
    lines: list[str] = []
    tokenizer = None
    try:
        tokenizer = Tokenizer(tokenizer_path) if tokenizer_path else None
    except UserError as error:
        lines += error.lines
    for path in dict.fromkeys([*train, *held_out]):
        try:
            opened[path] = open_cuts(path)
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError.of(lines)
    for path, cuts in opened.items():
        report.surveys[str(path)] = survey(cuts, tokenizer)
        report.findings[str(path)] = find_bad_cuts(cuts, tokenizer, read_audio=read_audio, workers=workers)
    for one in train:
        for other in held_out:
            report.overlaps[str(one), str(other)] = find_overlap(opened[one], opened[other])
    return report


def describe(report: Report) -> Iterator[str]:
    """The report as lines to read, the worst last; texts of the manifests cannot control the terminal."""
    return map(printable, _lines(report))


def _lines(report: Report) -> Iterator[str]:
    for name, held in report.surveys.items():
        yield name
        yield (
            f"  {held.cuts} cuts, {_duration(held.seconds)}; "
            f"shortest {held.shortest:.2f} s, median {held.median:.2f} s, longest {held.longest:.2f} s"
        )
        widest = max(held.histogram.values())
        for label, count in held.histogram.items():
            yield f"    {label:>10} {count:7d} {'#' * round(40 * count / widest)}".rstrip()
        yield f"  {held.words} words, {held.repeated_texts} texts repeated; characters {held.characters.strip()}"
        yield f"  languages {_counts(held.languages)}; {held.speakers or 'no'} speaker{'s' * (held.speakers != 1)} named"
        yield f"  sampling rates {_counts(held.sampling_rates)}; channels {_counts(held.channels)}"
        if held.sparse:
            yield (
                f"  supervisions cover less than half of the audio, all of which is trained on, in {len(held.sparse)} of "
                f"{held.cuts} cuts{_examples(held.sparse)}"
            )
        if held.tightest is not None:
            yield f"  the tightest cut has {held.tightest:.2f} times the encoder frames its tokens need"
    for (train, held_out), overlap in report.overlaps.items():
        yield f"{held_out} and {train}"
        cuts, speakers = report.surveys[held_out].cuts, report.surveys[held_out].speakers
        for what, ids in (
            ("ids", overlap.same_id),
            ("recordings", overlap.same_audio),
            ("sentences", overlap.same_text),
        ):
            yield f"  {what} in both: {len(ids)} of {cuts} cuts{_examples(ids)}"
        yield f"  speakers in both: {len(overlap.speakers)} of {speakers}{_examples(overlap.speakers)}"
    for name, findings in report.findings.items():
        for finding in findings[:SHOWN]:
            yield f"{name}: cut {finding.cut_id}: {finding.kind}: {finding.detail}"
        if len(findings) > SHOWN:
            yield f"{name}: {len(findings) - SHOWN} more findings; --json FILE lists all"
    bad = sum(len({finding.cut_id for finding in findings}) for findings in report.findings.values())
    yield f"{bad} unusable cuts" if bad else "every cut can be read"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 36000 else f"{seconds / 60:.1f} minutes"


def _counts(counts: Mapping[str, int] | Mapping[int, int]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in counts.items())


def _examples(names: list[str]) -> str:
    return f": {', '.join(names[:EXAMPLES])}{', ...' if len(names) > EXAMPLES else ''}" if names else ""
