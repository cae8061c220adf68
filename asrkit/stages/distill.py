"""distill: one or several trained models teach a student, new or trained, each utterance by the teacher of its language.

The loss is the recognizer's plus the divergence of the transducers' posteriors at every lattice node (arXiv 2011.06110). A weight
for each utterance depends on the student's and the teacher's loss (self-adaptive distillation, US20220309340A1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from asrkit.config import config
from asrkit.data.manifests import language_of
from asrkit.data.train_batches import TrainBatches
from asrkit.decoding.search import Method
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.methods.distillation.cache import needed_settings
from asrkit.methods.distillation.caches import fill_caches, open_caches
from asrkit.methods.distillation.config import DistillationConfig, WeightConfig, check_tokenizers
from asrkit.methods.distillation.features import WhisperTeacher, needed_feature_settings
from asrkit.methods.distillation.loss import Distillation, build_loss
from asrkit.methods.distillation.pseudo_labels import pseudo_label
from asrkit.methods.distillation.teachers import (
    ANY,
    Teachers,
    match_tokenizer,
    open_teachers,
    shared_tokenizer,
)
from asrkit.run_dir import WEIGHTS
from asrkit.training.asr_loss import check_losses
from asrkit.training.datasets import Datasets, read_datasets
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import input_files, open_training, run_recipe
from asrkit.training.start import (
    StartConfig,
    TokenizerConfig,
    check_languages_present,
    check_start,
    config_entry,
    dropped_attention,
    first_model,
    make_tokenizer,
    new_parts_first,
    open_parent,
    usual_settings,
)
from asrkit.training.step import TrainTask


@config
class DistillConfig(StartConfig):
    """Settings of distill (US20220309340A1, arXiv 2011.06110). config.yaml of the run holds them all."""

    teacher: DistillationConfig = field(default_factory=DistillationConfig)
    """How the student learns from its teachers."""
    labels: Literal["given", "teacher"] = "given"
    """Cuts without text: given counts them as bad cuts; teacher has the first teacher of their language transcribe them
    once, before training."""
    labels_method: Method = "beam"
    """Search the teacher transcribes with: greedy, beam, ctc or ctc-beam; Whisper is always greedy."""


def defaults(parent: Path | None, cached: bool, whisper: bool = False, alone: bool = False) -> DistillConfig:
    """The defaults of a run with a new student, or with that of the run directory ``parent``.

    Posteriors that are ``cached`` are those of unperturbed audio, and of the lattice only, so the timing is not perturbed and CTC
    posteriors are not compared; so it is with the frames of Whisper. Where that teaches ``alone``, weights are constant.
    """
    usual = usual_settings(parent)
    augment = replace(usual.data.augment, speed=0.0) if cached or whisper else usual.data.augment
    teacher = DistillationConfig(ctc_scale=0.0) if cached else DistillationConfig()
    return DistillConfig(
        loss=usual.loss,
        training=usual.training,
        data=replace(usual.data, augment=augment),
        teacher=replace(teacher, weight=WeightConfig(kind="constant")) if alone else teacher,
    )


def distill(
    teachers: Mapping[str, Sequence[Path]],
    manifest: Path,
    out: Path,
    settings: DistillConfig,
    *,
    whisper: str | None = None,
    parent: Path | None = None,
    tokenizer: Path | None = None,
    cache: Path | None = None,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Train a student under teachers, or resume an interrupted run; returns ``out``.

    Args:
        teachers: run directories by language; ``*`` stands for all languages that are not named. If a language has several
            teachers, the student learns the mean of their posteriors.
        whisper: ``whisper:NAME_OR_PATH``, whose encoder's frames the student's resemble, and which transcribes with ``labels=teacher``.
        parent: run directory of the student; None makes a new one.
        tokenizer: sentencepiece model of a new student.
        cache: directory of the teachers' posteriors, and of Whisper's frames, which are in ``out`` otherwise; those that are missing
            are computed and added.

    Raises:
        UserError: unusable teachers, student, manifests, languages, tokenizers or output directory, found before training.
        Interrupted: stopped by a signal, state saved.
    """
    check_losses(settings.contexts, settings.loss, others=True)
    _check(teachers, settings, parent, tokenizer, cache, whisper)
    teaching = None if whisper is None else WhisperTeacher.find(whisper)
    opened = open_teachers(teachers)
    distillation = Distillation(opened, settings.teacher)
    distillation.check(settings)
    origin = None if parent is None else open_parent(parent, settings)
    entry = {
        "teachers": {
            language: {str(path): sha256_of(path / WEIGHTS) for path in paths} for language, paths in teachers.items()
        },
        **({} if teaching is None else {"whisper": {teaching.spec: teaching.sha256}}),
        **({} if cache is None else {"cache": str(cache)}),
        **config_entry(settings, origin),
    }
    files = {**input_files(settings, manifest=manifest, dev=dev, tokenizer=tokenizer), **distillation.weights}
    with open_training("distill", out, entry, files, parent=parent, device=device, command=command) as run:
        if run.finished:
            return out
        languages = settings.model.languages if origin is None else origin.languages(settings)
        if settings.labels == "teacher":
            manifest, settings = _labeled(manifest, settings, opened, run, languages, teaching)
        check_cuts = distillation.check_cuts if opened or teaching is None else teaching.check_languages
        datasets = read_datasets(manifest, dev, settings.data, settings.bad_cuts, run, languages, check_cuts)
        check_languages_present(settings, origin, datasets.training)
        given = tokenizer if origin is None else origin.tokenizer(tokenizer)
        if given is None and settings.tokenizer is None and opened:
            given = shared_tokenizer(opened)
        pieces = make_tokenizer(run, given, datasets.training, settings.tokenizer or TokenizerConfig())
        check_tokenizers(opened, pieces, settings.teacher, settings.loss, settings.data, datasets.training)
        _report(run, opened, datasets)
        build = partial(build_task, settings, teachers, parent, cache, out, whisper)
        prepare = partial(fill_caches, settings.data.max_duration, teachers, cache, out, whisper)
        stored = cache is not None or teaching is not None
        run_recipe(run, build, manifest, settings, datasets.dev, prepare, every_cut=stored)
    return out


