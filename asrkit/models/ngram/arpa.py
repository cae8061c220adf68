"""ARPA files: n-grams with base-10 logarithms of their probabilities and back-off weights, as every toolkit reads and writes them.

Source: Doug Paul's format as SRILM's ngram-format(5) documents it. The files may come from strangers: numbers and sizes are
checked, and a line that cannot be right is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asrkit.disk import atomic_write
from asrkit.errors import UserError, clip

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
MAX_ORDER = 10
MAX_BYTES = 1 << 32
MAX_LINE = 1 << 16  # bytes
NEVER = -99.0  # how toolkits write log10 of 0, which <s> has


@dataclass(frozen=True)
class Section:
    """The n-grams of one order n, G of them.

    Args:
        words: (G, n) int32, indices into the vocabulary, oldest first.
        log_probs, backoffs: (G,) float64, natural logarithms; the back-off weight of an n-gram without one is 0.
    """

    words: np.ndarray
    log_probs: np.ndarray
    backoffs: np.ndarray


@dataclass(frozen=True)
class Arpa:
    """An n-gram model as its file has it: the vocabulary in the order of the unigrams, and a section for each order."""

    vocabulary: list[str]
    sections: list[Section]

    @property
    def order(self) -> int:
        return len(self.sections)

    @property
    def counts(self) -> list[int]:
        """How many n-grams there are of each order, from 1 on."""
        return [len(section.words) for section in self.sections]


def write_arpa(arpa: Arpa, path: Path) -> None:
    """Write an ARPA file, whole or not at all; numbers have 7 digits, as KenLM writes them."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {n}={count}\n" for n, count in enumerate(arpa.counts, start=1))
        for n, section in enumerate(arpa.sections, start=1):
            file.write(f"\n\\{n}-grams:\n")
            log_probs, backoffs = section.log_probs / math.log(10), section.backoffs / math.log(10)
            for words, log_prob, backoff in zip(
                section.words.tolist(), log_probs.tolist(), backoffs.tolist(), strict=True
            ):
                text = " ".join([arpa.vocabulary[word] for word in words])
                weight = f"\t{backoff:.7g}" if n < arpa.order and backoff != 0 else ""
                file.write(f"{log_prob:.7g}\t{text}{weight}\n")
        file.write("\n\\end\\\n")


def read_arpa(path: Path) -> Arpa:
    """Read an ARPA file.

    Raises:
        UserError: the file is missing or too large, or a line of it is not what the format has there; names the line.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: has {size:,} bytes, more than {MAX_BYTES:,}; prune the model")
        with open(path, "rb") as file:
            return _Reader(path, size, iter(file.readline, b"")).read()
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or error}); give an ARPA file") from error


class _Reader:
    def __init__(self, path: Path, size: int, lines: Iterator[bytes]) -> None:
        self.path, self.size, self.lines = path, size, lines
        self.number = 0
        self.ids: dict[str, int] = {}

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.path}:{self.number}: {what}; it is damaged or no ARPA file, so make it again")

    def next(self) -> str:
        """The next line that is not empty.

        Raises:
            UserError: there is none, it is too long, or not UTF-8.
        """
        for line in self.lines:
            self.number += 1
            if len(line) > MAX_LINE:
                raise self.wrong(f"a line of more than {MAX_LINE} bytes")
            if text := line.strip(b" \t\r\n"):
                try:
                    return text.decode("utf-8")
                except UnicodeDecodeError:
                    raise self.wrong("not UTF-8") from None
        raise self.wrong("the file ends before \\end\\")

    def read(self) -> Arpa:
        while self.next() != "\\data\\":  # toolkits may write comments before it
            pass
        counts: list[int] = []
        while match := re.fullmatch(r"ngram\s+(\d{1,9})\s*=\s*(\d{1,12})", line := self.next()):
            n, count = int(match[1]), int(match[2])
            if n != len(counts) + 1 or n > MAX_ORDER:
                raise self.wrong(f"the count of {n}-grams after that of {len(counts)}-grams (at most {MAX_ORDER})")
            if count * 2 * (n + 1) > self.size:  # a number and n words, each with a space or the line's end
                raise self.wrong(f"{count} {n}-grams, more than the file has room for")
            counts.append(count)
        if not counts or not counts[0]:
            raise self.wrong("no unigrams")
        sections = []
        for n, count in enumerate(counts, start=1):
            if line != f"\\{n}-grams:":
                raise self.wrong(f"{clip(line, 60)!r} where \\{n}-grams: has to stand")
            sections.append(self.section(n, count, n < len(counts)))
            line = self.next()
        if line != "\\end\\":
            raise self.wrong(f"{clip(line, 60)!r} where \\end\\ has to stand")
        return Arpa(list(self.ids), sections)

    def section(self, n: int, count: int, backs_off: bool) -> Section:
        words = np.zeros((count, n), dtype=np.int32)
        log_probs, backoffs = np.zeros(count), np.zeros(count)
        for row in range(count):
            line = self.next()
            if line.startswith("\\"):
                raise self.wrong(f"only {row} of the {count} {n}-grams")
            parts = re.split("[ \t]+", line)
            if len(parts) != n + 1 and not (len(parts) == n + 2 and backs_off):
                raise self.wrong(f"{len(parts)} columns in a line of {n}-grams")
            log_probs[row] = self.number_of(parts[0], "log-probability", most=1e-4)
            if len(parts) == n + 2:
                backoffs[row] = self.number_of(parts[-1], "back-off weight", most=1e4)
            if n == 1:
                if parts[1] in self.ids:
                    raise self.wrong(f"the word {clip(parts[1], 60)!r} a second time")
                self.ids[parts[1]] = row
            try:
                words[row] = [self.ids[word] for word in parts[1 : n + 1]]
            except KeyError as error:
                raise self.wrong(f"the word {clip(error.args[0], 60)!r} is not among the unigrams") from None
        return Section(words, np.minimum(log_probs, 0.0) * math.log(10), backoffs * math.log(10))

    def number_of(self, text: str, what: str, most: float) -> float:
        try:
            value = float(text)
        except ValueError:
            raise self.wrong(f"{clip(text, 30)!r} where a {what} has to stand") from None
        if math.isnan(value) or value > most:
            raise self.wrong(f"a {what} of {value:g}")
        return max(value, NEVER * 100)
