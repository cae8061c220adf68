"""sentencepiece tokenizers. In those trained here ``<blk>`` is 0 and ``<unk>`` is 1; ``<blk>`` is 0 in every one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from asrkit.disk import atomic_write
from asrkit.errors import UserError, clip

TokenizerKind = Literal["bpe", "unigram", "char"]
BLANK_ID, UNK_ID = 0, 1
WORD_START = "\u2581"  # sentencepiece's visible space


def single_spaces(text: str) -> str:
    """The text with one space between words, as it is scored: tabs, no-break spaces and the like count as spaces."""
    return " ".join(text.split())


class Tokenizer:
    """Text to token ids and back.

    A tokenizer of another toolkit may have its special pieces anywhere: what they are is read from the model.

    Args:
        path: a sentencepiece model whose piece 0 is ``<blk>``.

    Raises:
        UserError: the file is missing, is no sentencepiece model, or keeps another piece at 0.
    """

    def __init__(self, path: Path) -> None:
        if not Path(path).is_file():
            raise UserError(
                f"{path}: no such tokenizer; give a sentencepiece model or leave --tokenizer out to train one"
            )
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a sentencepiece model; train one by leaving --tokenizer out") from error
        if self._model.IdToPiece(BLANK_ID) != "<blk>":
            raise UserError(
                f"{path}: piece 0 is {clip(repr(self._model.IdToPiece(BLANK_ID)))}, not <blk>; use a tokenizer made by asrkit, or "
                "by a recipe of icefall"
            )
        self.path = Path(path)
        self.vocab_size: int = self._model.GetPieceSize()
        self.unk_id: int = self._model.unk_id()
        # Pieces that stand for no text: the blank, <unk>, <sos/eos> and the like. No search may emit them.
        self.special_ids = frozenset(number for number in range(self.vocab_size) if self._is_special(number))

    def _is_special(self, number: int) -> bool:
        model = self._model
        if number in (BLANK_ID, self.unk_id) or model.IsControl(number) or model.IsUnused(number):
            return True
        # Pieces that the user defined, as icefall does with <sos/eos>, have no probability of their own.
        defined = model.GetScore(number) == 0.0 and not model.IsByte(number)
        return defined and re.fullmatch("<[^<>]+>", model.IdToPiece(number)) is not None

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        return cls(path)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        return Tokenizer, (self.path,)  # sentencepiece objects do not cross process borders

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return self._model.EncodeAsIds(single_spaces(text))

    def encode_with_dropout(self, text: str, dropout: float, random: np.random.Generator) -> list[int]:
        """Token ids of ``text``, where each possible merge is left out with probability ``dropout``, each time anew, until none is
        left: BPE-dropout (arXiv 1910.13267, algorithm 1). For tokenizers with ``merges`` only.

        sentencepiece can do it too, but its draws differ from process to process, whatever the seed.
        """
        units = self._model.Encode(single_spaces(text), out_type=str, enable_sampling=True, alpha=1.0, nbest_size=-1)
        starts = [
            n for n, unit in enumerate(units) if n == 0 or (unit.startswith(WORD_START) and not self._crosses_words)
        ]
        ids: list[int] = []
        for start, end in pairwise([*starts, len(units)]):
            word = units[start:end]
            while kept := self._kept_merges(word, dropout, random):
                place = max(kept, key=kept.__getitem__)  # the first of the best
                word[place : place + 2] = [word[place] + word[place + 1]]
            ids += map(self._model.PieceToId, word)
        return ids

    @cached_property
    def _crosses_words(self) -> bool:
        """Whether a merge can cross the beginning of a word, as in tokenizers with pieces of several words."""
        return any(WORD_START in piece[1:] for piece in self.merges)

    def _kept_merges(self, word: list[str], dropout: float, random: np.random.Generator) -> dict[int, float]:
        """The merges that are possible and not left out: where, and the score of each."""
        joined = (first + second for first, second in pairwise(word))
        possible = {place: self.merges[piece] for place, piece in enumerate(joined) if piece in self.merges}
        draws = random.random(len(possible)).tolist()
        return {place: score for (place, score), draw in zip(possible.items(), draws, strict=True) if draw >= dropout}

    @cached_property
    def merges(self) -> dict[str, float]:
        """The score of every piece that a merge can make, the highest first to be made; {} if the model is not of kind bpe."""
        model = self._model
        # Of kind char no model samples; of kind unigram it also lists the best ones.
        samples = _gives(lambda: model.Encode("a", enable_sampling=True, alpha=1.0, nbest_size=-1))
        if not samples or _gives(lambda: model.NBestEncodeAsIds("a", nbest_size=1)):
            return {}
        normal = (number for number in range(self.vocab_size) if number not in self.special_ids)
        return {model.IdToPiece(number): model.GetScore(number) for number in normal if not model.IsByte(number)}

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, in two thirds of the time."""
        ids: list[list[int]] = self._model.EncodeAsIds(list(map(single_spaces, texts)), num_threads=1)
        return ids

    def spelled(self, texts: Sequence[str], tokens: Sequence[list[int]]) -> list[bool]:
        """Whether each text's own ``tokens`` give it back: where ``cannot_spell`` says nothing."""
        decoded: list[str] = self._model.DecodeIds(list(tokens), num_threads=1) if tokens else []
        return [
            back == single_spaces(text) and self.special_ids.isdisjoint(ids)
            for text, ids, back in zip(texts, tokens, decoded, strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; special pieces stand for none."""
        return self._model.DecodeIds([number for number in ids if number not in self.special_ids])

    def pieces(self, text: str) -> list[str]:
        """The tokens of ``text`` as they are spelled."""
        return self._model.Encode(single_spaces(text), out_type=str)

    def piece_to_id(self, piece: str) -> int:
        """The token spelled so, or that of <unk>."""
        return self._model.PieceToId(piece)

    def id_to_piece(self, token_id: int) -> str:
        return self._model.IdToPiece(token_id)

    def missing_characters(self, text: str) -> set[str]:
        """The characters of ``text`` this tokenizer has no piece for."""
        unknown = (piece for piece in self.pieces(text) if self._model.PieceToId(piece) == self.unk_id)
        return {character for piece in unknown for character in piece if character != WORD_START}

    def cannot_spell(self, text: str) -> str | None:
        """Why no sequence of tokens gives ``text`` back: a model with this tokenizer can never get it right. None if one does."""
        ids, written = self.encode(text), single_spaces(text)
        back = self.decode(ids)
        if written == back and self.unk_id not in ids:
            return None
        if missing := self.missing_characters(text):
            return f"the tokenizer has no {clip(' '.join(sorted(missing)))!r} (text: {clip(text)!r})"
        return (
            f"the tokenizer makes {clip(back)!r} of {clip(written)!r} (it normalizes texts); train one by leaving --tokenizer out, or "
            "write the texts as it does"
        )

    def copy_to(self, path: Path) -> None:
        """Copy the model to ``path``, with tokens.txt beside it, which is there first: where the model is, both are."""
        self.write_tokens(path.with_name("tokens.txt"))
        with atomic_write(path) as temporary:
            temporary.write_bytes(self.path.read_bytes())

    def write_tokens(self, path: Path) -> None:
        """Write tokens.txt: one ``piece id`` a line."""
        with atomic_write(path) as temporary:
            lines = (f"{self.id_to_piece(i)} {i}\n" for i in range(self.vocab_size))
            temporary.write_text("".join(lines), encoding="utf-8")

    def write_scores(self, path: Path) -> None:
        """Write bpe.vocab, with which sherpa-onnx splits hotwords into pieces: one ``piece<TAB>score`` a line."""
        with atomic_write(path) as temporary:
            lines = (f"{self.id_to_piece(i)}\t{self._model.GetScore(i)}\n" for i in range(self.vocab_size))
            temporary.write_text("".join(lines), encoding="utf-8")


def _gives(encode: Callable[[], list[int]]) -> bool:
    """Whether a model can encode so: else sentencepiece raises an error, or in older versions gives nothing."""
    try:
        return bool(encode())
    except RuntimeError:
        return False


def train_tokenizer(texts: Iterable[str], kind: TokenizerKind, vocab_size: int, out: Path) -> Tokenizer:
    """Train a sentencepiece model on ``texts`` and write it to ``out``, with ``tokens.txt`` beside it.

    Texts are taken as they are, without sentencepiece's own normalization (NFKC), so that decoding gives them back.
    ``vocab_size`` is an upper limit: a text too small for it gives as many pieces as it can.

    Raises:
        UserError: no text, or a vocabulary smaller than the number of characters needs.
    """
    sentences = [single_spaces(text) for text in texts if text.strip()]
    if not sentences:
        raise UserError("cannot train a tokenizer: there is no text; give a manifest or a file that has some")
    characters = len(set("".join(sentences)) | {"\u2581"}) + 2
    if kind != "char" and vocab_size < characters:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} is smaller than the {characters} characters of the text need; raise it or use tokenizer.kind=char"
        )
    with atomic_write(out) as temporary:
        with open(temporary, "wb") as file:
            try:
                sentencepiece.SentencePieceTrainer.Train(
                    sentence_iterator=iter(sentences),
                    model_writer=file,
                    model_type=kind,
                    vocab_size=vocab_size,
                    hard_vocab_limit=False,
                    character_coverage=1.0,
                    normalization_rule_name="identity",  # else SARA AM, full-width forms and joiners never come back
                    unk_id=UNK_ID,
                    pad_id=BLANK_ID,
                    pad_piece="<blk>",
                    bos_id=-1,
                    eos_id=-1,
                    minloglevel=2,
                    max_sentence_length=1 << 16,
                )
            except RuntimeError as error:
                if kind != "bpe" or "Vocabulary size" not in str(error):
                    raise UserError(f"cannot train a {kind} tokenizer of {vocab_size} pieces: {error}") from error
                raise UserError(
                    f"tokenizer.vocab_size={vocab_size} is too high for this text; lower it or use tokenizer.kind=char"
                ) from error
        Tokenizer(temporary).write_tokens(out.with_name("tokens.txt"))  # first: where the model is, both are
    return Tokenizer(out)
