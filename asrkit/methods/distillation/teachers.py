"""Teachers: frozen models by language, and checks that they can teach the student on the given cuts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lhotse.cut import Cut
from torch import Tensor

from asrkit.data.manifests import language_of, text_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.models import AsrModel, load_model
from asrkit.run_dir import RunDir, open_run

ANY = "*"  # stands for all languages that have no teacher of their own
LISTED = 10  # cuts that an error names


@dataclass(frozen=True)
class Teacher:
    """A frozen model. ``tokens`` (V,) maps each of the student's tokens to the teacher's; None if they share a tokenizer.

    ``name`` is its index among the teachers, from 0.
    """

    name: str
    run: RunDir
    model: AsrModel
    tokens: Tensor | None = None

    def symbols(self, symbols: Tensor) -> Tensor:
        """The student's ``symbols`` (B, U) in the teacher's tokens."""
        return symbols if self.tokens is None else self.tokens.to(symbols.device)[symbols]


Teachers = Mapping[str, Sequence[Teacher]]  # by language


def open_teachers(paths: Mapping[str, Sequence[Path]]) -> dict[str, list[Teacher]]:
    """Load the models of run directories, each once, by language.

    Raises:
        UserError: directories that cannot be used, or models with another encoder frame rate; names all of them.
    """
    findings: list[str] = []
    loaded: dict[Path, Teacher] = {}
    for language, path in ((language, path) for language, several in paths.items() for path in several):
        if path in loaded:
            continue
        option = f"--teacher {path}" if language == ANY else f"--teacher {language}={path}"
        try:
            run = open_run(path)
            loaded[path] = Teacher(str(len(loaded)), run, load_model(run).requires_grad_(False))
        except UserError as error:
            findings += [f"{option}: {line.removeprefix(f'{path}: ')}" for line in error.lines]
            continue
        if (rate := loaded[path].model.subsampling) != AsrModel.subsampling:
            findings.append(
                f"{option}: has one encoder frame per {rate} feature frames, but the student has one per "
                f"{AsrModel.subsampling}; choose a teacher with the same rate"
            )
    if findings:
        raise UserError.of(findings)
    return {language: [loaded[path] for path in several] for language, several in paths.items()}


def load_teacher(path: Path, tokenizer: Path) -> Teacher:
    """The model of a run directory, as the teacher of a student with this ``tokenizer``.

    Raises:
        UserError: the run directory is unusable or has another tokenizer.
    """
    (teacher,) = open_teachers({ANY: [path]})[ANY]
    if sha256_of(teacher.run.tokenizer_path) != sha256_of(tokenizer):
        raise UserError(
            f"--teacher {path}: has another tokenizer than {tokenizer.parent}, so its tokens mean something else; "
            "choose a teacher trained with the student's tokenizer (train-backbone --tokenizer)"
        )
    return teacher


def each(teachers: Teachers) -> list[Teacher]:
    """Every teacher once."""
    return list({id(teacher): teacher for several in teachers.values() for teacher in several}.values())


def shared_tokenizer(teachers: Teachers) -> Path:
    """The tokenizer that all teachers share.

    Raises:
        UserError: they have different ones.
    """
    files = {sha256_of(teacher.run.tokenizer_path): teacher.run.tokenizer_path for teacher in each(teachers)}
    if len(files) > 1:
        raise UserError(
            "the teachers have different tokenizers; choose the student's: --tokenizer FILE, "
            "or --set tokenizer.kind=char to train one from the manifest"
        )
    return next(iter(files.values()))


def route(teachers: Teachers, languages: Sequence[str]) -> list[tuple[list[int], Sequence[Teacher]]]:
    """Groups of rows of a batch with the same teachers, and these teachers."""
    groups: dict[tuple[int, ...], tuple[list[int], Sequence[Teacher]]] = {}
    for row, language in enumerate(languages):
        taught_by = teachers[language] if language in teachers else teachers[ANY]
        groups.setdefault(tuple(id(teacher) for teacher in taught_by), ([], taught_by))[0].append(row)
    return list(groups.values())


def check_languages(teachers: Teachers, cuts: Iterable[Cut]) -> list[str]:
    """Findings about cuts that these teachers cannot teach because of their language; [] if there are none."""
    untaught: Counter[str] = Counter()
    unnamed: list[str] = []
    unknown: dict[str, list[str]] = {}
    for cut in cuts:
        language = language_of(cut)
        taught_by = teachers.get(language, teachers.get(ANY, ()))
        if not taught_by and language:
            untaught[language] += 1
        elif not taught_by:
            unnamed.append(cut.id)
        for teacher in taught_by:
            if teacher.model.spec.languages and language not in teacher.model.spec.languages:
                takes = f"--teacher {teacher.run.path}: takes the language as an input, one of {', '.join(teacher.model.spec.languages)}"
                unknown.setdefault(takes, []).append(f"{cut.id} ({language or 'none'})")
    findings = [
        f"{takes}; {len(cut_ids)} cuts have another or none: {', '.join(cut_ids[:LISTED])}"
        for takes, cut_ids in unknown.items()
    ]
    if untaught:
        counts = ", ".join(f"{language} ({count} cuts)" for language, count in sorted(untaught.items()))
        findings.append(f"no teacher for the languages {counts}; add --teacher LANGUAGE=RUN, or '*=RUN' for all others")
    if unnamed:
        findings.append(
            f"{len(unnamed)} cuts without a language, such as {', '.join(unnamed[:LISTED])}; "
            "give their supervisions one, or add --teacher '*=RUN'"
        )
    return findings


def check_texts(teachers: Teachers, tokenizer: Tokenizer, cuts: Iterable[Cut]) -> list[str]:
    """Findings about texts that teachers with another tokenizer cannot teach; [] if there are none. A teacher must segment a text
    into the same pieces, so that symbol u of the lattice is the same, and must know all its characters."""
    own = sha256_of(tokenizer.path)
    others = {id(t): t for t in each(teachers) if sha256_of(t.run.tokenizer_path) != own}
    tokenizers = {key: Tokenizer(t.run.tokenizer_path) for key, t in others.items()}
    differing: dict[int, list[str]] = {key: [] for key in others}
    for cut in cuts if others else ():
        for teacher in teachers.get(language_of(cut), teachers.get(ANY, ())):
            if id(teacher) in others:
                text, other = text_of(cut), tokenizers[id(teacher)]
                # The pieces of a text also show characters that the teacher's tokenizer does not know.
                if tokenizer.pieces(text) != other.pieces(text) or other.missing_characters(text):
                    differing[id(teacher)].append(cut.id)
    return [
        f"--teacher {others[key].run.path}: its tokenizer segments {len(cut_ids)} texts differently from the student's, or "
        f"lacks characters of them: cuts {', '.join(cut_ids[:LISTED])}; train it with the student's tokenizer "
        "(train-backbone --tokenizer)"
        for key, cut_ids in differing.items()
        if cut_ids
    ]


def match_tokenizer(teachers: Teachers, tokenizer: Tokenizer) -> dict[str, list[Teacher]]:
    """The teachers with ``tokens`` set for students with this tokenizer: equal pieces stand for each other."""
    own = sha256_of(tokenizer.path)
    matched = {id(t): t for t in each(teachers)}
    for key, teacher in matched.items():
        if sha256_of(teacher.run.tokenizer_path) != own:
            other = Tokenizer(teacher.run.tokenizer_path)
            tokens = [other.piece_to_id(tokenizer.id_to_piece(i)) for i in range(tokenizer.vocab_size)]
            matched[key] = replace(teacher, tokens=torch.tensor(tokens))
    return {language: [matched[id(t)] for t in group] for language, group in teachers.items()}
