"""Transcripts for cuts without text, made by a teacher once, before training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lhotse.cut import Cut

from asrkit.data.batch import evaluation_batches
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import language_of, open_cuts, text_of, write_cuts
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.external.utterances import batched, read_whole, transcribe_pieces
from asrkit.decoding.search import Method, decode
from asrkit.errors import UserError
from asrkit.methods.distillation.features import WhisperTeacher
from asrkit.methods.distillation.teachers import Teachers, check_languages, route
from asrkit.methods.labeling import Filters, make_label
from asrkit.nn.context import parse_context
from asrkit.training.datasets import usable_cuts
from asrkit.training.distributed import broadcast_object, gather_lists
from asrkit.training.run_writer import LABELED, RunWriter


def pseudo_label(
    manifests: Sequence[Path],
    teachers: Teachers,
    method: Method,
    max_duration: float,
    policy: str,
    run: RunWriter,
    languages: Sequence[str],
    whisper: WhisperTeacher | None = None,
) -> list[Path]:
    """The manifests, with a transcript by Whisper, or by the (first) teacher of its language, for each cut that has no text.

    They are written to the run directory, and read from there when the run is resumed. A cut with an empty transcript is left out.

    Args:
        languages: those the student takes as an input, if any.
        whisper: transcribes in place of the teachers; what it is not sure of is left out, see ``Filters``.

    Raises:
        UserError: cuts that cannot be used, or have no teacher.
    """
    written = [run.path / LABELED.replace("*", str(number)) for number in range(len(manifests))]
    if not all(path.is_file() for path in written):
        opened = [usable_cuts(open_cuts(path, False), None, policy, run, False, False, languages) for path in manifests]
        silent = [cut for cuts in opened for cut in cuts if not text_of(cut).strip()]
        findings = check_languages(teachers, silent) if whisper is None else whisper.check_languages(silent)
        twice = [cut_id for cut_id, count in Counter(cut.id for cut in silent).items() if count > 1]
        if twice:
            findings.append(f"{len(twice)} cut ids occur twice, such as {twice[0]}; give each cut its own id")
        if findings:
            raise UserError.of(findings)
        usable = usable_cuts(CutTable(silent), None, policy, run, True, False) if silent else []
        if whisper is None:
            texts = _transcribe(list(usable), teachers, method, max_duration, run)
        else:
            texts = _transcribe_by_whisper(list(usable), whisper, max_duration, run)
        run.note(f"{run.path}: the teachers transcribed {len(texts)} utterances that have no text")
        for path, cuts in zip(written, opened, strict=True):
            if run.world.is_main:
                write_cuts(path, _with_texts(cuts, texts, run))
        broadcast_object(run.world, None)
    return written


def _transcribe(
    cuts: list[Cut], teachers: Teachers, method: Method, max_duration: float, run: RunWriter
) -> dict[str, str]:
    """Texts by cut id; every process transcribes its share."""
    world, transcripts = run.world, []
    for batch in evaluation_batches(
        sorted(cuts, key=lambda cut: -cut.duration)[world.rank :: world.size], max_duration
    ):
        for rows, (teacher, *_) in route(teachers, batch.languages):
            spec = teacher.model.spec
            context = parse_context(spec.variants[spec.variant].contexts[0])
            model = TorchAcousticModel(teacher.model.to(world.device), None, context)
            tokenizer = Tokenizer(teacher.run.tokenizer_path)
            batch_languages = [batch.languages[row] for row in rows]
            hypotheses = decode(
                model,
                batch.features[rows],
                batch.feature_lens[rows],
                method,
                languages=batch_languages,
                special_ids=tokenizer.special_ids,
            )
            for row, hypothesis in zip(rows, hypotheses, strict=True):
                transcripts.append(json.dumps([batch.cut_ids[row], tokenizer.decode(hypothesis.tokens)]))
    for teacher in {id(teacher): teacher for several in teachers.values() for teacher in several}.values():
        teacher.model.cpu()  # training opens its own
    return dict(json.loads(line) for line in gather_lists(world, transcripts))


def _transcribe_by_whisper(
    cuts: list[Cut], whisper: WhisperTeacher, max_duration: float, run: RunWriter
) -> dict[str, str]:
    """Texts by cut id, empty where Whisper is not sure; every process transcribes its share."""
    world, transcripts = run.world, []
    recognizer = whisper.load(world.device)
    share = sorted(cuts, key=lambda cut: -cut.duration)[world.rank :: world.size]
    parts: dict[str, list[str | None]] = {cut.id: [] for cut in share}
    for pieces in batched(read_whole(share, recognizer.max_seconds), max_duration):
        results = transcribe_pieces(recognizer, pieces, [language_of(piece.cut) for piece in pieces])
        for piece, result in zip(pieces, results, strict=True):
            made = make_label([result], piece.end - piece.begin, Filters())
            parts[piece.cut.id].append(None if made.reason else made.words)
    for cut_id, words in parts.items():
        certain = [part for part in words if part is not None]
        transcripts.append(json.dumps([cut_id, " ".join(certain) if len(certain) == len(words) else ""]))
    return dict(json.loads(line) for line in gather_lists(world, transcripts))


def _with_texts(cuts: CutTable, texts: dict[str, str], run: RunWriter) -> Iterator[Cut]:
    for cut in cuts:
        if text_of(cut).strip():
            yield cut
        elif texts.get(cut.id, "").strip():
            first, *_ = cut.supervisions
            custom = {**(first.custom or {}), "labeled_by": "teacher"}
            cut.supervisions = [replace(first, text=texts[cut.id], custom=custom)]
            yield cut
        elif cut.id not in run.left_out:
            run.leave_out(cut.id, "labels: the teacher's transcript is empty or uncertain")
