"""Who teaches whom: frozen models by language, and whether they can teach this student on these cuts at all."""

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
from asrkit.errors import UserError
from asrkit.models import AsrModel, load_model
from asrkit.run_dir import RunDir, open_run, sha256_of

ANY = "*"  # the language of teachers for all that have none of their own
LISTED = 10  # of many cuts with the same trouble


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and its own token for each of the student's (V,); None where they share a tokenizer.

    ``name`` is its place among the teachers given, from 0 on.
    """

    name: str
    run: RunDir
    model: AsrModel
    tokens: Tensor | None = None

    def symbols(self, symbols: Tensor) -> Tensor:
        """The student's ``symbols`` (B, U) as the teacher's."""
        return symbols if self.tokens is None else self.tokens.to(symbols.device)[symbols]


Teachers = Mapping[str, Sequence[Teacher]]  # by language


def open_teachers(paths: Mapping[str, Sequence[Path]]) -> dict[str, list[Teacher]]:
    """Load the models of run directories, each once, to teach whoever speaks the language.

    Raises:
        UserError: directories that cannot be used, or models with another encoder frame rate; all of them.
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
                f"{option}: has an encoder frame for {rate} feature frames, the student one for "
                f"{AsrModel.subsampling}; a teacher's frames must be the student's"
            )
    if findings:
        raise UserError.of(findings)
    return {language: [loaded[path] for path in several] for language, several in paths.items()}


def load_teacher(path: Path, tokenizer: Path) -> Teacher:
    """The model of a run directory, to teach one with this very ``tokenizer``.

    Raises:
        UserError: unusable, or of another tokenizer.
    """
    (teacher,) = open_teachers({ANY: [path]})[ANY]
    if sha256_of(teacher.run.tokenizer_path) != sha256_of(tokenizer):
        raise UserError(
            f"--teacher {path}: has another tokenizer than {tokenizer.parent}, so its tokens mean something else; "
            "a teacher must have been trained with the student's (train-backbone --tokenizer)"
        )
    return teacher


def each(teachers: Teachers) -> list[Teacher]:
    """Every teacher once."""
    return list({id(teacher): teacher for several in teachers.values() for teacher in several}.values())


def shared_tokenizer(teachers: Teachers) -> Path:
    """The tokenizer that all teachers have.

    Raises:
        UserError: they have several.
    """
    files = {sha256_of(teacher.run.tokenizer_path): teacher.run.tokenizer_path for teacher in each(teachers)}
    if len(files) > 1:
        raise UserError(
            "the teachers have different tokenizers; choose the student's: --tokenizer FILE, "
            "or --set tokenizer.kind=char to train one from the manifest"
        )
    return next(iter(files.values()))


def route(teachers: Teachers, languages: Sequence[str]) -> list[tuple[list[int], Sequence[Teacher]]]:
    """The rows of a batch that share their teachers, and these."""
    groups: dict[tuple[int, ...], tuple[list[int], Sequence[Teacher]]] = {}
    for row, language in enumerate(languages):
        taught_by = teachers[language] if language in teachers else teachers[ANY]
        groups.setdefault(tuple(id(teacher) for teacher in taught_by), ([], taught_by))[0].append(row)
    return list(groups.values())


def check_languages(teachers: Teachers, cuts: Iterable[Cut]) -> list[str]:
    """Why the cuts cannot all be taught by these teachers; [] if they can."""
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
    """Why teachers with another tokenizer cannot teach these cuts' texts: a text must be segmented into the same pieces, so that
    symbol u of the lattice is the same, and have no character unknown to the teacher; [] if all can."""
    own = sha256_of(tokenizer.path)
    others = {id(t): t for t in each(teachers) if sha256_of(t.run.tokenizer_path) != own}
    tokenizers = {key: Tokenizer(t.run.tokenizer_path) for key, t in others.items()}
    differing: dict[int, list[str]] = {key: [] for key in others}
    for cut in cuts if others else ():
        for teacher in teachers.get(language_of(cut), teachers.get(ANY, ())):
            if id(teacher) in others:
                text, other = text_of(cut), tokenizers[id(teacher)]
                # A character that is unknown to the teacher is spelled in its pieces all the same.
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
    """The teachers as this tokenizer's: those with another teach by the pieces that are the same."""
    own = sha256_of(tokenizer.path)
    matched = {id(t): t for t in each(teachers)}
    for key, teacher in matched.items():
        if sha256_of(teacher.run.tokenizer_path) != own:
            other = Tokenizer(teacher.run.tokenizer_path)
            tokens = [other.piece_to_id(tokenizer.id_to_piece(i)) for i in range(tokenizer.vocab_size)]
            matched[key] = replace(teacher, tokens=torch.tensor(tokens))
    return {language: [matched[id(t)] for t in group] for language, group in teachers.items()}
