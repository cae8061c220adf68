"""Sequences of symbols for a language model: read from texts or alignments, in batches that are a pure function of
(seed, step, slice)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from asrkit.data.alignment import symbols_of
from asrkit.data.bucketing import BucketPlan
from asrkit.data.manifests import language_of, open_cuts, text_of
from asrkit.data.senones import SenoneTree
from asrkit.data.text.normalization import split_of
from asrkit.data.text.phones import phones_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.text.units import Inventory, LmUnit
from asrkit.devices import send
from asrkit.errors import UserError

MAX_FINDINGS = 20  # unusable lines that an error names


@dataclass(frozen=True)
class Sentence:
    """A line of a text, or a cut; ``symbols`` are those of its alignment, where these are the units."""

    number: int
    where: str
    text: str
    language: str
    symbols: Sequence[str] | None = None


def is_manifest(path: Path) -> bool:
    """Whether a path names cuts rather than a text."""
    return path.is_dir() or path.name.endswith((".jsonl", ".jsonl.gz"))


def read_sentences(path: Path, unit: LmUnit, language: str = "") -> Iterator[Sentence]:
    """The lines of a UTF-8 text, empty ones left out, or the cuts of a manifest: the words of those for bpe and word, else their alignment.

    Raises:
        UserError: the file cannot be read, or a cut is not aligned in this unit.
    """
    if is_manifest(path):
        cuts = list(open_cuts(path))
        aligned = unit not in ("bpe", "word")
        if aligned and (bare := [cut.id for cut in cuts if symbols_of(cut, unit) is None]):
            raise UserError(
                f"{path}: {len(bare)} cuts have no {unit} alignment, such as {', '.join(bare[:10])}; "
                f"run asrkit align --unit {unit} on it, or give --text"
            )
        for number, cut in enumerate(cuts, start=1):
            symbols = symbols_of(cut, unit) if aligned else None
            yield Sentence(number, f"cut {cut.id}", text_of(cut), language_of(cut) or language, symbols)
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Sentence(number, f"{path}:{number}", " ".join(line.split()), language)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read ({error}); give a UTF-8 file with one sentence a line") from error


def speller(
    unit: LmUnit, tokenizer: Tokenizer | None = None, tree: SenoneTree | None = None
) -> Callable[[Sentence], Sequence[str]]:
    """A function from a sentence to its units: those of its alignment, else its words, the tokenizer's pieces, espeak-ng's
    phones, or the tree's senones of those phones.

    The function raises ``UserError`` for a sentence that the unit cannot spell.
    """

    def spell(sentence: Sentence) -> Sequence[str]:
        if sentence.symbols is not None:
            return sentence.symbols
        if unit == "word":
            return sentence.text.split()
        if unit == "bpe":
            assert tokenizer is not None
            if problem := tokenizer.cannot_spell(sentence.text):
                raise UserError(problem)
            return [tokenizer.id_to_piece(number) for number in tokenizer.encode(sentence.text)]
        phones = [phone for word in phones_of(sentence.text, sentence.language) for phone in word]
        if unit == "phone":
            return phones
        assert tree is not None
        return tree.senones_of(phones)

    return spell


def spelled_sentences(
    source: Path,
    dev: Path | None,
    unit: LmUnit,
    language: str,
    held_out: float,
    bad_lines: Literal["refuse", "skip"],
    spell: Callable[[Sentence], Sequence[str]],
    note: Callable[[str], None],
    max_symbols: int | None = None,
) -> Iterator[tuple[Sentence, Sequence[str], bool]]:
    """Each sentence of ``source`` and ``dev``, its units, and whether it is to be measured on instead of trained on: those of dev
    are, or without one the share ``held_out`` of the source. Lines that cannot be written in the units, or
    have more than ``max_symbols`` with their end, are left out and noted.

    Raises:
        UserError: after the last sentence: there are such lines, unless ``bad_lines`` is skip; or there is none to train on, or none
            in ``dev``.
    """
    findings: list[str] = []
    empty = unmeasured = True
    for path in (source, *([] if dev is None else [dev])):
        for sentence in read_sentences(path, unit, language):
            try:
                symbols = spell(sentence)
            except UserError as error:
                findings.append(f"{sentence.where}: {error}")
                continue
            if max_symbols is not None and len(symbols) >= max_symbols:
                findings.append(
                    f"{sentence.where}: has {len(symbols)} symbols, more than a step takes; split it, or raise max_symbols"
                )
                continue
            measured = path is dev or (dev is None and split_of(sentence.text, dev=held_out, test=0.0) == "dev")
            empty, unmeasured = empty and measured, unmeasured and not measured
            yield sentence, symbols, measured
    if findings and bad_lines == "refuse":
        more = f"{len(findings)} unusable lines: fix them, or leave them out with --set bad_lines=skip"
        raise UserError.of([*findings[:MAX_FINDINGS], more])
    for finding in findings:
        note(f"left out: {finding}")
    if empty:
        raise UserError(f"{source}: no sentence is left to train on")
    if dev is not None and unmeasured:
        raise UserError(f"{dev}: no sentence is left to measure perplexity on; give another --dev, or leave it out")


@dataclass(frozen=True)
class SequenceBatch:
    """symbols (B, N) int64 padded with 0, symbol_lens (B,); ``cut_ids`` say where each comes from. No audio.

    num_symbols: of all sequences, their ends included, a plain number.
    """

    symbols: Tensor
    symbol_lens: Tensor
    cut_ids: list[str]
    durations: list[float] = field(default_factory=list)
    num_symbols: int = -1
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_symbols < 0:
            object.__setattr__(self, "num_symbols", int((self.symbol_lens + 1).sum()))

    def to(self, device: torch.device) -> SequenceBatch:
        """The same batch with its tensors on ``device``."""
        return replace(self, symbols=send(self.symbols, device), symbol_lens=send(self.symbol_lens, device))


class SequenceTable:
    """Sequences by index, all in one array: no Python object for each. Symbols are numbered as they come, then by an inventory."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._numbers, self._lens, self._ids = array("q"), array("q"), array("i")
        self._known: dict[str, int] = {}
        self._inventory_ids = self._ends = np.zeros(0, dtype=np.int64)

    def append(self, number: int, symbols: Sequence[str]) -> None:
        """Add a sequence, of line ``number`` of the source."""
        self._numbers.append(number)
        self._lens.append(len(symbols))
        self._ids.extend(self._known.setdefault(symbol, len(self._known)) for symbol in symbols)

    @property
    def symbols(self) -> list[str]:
        """Every symbol that occurs."""
        return list(self._known)

    def number_by(self, inventory: Inventory) -> None:
        """From here on ids are the inventory's.

        Raises:
            UserError: a symbol is not in it.
        """
        if missing := [symbol for symbol in self._known if symbol not in inventory]:
            raise UserError(
                f"{self._source}: {len(missing)} {inventory.unit} units are not among those of the model, such as "
                f"{' '.join(missing[:10])}; train on the text that has them"
            )
        self._inventory_ids = np.array(inventory.ids(list(self._known)), dtype=np.int64)
        self._ends = np.cumsum(self.lens)

    def __len__(self) -> int:
        return len(self._lens)

    @property
    def lens(self) -> np.ndarray:
        """(N,) symbols in each."""
        return np.array(self._lens, dtype=np.int64)

    def batch(self, indices: Sequence[int]) -> SequenceBatch:
        """The chosen sequences, padded to the longest."""
        lens = torch.tensor([self._lens[index] for index in indices])
        padded = torch.zeros(len(lens), int(lens.max()), dtype=torch.int64)
        for row, index in enumerate(indices):
            numbers = self._ids[int(self._ends[index]) - self._lens[index] : int(self._ends[index])]
            padded[row, : len(numbers)] = torch.from_numpy(self._inventory_ids[np.array(numbers, dtype=np.int64)])
        return SequenceBatch(padded, lens, [f"{self._source}:{self._numbers[index]}" for index in indices])

    def batches(self, max_symbols: int) -> Iterator[SequenceBatch]:
        """Every sequence once, longest together first, at most ``max_symbols`` padded symbols (with ends) in a batch."""
        waiting: list[int] = []
        for index in np.argsort(-self.lens, kind="stable").tolist():
            if waiting and (self._lens[waiting[0]] + 1) * (len(waiting) + 1) > max_symbols:
                yield self.batch(waiting)
                waiting = []
            waiting.append(index)
        if waiting:
            yield self.batch(waiting)


class SequenceBatches(torch.utils.data.Dataset[SequenceBatch]):
    """``batches[step * slices + slice]``: the sequences of a step and slice."""

    def __init__(self, table: SequenceTable, plan: BucketPlan, slices: int) -> None:
        self.table, self.plan, self.slices = table, plan, slices

    def __getitem__(self, index: int) -> SequenceBatch:
        step, part = divmod(index, self.slices)
        return self.table.batch(self.plan(step)[part :: self.slices].tolist())
