"""The files of an evaluation, whatever recognized."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asrkit.config import to_dict
from asrkit.disk import atomic_write
from asrkit.errors import UserError
from asrkit.reporting.results import RESULT, UTTERANCES, Result, utterance_line
from asrkit.reporting.wer import Scored, confusions, format_alignment, format_confusions, format_summary, total_words

ALIGNMENTS, CONFUSIONS = "alignments.txt", "confusions.txt"


@dataclass(frozen=True)
class Evaluation:
    """One method's result: the utterances, and ``result``, which is result.json."""

    directory: Path
    result: dict[str, Any]
    utterances: list[Scored]


@contextmanager
def directories_for(directories: Iterable[Path]) -> Iterator[None]:
    """Create them before the work, so that a path that cannot be written is reported at once; work that fails leaves no empty ones.

    Raises:
        UserError: one cannot be written.
    """
    made: list[Path] = []
    try:
        for directory in directories:
            made += [path for path in (directory, *directory.parents) if not path.exists()]
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{directory}: cannot write there ({error.strerror}); choose another --out") from error
        yield
    except BaseException:
        for path in sorted(made, reverse=True):  # what is in a directory before the directory
            with suppress(OSError):  # it has something in it
                path.rmdir()
        raise


def write_evaluation(
    directory: Path, result: Result, utterances: Sequence[Scored], more: Mapping[str, str] | None = None
) -> Evaluation:
    """Write the files of one method, and ``more`` by name; result.json comes last, so where there is one, all are of it."""
    total = format_summary(total_words(utterances))
    heading = f"{result.manifest} by {result.run}, {result.variant}, {result.context}, {result.search}: {total}\n\n"
    contents = {
        **(more or {}),
        ALIGNMENTS: heading + "\n".join(format_alignment(utterance) for utterance in utterances),
        CONFUSIONS: heading + format_confusions(confusions(utterances)),
        UTTERANCES: "".join(utterance_line(utterance) for utterance in utterances),
        RESULT: json.dumps(to_dict(result), indent=2, ensure_ascii=False) + "\n",
    }
    with ExitStack() as written:
        for name, content in reversed(contents.items()):  # what is opened first is renamed last
            written.enter_context(atomic_write(directory / name)).write_text(content, encoding="utf-8")
        for earlier in (directory / RESULT, *directory.glob("hypotheses.*")):
            earlier.unlink(missing_ok=True)
    return Evaluation(directory, to_dict(result), list(utterances))
