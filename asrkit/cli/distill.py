"""distill, from other recognizers, and distill-lm, from language models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from asrkit.cli.options import (
    Config,
    Dev,
    Device,
    Manifest,
    MaxDuration,
    Out,
    Overrides,
    Seed,
    given,
    io,
    train_or_stop,
)

distillation = partial(typer.Option, rich_help_panel="Distillation")


def register(app: typer.Typer) -> None:
    """Add the commands that train with a teacher."""
    app.command("distill")(distill)
    app.command("distill-lm")(distill_lm)


def distill(
    teacher: Annotated[
        list[str],
        io(
            help="RUN for all languages, LANGUAGE=RUN, '*=RUN' for all other languages, or whisper:NAME_OR_PATH. Repeatable.",
            show_default=False,
        ),
    ],
    manifest: Manifest,
    out: Out,
    dev: Dev = None,
    parent: Annotated[
        Path | None, io("--from", help="Run directory of the student. Without it a new model is made.")
    ] = None,
    variant: Annotated[str | None, io(help="Variant to train, with --from. [default: the student's own]")] = None,
    size: Annotated[
        str | None, distillation(help="Size of a new student: tiny, small, medium or large. [default: small]")
    ] = None,
    tokenizer: Annotated[
        Path | None, distillation(help="sentencepiece model of a new student. [default: the teachers']")
    ] = None,
    weight: Annotated[
        str | None,
        distillation(
            help="How each utterance's distillation loss is weighted: constant, linear, exponential, piecewise, "
            "teacher-loss or student-teacher. [default: student-teacher]"
        ),
    ] = None,
    labels: Annotated[
        str | None,
        distillation(
            help="given, or teacher: cuts without text get the transcript of Whisper or of their teacher. [default: given]"
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        distillation(help="Directory to store posteriors and Whisper's frames in, so that teachers run only once."),
    ] = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Knowledge distillation: train a student with one or several teachers, for more languages, a smaller model, or both.

    Examples:

        asrkit distill --teacher exp/backbone --size tiny --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --out exp/student

        asrkit distill --teacher en=exp/en --teacher fr=exp/fr --teacher '*=exp/all' \\
            --manifest data/all.jsonl.gz --out exp/student

        asrkit distill --from exp/student --teacher exp/large --manifest data/prompts/train.jsonl.gz \\
            --out exp/better

        asrkit distill --teacher whisper:tiny.en --labels teacher --manifest data/raw/all.jsonl.gz --out exp/student

    Two teachers of one language teach the mean of their posteriors. The teachers' run directories do not change.
    """
    from asrkit.config import resolve
    from asrkit.stages.distill import DistillConfig, defaults
    from asrkit.stages.distill import distill as run

    options = given(
        {
            "model.size": size,
            "teacher.weight.kind": weight,
            "labels": labels,
            "variant": variant,
            "seed": seed,
            "data.max_duration": max_duration,
        }
    )
    teachers, whisper = _teachers(teacher)
    start = defaults(parent, cache is not None, whisper is not None, not teachers)
    settings = resolve(DistillConfig, config, overrides or (), start, options=options)
    files: dict[str, Any] = {"whisper": whisper, "parent": parent, "tokenizer": tokenizer, "cache": cache, "dev": dev}
    train_or_stop(out, lambda: run(teachers, manifest, out, settings, **files, device=device))


def distill_lm(
    parent: Annotated[Path, io("--from", help="Run directory of the model to train.")],
    lm: Annotated[
        list[str],
        io(
            help="NAME=RUN: a run directory of train-lm, and the name of its head. Repeatable.",
            show_default=False,
        ),
    ],
    manifest: Annotated[
        Path, io(help="Cuts that `asrkit align` wrote, in the units of the language models.", show_default=False)
    ],
    out: Out,
    dev: Dev = None,
    variant: Annotated[str | None, io(help="Variant to train. [default: the model's default variant]")] = None,
    share: Annotated[
        float | None,
        distillation("--lambda", min=0, max=1, help="Share of the recognizer's own loss. [default: 0.9]"),
    ] = None,
    mode: Annotated[
        str | None,
        distillation(
            help="mtl: a head for each language model; lst: one head, labels mixed with posteriors. [default: mtl]"
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        distillation(help="Temperature of the language models. [default: 1; 5 with lst]", show_default=False),
    ] = None,
    supervised: Annotated[
        str | None,
        distillation(help="Add a head trained on the aligned labels of this unit: bpe, phone or senone."),
    ] = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Distill language models into a model's encoder. Only training needs them.

    Example:

        asrkit distill-lm --from exp/backbone --lm phone=exp/lm-phone --lm bpe=exp/lm-bpe --lambda 0.9 \\
            --supervised phone --manifest exp/aligned.jsonl.gz --dev exp/aligned-dev.jsonl.gz --out exp/lmkd

    Commands that read the run directory afterwards drop the heads that learned from the language models.
    """
    from asrkit.config import resolve
    from asrkit.methods.lm_distillation.config import DistillLmConfig
    from asrkit.stages.distill_lm import distill_lm as run

    options = given(
        {
            "labels": share,
            "mode": mode,
            "temperature": temperature,
            "supervised": supervised,
            "variant": variant,
            "seed": seed,
            "data.max_duration": max_duration,
        }
    )
    settings = resolve(DistillLmConfig, config, overrides or (), options=options)
    lms = _language_models(lm)
    train_or_stop(out, lambda: run(parent, lms, manifest, out, settings, dev=dev, device=device))


def _teachers(options: list[str]) -> tuple[dict[str, list[Path]], str | None]:
    """``en=exp/en`` by language, a bare directory for all languages; and ``whisper:...``."""
    from asrkit.decoding.external.interface import SHERPA, WHISPER
    from asrkit.errors import UserError

    teachers: dict[str, list[Path]] = {}
    whispers: list[str] = []
    findings: list[str] = []
    for text in options:
        language, equals, path = text.partition("=")
        if not equals or "/" in language:  # a directory's name may hold an =
            language, path = "*", text
        if not language or not path:
            findings.append(f"--teacher {text}: write LANGUAGE=RUN, '*=RUN' or RUN")
        elif path.startswith(SHERPA):
            findings.append(f"--teacher {text}: cannot teach; label the cuts with `asrkit label --with {path}`")
        elif path.startswith(WHISPER) and language != "*":
            findings.append(f"--teacher {text}: Whisper teaches all languages it knows; write --teacher {path}")
        elif path.startswith(WHISPER):
            whispers.append(path)
        else:
            teachers.setdefault(language, []).append(Path(path))
    if len(whispers) > 1:
        findings.append(f"--teacher {whispers[1]}: is a second Whisper model; give one")
    if findings:
        raise UserError.of(findings)
    return teachers, whispers[0] if whispers else None


def _language_models(options: list[str]) -> dict[str, Path]:
    """``phone=exp/lm-phone`` by name."""
    from asrkit.errors import UserError

    named = [text.partition("=") for text in options]
    if wrong := [text for text, (name, _, path) in zip(options, named, strict=True) if not (name and path)]:
        raise UserError.of([f"--lm {text}: write NAME=RUN, such as phone=exp/lm-phone" for text in wrong])
    models = {name: Path(path) for name, _, path in named}
    if len(models) < len(named):
        raise UserError("--lm: the same name occurs twice; give each language model its own")
    return models
