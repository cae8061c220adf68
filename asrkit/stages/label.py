"""label: texts for recordings that have none, by any recognizer, filtered, in a manifest to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from lhotse.cut import Cut

from asrkit.data.batch import named
from asrkit.data.checks import find_bad_cuts
from asrkit.data.manifests import digest_of, language_of, open_cuts, text_of, write_cuts
from asrkit.data.parallel import ALONE, Workers, in_processes
from asrkit.decoding.external.interface import TextRecognizer
from asrkit.decoding.external.opening import open_text_recognizer
from asrkit.disk import check_not_read
from asrkit.errors import UserError, clip
from asrkit.extras import require
from asrkit.methods.labeling import (
    NO_FILTERS,
    Filters,
    Label,
    Progress,
    Threshold,
    dropped_row,
    errors_of,
    make_label,
    open_progress,
    thresholds,
    write_dropped,
)
from asrkit.methods.recognizing import PieceRecognizer, Recognized, missing_parts
from asrkit.reporting.progress import progress


@dataclass
class Labeled:
    """What came of it: cuts, those labeled and those that had a text; dropped utterances by reason; seconds of both.

    thresholds: where the cuts had texts, how good the labels are; else [].
    """

    labeled: int = 0
    given: int = 0
    labeled_seconds: float = 0.0
    dropped_seconds: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)
    thresholds: list[Threshold] = field(default_factory=list)


def label(
    specs: Sequence[str],
    manifest: Path,
    out: Path,
    *,
    language: str | None = None,
    filters: Filters | None = None,
    max_seconds: float = 20.0,
    replace_texts: bool = False,
    max_duration: float = 200.0,
    device: str = "auto",
    threads: int | None = None,
    workers: Workers = ALONE,
) -> Labeled:
    """Write ``out``: the cuts of ``manifest`` with the texts that a recognizer gives them, and those that have a text as they are.

    A recording longer than ``max_seconds`` becomes several cuts, split at pauses; stretches without speech are left out. Beside ``out``,
    ``*.dropped.tsv`` lists what was left out, and ``*.texts.jsonl`` keeps all texts: a killed run goes on there, and a run with other
    filters recognizes nothing again.

    Args:
        specs: one recognizer, or two, of which the second only says whether it agrees.
        language: of cuts that name none; None lets the recognizer detect it.
        replace_texts: label cuts with a text too, and report how far the labels are from their texts.
        max_duration: seconds of padded audio recognized at once.
        workers: who recognizes; several processes have one thread each, and recognizers of their own.

    Raises:
        UserError: everything wrong with recognizers, manifest and languages, before any work.
    """
    if not out.name.endswith(".jsonl.gz"):
        raise UserError(f"--out {out}: the manifest's name must end in .jsonl.gz")
    check_not_read(out, [manifest])
    if len(specs) > 2:
        raise UserError(f"--with: {len(specs)} recognizers; give one, or two whose texts are compared")
    threads = _threads(threads, workers)
    require("whisper", for_="label (for voice activity detection)")
    cuts = list(open_cuts(manifest, need_text=False))
    unlabeled = [cut for cut in cuts if replace_texts or not text_of(cut).strip()]
    stem = out.name.removesuffix(".jsonl.gz")
    with ExitStack() as stack:
        recognizers = [
            stack.enter_context(open_text_recognizer(spec, device=device, threads=threads)) for spec in specs
        ]
        _check(manifest, unlabeled, recognizers, language, workers)
        inputs = {
            "manifest": digest_of(manifest),
            "recognizers": [[recognizer.sha256, recognizer.search, recognizer.beam] for recognizer in recognizers],
            "language": language,
            "max_seconds": max_seconds,
            "replace_texts": replace_texts,
        }
        done = stack.enter_context(open_progress(out.with_name(f"{stem}.texts.jsonl"), inputs))
        longest = min([max_seconds, *(each.max_seconds for each in recognizers if each.max_seconds is not None)])
        recognize = PieceRecognizer(tuple(specs), device, threads, language or "", longest, max_duration)
        if not workers.several:
            recognize.use(recognizers)
        _recognize(recognize, unlabeled, max_duration, done, workers)
    result = Labeled()
    rows: list[str] = []
    labeled_ids = {cut.id for cut in unlabeled}
    written: list[Cut] = []
    for cut in cuts:
        if cut.id in labeled_ids:
            written += _labeled(cut, done, specs, filters or Filters(), result, rows)
        else:
            written.append(cut)
            result.given += 1
    write_dropped(listed := out.with_name(f"{stem}.dropped.tsv"), rows)
    if not written:
        reasons = ", ".join(f"{number} {reason}" for reason, number in result.dropped.most_common())
        raise UserError(f"{manifest}: every utterance was left out ({reasons}); see {listed}, then loosen the filters")
    if twice := [cut_id for cut_id, number in Counter(cut.id for cut in written).items() if number > 1]:
        raise UserError(
            f"{manifest}: a part of a recording would get the id of the cut {clip(twice[0])}; rename that cut"
        )
    result.thresholds = _thresholds(unlabeled, done) if replace_texts else []
    write_cuts(out, written)
    return result


def _threads(threads: int | None, workers: Workers) -> int | None:
    """Those of a recognizer; None for its own choice."""
    if threads is not None and workers.several:
        raise UserError(f"--threads: each process of {workers} computes with one thread; leave --threads out")
    return 1 if workers.several else threads


def _check(
    manifest: Path,
    cuts: Sequence[Cut],
    recognizers: Sequence[TextRecognizer],
    language: str | None,
    workers: Workers,
) -> None:
    """Refuse cuts that cannot be read and languages that are not known, all at once."""
    if not cuts:
        raise UserError(f"{manifest}: every cut has a text already; --replace-texts labels them again")
    findings = [
        f"{manifest}: cut {clip(finding.cut_id)}: {finding.kind}: {finding.detail}"
        for finding in find_bad_cuts(cuts, read_audio=True, workers=workers, sound=True)
        if finding.kind not in ("text", "silent")
    ]
    findings += [
        f"{workers}: several processes recognize on the CPU only; add --device cpu, or leave {workers.options} out"
        for recognizer in recognizers
        if workers.several and recognizer.device != "cpu"
    ]
    counts = Counter(language_of(cut) or language or "" for cut in cuts)
    for recognizer in recognizers:
        for name, number in counts.items():
            if (problem := recognizer.check_language(name)) is not None:
                findings.append(f"{problem} ({number} cuts)")
    if findings:
        raise UserError.of(findings)


def _recognize(
    recognize: PieceRecognizer, cuts: Sequence[Cut], max_duration: float, done: Progress, workers: Workers
) -> None:
    """Recognize what is not done yet. Batches are on disk one by one, and those of another process once it has done its part."""
    parts = missing_parts(cuts, done, max_duration)
    seconds = sum(one.cut.duration for part in parts for one in part)
    with progress("labeling", seconds, "s of audio") as advance:
        results: Iterable[Iterable[Recognized]] = map(recognize.batches, parts)
        if workers.several:
            results = in_processes(recognize, parts, workers, lambda part: named([one.cut for one in part]))
        for part, batches in zip(parts, results, strict=True):
            for plans, texts in batches:
                for cut_id, planned in plans.items():
                    done.plan(cut_id, planned)
                done.add(texts)
            advance(sum(one.cut.duration for one in part))


def _labeled(
    cut: Cut, done: Progress, specs: Sequence[str], filters: Filters, result: Labeled, rows: list[str]
) -> Iterator[Cut]:
    """The cut's utterances that pass the filters; a row for each of the others."""
    planned = done.planned[cut.id]
    for number, (begin, end) in enumerate(planned):
        texts = done.texts[cut.id, begin]
        made = make_label(texts, end - begin, filters)
        if made.reason:
            result.dropped[made.reason] += 1
            result.dropped_seconds += end - begin
            rows.append(dropped_row(cut.id, begin, end, made.reason, made.detail, texts[0].text))
            continue
        result.labeled += 1
        result.labeled_seconds += end - begin
        yield _with_label(cut, made, specs, None if _is_whole(cut, planned) else (number, begin, end))
    if not planned:
        result.dropped["no speech"] += 1
        result.dropped_seconds += cut.duration
        rows.append(dropped_row(cut.id, 0.0, cut.duration, "no speech", "by the voice activity detector", ""))


