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
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.train_batches import TrainBatches
from asrkit.decoding.search import Method
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.methods.distillation.cache import PosteriorCache, needed_settings
from asrkit.methods.distillation.config import DistillationConfig
from asrkit.methods.distillation.loss import Distillation, build_loss
from asrkit.methods.distillation.pseudo_labels import pseudo_label
from asrkit.methods.distillation.teachers import (
    ANY,
    Teachers,
    check_texts,
    each,
    match_tokenizer,
    open_teachers,
    shared_tokenizer,
)
from asrkit.run_dir import WEIGHTS
from asrkit.training.asr_loss import check_contexts
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
    """Search the teacher transcribes with: greedy, beam or ctc."""


def defaults(parent: Path | None, cached: bool) -> DistillConfig:
    """The defaults of a run with a new student, or with that of the run directory ``parent``.

    Posteriors that are ``cached`` are those of unperturbed audio, and of the lattice only, so the timing is not perturbed and CTC
    posteriors are not compared.
    """
    usual = usual_settings(parent)
    augment = replace(usual.data.augment, speed=0.0) if cached else usual.data.augment
    return DistillConfig(
        loss=usual.loss,
        training=usual.training,
        data=replace(usual.data, augment=augment),
        teacher=DistillationConfig(ctc_scale=0.0) if cached else DistillationConfig(),
    )


def distill(
    teachers: Mapping[str, Sequence[Path]],
    manifest: Path,
    out: Path,
    settings: DistillConfig,
    *,
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
        parent: run directory of the student; None makes a new one.
        tokenizer: sentencepiece model of a new student.
        cache: directory of the teachers' posteriors; those that are missing are computed and added.

    Raises:
        UserError: unusable teachers, student, manifests, languages, tokenizers or output directory, found before training.
        Interrupted: stopped by a signal, state saved.
    """
    check_contexts(settings.contexts, settings.loss)
    _check(teachers, settings, parent, tokenizer, cache)
    opened = open_teachers(teachers)
    distillation = Distillation(opened, settings.teacher)
    distillation.check(settings)
    origin = None if parent is None else open_parent(parent, settings)
    entry = {
        "teachers": {
            language: {str(path): sha256_of(path / WEIGHTS) for path in paths} for language, paths in teachers.items()
        },
        **({} if cache is None else {"cache": str(cache)}),
        **config_entry(settings, origin),
    }
    files = {**input_files(settings, manifest=manifest, dev=dev, tokenizer=tokenizer), **distillation.weights}
    with open_training("distill", out, entry, files, parent=parent, device=device, command=command) as run:
        if run.finished:
            return out
        languages = settings.model.languages if origin is None else origin.languages(settings)
        if settings.labels == "teacher":
            manifest, settings = _labeled(manifest, settings, opened, run, languages)
        datasets = read_datasets(
            manifest, dev, settings.data, settings.bad_cuts, run, languages, distillation.check_cuts
        )
        check_languages_present(settings, origin, datasets.training)
        given = tokenizer if origin is None else origin.tokenizer(tokenizer)
        if given is None and settings.tokenizer is None:
            given = shared_tokenizer(opened)
        pieces = make_tokenizer(run, given, datasets.training, settings.tokenizer or TokenizerConfig())
        _check_tokenizers(opened, pieces, settings, datasets)
        _report(run, opened, datasets)
        build = partial(build_task, settings, teachers, parent, cache, out)
        prepare = None if cache is None else partial(fill_cache, settings, teachers, cache)
        run_recipe(run, build, manifest, settings, datasets.dev, prepare)
    return out


def build_task(
    settings: DistillConfig,
    teachers: Mapping[str, Sequence[Path]],
    parent: Path | None,
    cache: Path | None,
    out: Path,
    batches: TrainBatches,
) -> TrainTask:
    """The student of the run ``out`` and its loss; see ``TaskRecipe``."""
    matched = match_tokenizer(open_teachers(teachers), batches.tokenizer)
    posteriors = None if cache is None else PosteriorCache(cache, matched, batches.tokenizer)
    if posteriors is not None:
        posteriors.open(batches.table)
    distillation = Distillation(matched, settings.teacher, posteriors)
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


def fill_cache(
    settings: DistillConfig, teachers: Mapping[str, Sequence[Path]], cache: Path, run: RunWriter, batches: TrainBatches
) -> None:
    """Run the teachers on the cuts that are not in the cache yet; every process does its share."""
    matched = match_tokenizer(open_teachers(teachers), batches.tokenizer)
    posteriors = PosteriorCache(cache, matched, batches.tokenizer)
    for done in posteriors.fill(matched, batches.table, batches.tokenizer, run.world, settings.data.max_duration):
        run.note(f"{cache}: stored the posteriors of {done} utterances")


def _labeled(
    manifest: Path, settings: DistillConfig, teachers: Teachers, run: RunWriter, languages: Sequence[str]
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
    )
    return first, replace(settings, data=replace(data, also=tuple(others)))


def _check(
    teachers: Mapping[str, Sequence[Path]],
    settings: DistillConfig,
    parent: Path | None,
    tokenizer: Path | None,
    cache: Path | None,
) -> None:
    """Refuse contradictory options and settings, before anything is read."""
    findings = check_start(settings, parent, tokenizer)
    if settings.loss.transducer_scale == 0:
        findings.append("loss.transducer_scale is 0, but distillation compares transducers; set it above 0")
    if settings.contexts.sampling == "joint":
        findings.append("distillation uses one context per batch; set contexts.sampling=random")
    if settings.data.augment.join > 0 and set(teachers) != {ANY}:
        findings.append(
            "data.augment.join joins utterances of any language, but each teacher knows only its own; set data.augment.join=0"
        )
    if cache is not None:
        findings += [f"--cache {cache}: {line}" for line in needed_settings(settings.data, settings.teacher)]
    if findings:
        raise UserError.of(findings)


def _check_tokenizers(teachers: Teachers, tokenizer: Tokenizer, settings: DistillConfig, datasets: Datasets) -> None:
    """Refuse settings and texts that teachers with another tokenizer than the student's cannot handle."""
    others = [str(t.run.path) for t in each(teachers) if sha256_of(t.run.tokenizer_path) != sha256_of(tokenizer.path)]
    if not others:
        return
    subject, findings = f"teachers with another tokenizer than the student's ({', '.join(others)})", []
    if settings.teacher.classes == "all":
        findings.append(f"{subject}: their tokens mean something else; set teacher.classes=three")
    if settings.teacher.ctc_scale > 0 and settings.loss.ctc_scale > 0:
        findings.append(f"{subject}: their CTC posteriors mean something else; set teacher.ctc_scale=0")
    if settings.data.bpe_dropout > 0:
        findings.append(f"{subject}: all must segment a text into the same pieces; set data.bpe_dropout=0")
    if findings := findings or check_texts(teachers, tokenizer, datasets.training):
        raise UserError.of(findings)


def _report(run: RunWriter, teachers: Teachers, datasets: Datasets) -> None:
    counts = Counter(language if language in teachers else ANY for language in map(language_of, datasets.training))
    for language, group in teachers.items():
        names = ", ".join(str(teacher.run.path) for teacher in group)
        run.note(f"{run.path}: {names} teaches {counts[language]} utterances" + f" of {language}" * (language != ANY))
