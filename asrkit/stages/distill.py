"""distill: one or several trained models teach a student, new or trained, each utterance by the teacher of its language.

The recognizer's loss and the divergence of the transducers' posteriors at every lattice node (arXiv 2011.06110), weighted for
each utterance by how well student and teacher know it (self-adaptive distillation, US20220309340A1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Literal

from asrkit.config import config
from asrkit.data.augment import AugmentConfig
from asrkit.data.manifests import language_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.train_batches import DataConfig, TrainBatches
from asrkit.decoding.search import Method
from asrkit.errors import UserError
from asrkit.methods.distillation.cache import PosteriorCache
from asrkit.methods.distillation.config import DistillationConfig, check_distillation
from asrkit.methods.distillation.loss import add_encoder_maps, build_loss
from asrkit.methods.distillation.pseudo_labels import label
from asrkit.methods.distillation.teachers import (
    ANY,
    Teachers,
    each,
    match_tokenizer,
    open_teachers,
    shared_tokenizer,
)
from asrkit.methods.pruning import keep_pruned
from asrkit.run_dir import WEIGHTS, sha256_of
from asrkit.training.asr_loss import check_contexts
from asrkit.training.datasets import Datasets, read_datasets
from asrkit.training.distributed import join_world
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import FineTuneConfig, Prepared, inputs_of, train_stage
from asrkit.training.start import (
    StartConfig,
    TokenizerConfig,
    check_languages_present,
    check_start,
    first_model,
    open_parent,
    run_tokenizer,
    told,
)


@config
class DistillConfig(StartConfig):
    """Settings of distill (US20220309340A1, arXiv 2011.06110). config.yaml of the run holds them all."""

    teacher: DistillationConfig = field(default_factory=DistillationConfig)
    """How the teachers teach."""
    labels: Literal["given", "teacher"] = "given"
    """Cuts without text: given counts them as bad cuts; teacher has the first teacher of their language transcribe them
    once, before training."""
    labels_method: Method = "beam"
    """Search the teacher transcribes with: greedy, beam or ctc."""


def defaults(trained_student: bool, stored: bool) -> DistillConfig:
    """The defaults of a run: those of later stages for a student that has been trained before; for posteriors on disk,
    which are of unchanged audio and of the lattice alone, no change of timing and no CTC posteriors."""
    plain = FineTuneConfig() if trained_student else DistillConfig()
    augment = AugmentConfig(speed=0.0) if stored else AugmentConfig()
    return DistillConfig(
        loss=plain.loss,
        training=plain.training,
        data=DataConfig(augment=augment),
        teacher=DistillationConfig(ctc_scale=0.0) if stored else DistillationConfig(),
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
    """Train a student under teachers, or go on with a run that was interrupted; returns ``out``.

    Args:
        teachers: run directories by language; ``*`` is for all languages that are not named, several of one language teach
            the mean of their posteriors.
        parent: run directory of the student; None makes a new one.
        tokenizer: sentencepiece model of a new student.
        cache: directory of the teachers' posteriors, which are read where they are there and made where not.

    Raises:
        UserError: unusable teachers, student, manifests, languages, tokenizers or output directory, found before training.
        Interrupted: stopped by a signal, state saved.
    """
    check_contexts(settings.contexts, settings.loss)
    _check(teachers, settings, parent, tokenizer, cache)
    opened = open_teachers(teachers)
    check_distillation(opened, settings.teacher, settings.loss, settings.training.steps)
    origin = None if parent is None else open_parent(parent, settings)
    weights = {f"teacher {teacher.run.path}": teacher.run.path / WEIGHTS for teacher in each(opened)}
    content = {
        "teachers": {
            language: {str(path): sha256_of(path / WEIGHTS) for path in several}
            for language, several in teachers.items()
        },
        **({} if cache is None else {"cache": str(cache)}),
        **told(settings, origin),
    }
    files = {**inputs_of(settings, manifest=manifest, dev=dev, tokenizer=tokenizer), **weights}
    with (
        join_world(device) as world,
        RunWriter.open(out, "distill", content, files, command, world, parent=parent) as run,
    ):
        if run.finished:
            return out
        data = settings.data
        languages = settings.model.languages if origin is None else origin.spec.languages
        if settings.labels == "teacher":
            seconds, policy = data.max_duration, settings.bad_cuts
            every = label([manifest, *data.also], opened, settings.labels_method, seconds, policy, run, languages)
            manifest, data = every[0], replace(data, also=tuple(every[1:]))
        material = read_datasets(manifest, dev, data, settings.bad_cuts, run, languages, opened)
        check_languages_present(settings, origin, material.every)
        given = tokenizer if origin is None else origin.run.tokenizer_path
        if given is None and settings.tokenizer is None:
            given = _teachers_tokenizer(opened)
        pieces = run_tokenizer(world, out, given, material.every, settings.tokenizer or TokenizerConfig())
        matched = _match(opened, pieces, material, settings)
        kept = None if cache is None else PosteriorCache(cache, matched, pieces)

        def prepare(run: RunWriter, batches: TrainBatches) -> Prepared:
            _say(run, opened, material)
            if kept is not None:
                for heard in kept.fill(matched, batches.table, pieces, run.world, settings.data.max_duration):
                    run.note(f"{cache}: {heard} utterances heard")
            model, variant = first_model(settings, origin, run, batches)
            add_encoder_maps(model, matched, settings.teacher)
            return Prepared(
                model=model,
                loss=build_loss(
                    model.spec,
                    settings.loss,
                    settings.contexts,
                    matched if kept is None else kept,
                    settings.teacher,
                    steps=settings.training.steps,
                    variant=variant,
                    attention_dropout=settings.model.attention_dropout if origin is None else None,
                ),
                after_step=keep_pruned,
                variant=variant,
                clean=kept is None and settings.teacher.input == "clean",
            )

        train_stage(run, settings, material, pieces, prepare)
    return out


def _check(
    teachers: Mapping[str, Sequence[Path]],
    settings: DistillConfig,
    parent: Path | None,
    tokenizer: Path | None,
    cache: Path | None,
) -> None:
    """Refuse what contradicts itself, before anything is read."""
    findings = check_start(settings, parent, tokenizer)
    if settings.loss.transducer_scale == 0:
        findings.append("loss.transducer_scale is 0, but teachers teach a transducer; set it above 0")
    if settings.contexts.sampling == "joint":
        findings.append("a teacher teaches one context a batch; use contexts.sampling=random")
    if settings.data.augment.join > 0 and set(teachers) != {ANY}:
        findings.append(
            "data.augment.join joins utterances of any language, and each teacher knows its own; set it to 0"
        )
    if cache is not None:
        augment, teaching = settings.data.augment, settings.teacher
        changes = {
            "data.augment.speed": (augment.speed, 0.0),
            "data.augment.tempo": (augment.tempo, 0.0),
            "data.augment.silence": (augment.silence, 0.0),
            "data.augment.join": (augment.join, 0.0),
            "data.bpe_dropout": (settings.data.bpe_dropout, 0.0),
            "teacher.classes": (teaching.classes, "three"),
            "teacher.temperature": (teaching.temperature, 1.0),
            "teacher.input": (teaching.input, "clean"),
            "teacher.context": (teaching.context, "own"),
            "teacher.ctc_scale": (teaching.ctc_scale, 0.0),
            "teacher.encoder_scale": (teaching.encoder_scale, 0.0),
        }
        findings += [
            f"--cache {cache}: holds next symbol and blank of unchanged audio; set {key}={needed}, not {value}"
            for key, (value, needed) in changes.items()
            if value != needed
        ]
    if findings:
        raise UserError.of(findings)


def _teachers_tokenizer(teachers: Teachers) -> Path:
    found = shared_tokenizer(teachers)
    if found is None:
        raise UserError(
            "the teachers have different tokenizers, so the student's must be said: give --tokenizer FILE, "
            "or --set tokenizer.kind=char to train one from the manifest"
        )
    return found


def _match(teachers: Teachers, tokenizer: Tokenizer, material: Datasets, settings: DistillConfig) -> Teachers:
    """The teachers as teachers of this tokenizer's symbols."""
    own = sha256_of(tokenizer.path)
    others = [str(t.run.path) for t in each(teachers) if sha256_of(t.run.tokenizer_path) != own]
    teaching, findings = settings.teacher, []
    if others:
        who = f"teachers with another tokenizer than the student's ({', '.join(others)})"
        if teaching.classes == "all":
            findings.append(f"{who}: their whole vocabulary means something else; set teacher.classes=three")
        if teaching.ctc_scale > 0 and settings.loss.ctc_scale > 0:
            findings.append(f"{who}: their CTC posteriors mean something else; set teacher.ctc_scale=0")
        if settings.data.bpe_dropout > 0:
            findings.append(f"{who}: they must part every text alike; set data.bpe_dropout=0")
    if findings:
        raise UserError.of(findings)
    return match_tokenizer(teachers, tokenizer, material.every)


def _say(run: RunWriter, teachers: Teachers, material: Datasets) -> None:
    counts = Counter(language if language in teachers else ANY for language in map(language_of, material.every))
    for language, several in teachers.items():
        names = ", ".join(str(teacher.run.path) for teacher in several)
        run.note(f"{run.path}: {names} teaches {counts[language]} utterances" + f" of {language}" * (language != ANY))
