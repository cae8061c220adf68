"""Units of speech, and the inventories that number them.

An inventory is a sentencepiece model like any tokenizer here: 0 is ``<blk>``, 1 ``<unk>``. That of bpe holds pieces of words,
that of phones or senones one piece for each, so that a line of them, set apart by spaces, is a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from asrkit.data.text.tokenizer import BLANK_ID, UNK_ID, WORD_START, Tokenizer
from asrkit.disk import atomic_write

Unit = Literal["bpe", "phone", "senone"]
LmUnit = Literal["bpe", "phone", "senone", "word"]  # words are units of n-gram models alone, which need no inventory
FIRST = max(BLANK_ID, UNK_ID) + 1  # the id of the first unit
UNITS: tuple[Unit, ...] = ("bpe", "phone", "senone")


def write_inventory(symbols: Iterable[str], path: Path) -> Tokenizer:
    """Write the inventory of phones or senones, with tokens.txt beside it."""
    ordered = sorted(set(symbols))
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(ordered),
                model_writer=file,
                model_type="word",
                vocab_size=len(ordered) + 2,
                character_coverage=1.0,
                normalization_rule_name="identity",
                unk_id=UNK_ID,
                pad_id=BLANK_ID,
                pad_piece="<blk>",
                bos_id=-1,
                eos_id=-1,
                minloglevel=2,
            )
        Tokenizer(temporary).write_tokens(path.with_name("tokens.txt"))  # first: where the model is, both are
    return Tokenizer(path)


class Inventory:
    """Symbols as alignments write them, and their ids, from 2 on as in any tokenizer.

    A symbol of bpe is the piece itself, such as ``▁the``; one of phones or senones has no ``▁`` before it.
    """

    def __init__(self, symbols: Iterable[str], unit: Unit, unk_id: int = UNK_ID) -> None:
        self._ids = {symbol: number for number, symbol in enumerate(symbols, start=FIRST)}
        self.unit, self.size, self.unk_id = unit, len(self._ids) + FIRST, unk_id

    @classmethod
    def of(cls, tokenizer: Tokenizer, unit: Unit) -> Inventory:
        """That of a tokenizer."""
        pieces = [tokenizer.id_to_piece(number) for number in range(FIRST, tokenizer.vocab_size)]
        symbols = pieces if unit == "bpe" else [piece.removeprefix(WORD_START) for piece in pieces]
        return cls(symbols, unit, tokenizer.unk_id)

    def __contains__(self, symbol: str) -> bool:
        return symbol in self._ids

    def ids(self, symbols: Sequence[str]) -> list[int]:
        """Ids of symbols; that of ``<unk>`` for one that is not in the inventory."""
        return [self._ids.get(symbol, self.unk_id) for symbol in symbols]