def _is_whole(cut: Cut, planned: Sequence[tuple[float, float]]) -> bool:
    return len(planned) == 1 and planned[0][0] == 0.0 and abs(planned[0][1] - cut.duration) < 0.01


def _with_label(cut: Cut, made: Label, specs: Sequence[str], part: tuple[int, float, float] | None) -> Cut:
    """The cut, or a stretch of it, with its label as the only supervision."""
    first, *_ = cut.supervisions
    custom = {**(first.custom or {}), "labeled_by": specs[0]}
    custom |= {} if made.confidence is None else {"label_confidence": round(made.confidence, 4)}
    custom |= {} if made.disagreement is None else {"label_disagreement": round(made.disagreement, 4)}
    if part is None:
        new, name = cut.drop_supervisions(), cut.id
    else:
        number, begin, end = part
        name = f"{cut.id}-{number:04d}"
        new = cut.drop_supervisions().truncate(offset=begin, duration=end - begin).with_id(name)
    new.supervisions = [
        replace(
            first,
            id=name,
            start=0.0,
            duration=new.duration,
            text=made.words,
            language=first.language or made.language or None,
            alignment=None,
            custom=custom,
        )
    ]
    return new


def _thresholds(cuts: Sequence[Cut], done: Progress) -> list[Threshold]:
    """How good the labels of whole cuts are against the texts that they had, without any other filter."""
    pairs = []
    for cut in cuts:
        if text_of(cut).strip() and _is_whole(cut, planned := done.planned[cut.id]):
            made = make_label(done.texts[cut.id, planned[0][0]], cut.duration, NO_FILTERS)
            confidence = made.confidence if made.confidence is not None and not made.reason else 0.0
            pairs.append((confidence, errors_of(made, text_of(cut), language_of(cut) or made.language)))
    return thresholds(pairs)
