"""distill: what teaches, and a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    changes_of,
    train_or_stop,
)


def register(app: typer.Typer) -> None:
    """Add the command ``distill``."""
    app.command("distill")(distill)


def distill(
    manifest: Manifest,
    out: Out,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="LANGUAGE=RUN, '*=RUN' for all others, or RUN for all. Repeatable.", show_default=False),
    ] = None,
    parent: Annotated[
        Path | None, typer.Option("--from", help="Run directory of the student; left out, a new one is made.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Of a new student: tiny, small, medium or large. [default: small]")
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(
            help="Of what is taught: constant, linear, exponential, piecewise, teacher-loss or student-teacher. "
            "[default: student-teacher]"
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="sentencepiece model of a new student. [default: the teachers']")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="teacher: cuts without text get what their teacher hears. [default: given]")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Directory to keep the teachers' posteriors in, so that they run once.")
    ] = None,
    lm: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead: NAME=RUN, a language model of train-lm and its head's name. Repeatable.", show_default=False
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option("--lambda", min=0, max=1, help="With --lm: share of the model's own loss. [default: 0.9]"),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="With --lm: mtl, a head for each; or lst, labels mixed with posteriors. [default: mtl]"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="With --lm: of the language models. [default: 1; of lst 5]", show_default=False)
    ] = None,
    supervised: Annotated[
        str | None, typer.Option(help="With --lm: unit of a head on the aligned labels; left out, there is none.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="The one to train, with --from; left out, the student's default.")
    ] = None,
    dev: Dev = None,
    config: Config = None,
    overrides: Overrides = None,
    seed: Seed = None,
    max_duration: MaxDuration = None,
    device: Device = "auto",
) -> None:
    """Train a student under one teacher or several: other languages, a smaller size, or both.

    Examples:

        asrkit distill --teacher exp/backbone --size tiny --manifest data/prompts/train.jsonl.gz \\
            --dev data/prompts/dev.jsonl.gz --out exp/student

        asrkit distill --teacher en=exp/en --teacher fr=exp/fr --teacher '*=exp/all' \\
            --manifest data/all.jsonl.gz --out exp/student

        asrkit distill --from exp/student --teacher exp/large --manifest data/prompts/train.jsonl.gz \\
            --out exp/better

        asrkit distill --from exp/backbone --lm phone=exp/lm-phone --lm bpe=exp/lm-bpe --lambda 0.9 \\
            --supervised phone --manifest exp/aligned.jsonl.gz --dev exp/aligned-dev.jsonl.gz --out exp/lmkd

    A language given twice is taught the mean of both. The teachers' run directories stay as they are.
    With --lm the manifest is one that align wrote, in the units of the language models, and the heads they teach are dropped by
    whatever reads the run directory next.
    """
    from asrkit.errors import UserError

    of_teachers = {
        "--teacher": teacher, "--size": size, "--weight": weight, "--tokenizer": tokenizer, "--labels": labels,
        "--cache": cache,
    }  # fmt: skip
    of_lms = {"--lambda": share, "--mode": mode, "--temperature": temperature, "--supervised": supervised}
    if astray := [name for name, value in (of_teachers if lm else of_lms).items() if value not in (None, [])]:
        raise UserError(
            f"{', '.join(astray)}: "
            + ("for teachers, not for --lm; teach by one and then, from that run, by the other" if lm else "needs --lm")
        )
    if lm:
        _by_language_models(
            lm, parent, manifest, out, dev, device, config, overrides,
            {
                "labels": share, "mode": mode, "temperature": temperature, "supervised": supervised,
                "variant": variant, "seed": seed, "data.max_duration": max_duration,
            },
        )  # fmt: skip
        return
    from asrkit.config import resolve
    from asrkit.stages.distill import DistillConfig, defaults
    from asrkit.stages.distill import distill as run

    given = {
        "model.size": size,
        "teacher.weight.kind": weight,
        "labels": labels,
        "variant": variant,
        "seed": seed,
        "data.max_duration": max_duration,
    }
    settings = resolve(
        DistillConfig, config, changes_of(overrides, given), defaults(parent is not None, cache is not None)
    )
    train_or_stop(
        out,
        lambda: run(
            _teachers(teacher or []),
            manifest,
            out,
            settings,
            parent=parent,
            tokenizer=tokenizer,
            cache=cache,
            dev=dev,
            device=device,
        ),
    )


def _teachers(given: list[str]) -> dict[str, list[Path]]:
    """``en=exp/en`` by language; a bare directory is for all languages."""
    from asrkit.errors import UserError

    if not given:
        raise UserError("--teacher: give at least one, as RUN or LANGUAGE=RUN; or --lm")
    teachers: dict[str, list[Path]] = {}
    for text in given:
        language, equals, path = text.partition("=")
        if not equals or "/" in language:  # a directory's name may hold an =
            language, path = "*", text
        if not language or not path:
            raise UserError(f"--teacher {text}: write LANGUAGE=RUN, '*=RUN' or RUN")
        teachers.setdefault(language, []).append(Path(path))
    return teachers


def _by_language_models(
    lm: list[str],
    parent: Path | None,
    manifest: Path,
    out: Path,
    dev: Path | None,
    device: str,
    config: Path | None,
    overrides: list[str] | None,
    given: dict[str, object],
) -> None:
    """Run the stage that --lm asks for."""
    from asrkit.config import resolve
    from asrkit.errors import UserError
    from asrkit.stages.distill_lm import DistillLmConfig, distill_lm

    if parent is None:
        raise UserError("--lm: teaches a model that has been trained; give it as --from")
    named = [text.partition("=") for text in lm]
    if wrong := [text for text, (name, _, path) in zip(lm, named, strict=True) if not (name and path)]:
        raise UserError.of([f"--lm {text}: write NAME=RUN, such as phone=exp/lm-phone" for text in wrong])
    lms = {name: Path(path) for name, _, path in named}
    if len(lms) < len(named):
        raise UserError("--lm: a name occurs twice; give each language model its own")
    settings = resolve(DistillLmConfig, config, changes_of(overrides, given))
    train_or_stop(out, lambda: distill_lm(parent, lms, manifest, out, settings, dev=dev, device=device))