def build_task(
    settings: DistillConfig,
    teachers: Mapping[str, Sequence[Path]],
    parent: Path | None,
    cache: Path | None,
    out: Path,
    whisper: str | None,
    batches: TrainBatches,
) -> TrainTask:
    """The student of the run ``out`` and its loss; see ``TaskRecipe``."""
    matched = match_tokenizer(open_teachers(teachers), batches.tokenizer)
    posteriors, features = open_caches(matched, cache, out, whisper, batches)
    distillation = Distillation(matched, settings.teacher, posteriors, features)
    model, variant = first_model(settings, parent, out, batches)
    distillation.attach(model)
    batches.clean = distillation.needs_clean
    loss = build_loss(
        model.spec,
        settings.loss,
        settings.contexts,
        distillation,
        steps=settings.training.steps,
        variant=variant,
        attention_dropout=dropped_attention(settings, parent),
    )
    return TrainTask(model, new_parts_first(settings, parent, loss), batches, variant=variant)


def _labeled(
    manifest: Path,
    settings: DistillConfig,
    teachers: Teachers,
    run: RunWriter,
    languages: Sequence[str],
    whisper: WhisperTeacher | None,
) -> tuple[Path, DistillConfig]:
    """The manifest, and the settings with those of ``data.also``, after teachers have transcribed the cuts without text."""
    data = settings.data
    first, *others = pseudo_label(
        [manifest, *data.also],
        teachers,
        settings.labels_method,
        data.max_duration,
        settings.bad_cuts,
        run,
        languages,
        whisper,
    )
    return first, replace(settings, data=replace(data, also=tuple(others)))


def _check(
    teachers: Mapping[str, Sequence[Path]],
    settings: DistillConfig,
    parent: Path | None,
    tokenizer: Path | None,
    cache: Path | None,
    whisper: str | None,
) -> None:
    """Refuse contradictory options and settings, before anything is read."""
    findings = check_start(settings, parent, tokenizer)
    if settings.loss.transducer_scale == 0 and teachers:
        findings.append("loss.transducer_scale is 0, but distillation compares transducers; set it above 0")
    if settings.contexts.sampling == "joint":
        findings.append("distillation uses one context per batch; set contexts.sampling=random")
    if settings.data.augment.join > 0 and set(teachers) not in ({ANY}, set()):
        findings.append(
            "data.augment.join joins utterances of any language, but each teacher knows only its own; set data.augment.join=0"
        )
    if whisper is not None:
        findings += [f"--teacher {whisper}: {line}" for line in needed_feature_settings(settings.data)]
    if cache is not None and teachers:
        findings += [f"--cache {cache}: {line}" for line in needed_settings(settings.data, settings.teacher)]
    if findings:
        raise UserError.of(findings)


def _report(run: RunWriter, teachers: Teachers, datasets: Datasets) -> None:
    counts = Counter(language if language in teachers else ANY for language in map(language_of, datasets.training))
    for language, group in teachers.items():
        names = ", ".join(str(teacher.run.path) for teacher in group)
        run.note(f"{run.path}: {names} teaches {counts[language]} utterances" + f" of {language}" * (language != ANY))
