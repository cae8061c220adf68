"""Tokenizers: own ones give every text back, special pieces of foreign ones are read from the model."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asrkit.data.text.tokenizer import Tokenizer, TokenizerKind, train_tokenizer
from asrkit.errors import UserError

# What sentencepiece's own normalization (NFKC) never gives back, or joins: Thai SARA AM, full-width forms, ligatures, a
# superscript, joiners (Persian, Sinhala), an ideographic space, a vulgar fraction.
TEXTS = [
    "น้ำ",
    "ทำ สำคัญ",
    "Ｈｅｌｌｏ，世界！",
    "ﬁne ﬂow",
    "m² is x³",
    "می‌خواهم",
    "ශ්‍රී ලංකා",
    "½ ① ㎏",
    "ｶﾅ カナ",
    "col·legi",
]


def foreign(folder: Path, **options: Any) -> Tokenizer:
    words = ["stop", "repeat", "yes", "yes stop", "enter", "rubout", "erase", "help", "no"]
    prefix = folder / "bpe"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(words), model_prefix=str(prefix), model_type="unigram",
        **{"vocab_size": 26, **options}, hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(prefix.with_suffix(".model"))


def icefall(folder: Path) -> Tokenizer:
    """<blk> is 0, <sos/eos> 1, <unk> 2."""
    return foreign(
        folder, user_defined_symbols=["<blk>", "<sos/eos>"], unk_id=2, bos_id=-1, eos_id=-1, pad_id=-1
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["char", "bpe", "unigram"])
def test_own_tokenizers_give_every_text_back(tmp_path: Path, kind: TokenizerKind) -> None:
    tokenizer = train_tokenizer([text for text in TEXTS for _ in range(3)], kind, 120, tmp_path / "tokenizer.model")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.cannot_spell(text) is None
    assert tokenizer.special_ids == {0, 1} and tokenizer.unk_id == 1
    assert tokenizer.missing_characters("น้ำ j") == {"j"}


LETTERS = "aàㅎ한ำ้ิ‌‍ﬁ½Ａ·'’ "


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("letters") / "tokenizer.model"
    return train_tokenizer([" ".join(LETTERS), LETTERS] * 3, "char", 100, path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=LETTERS + "\t\u00a0\u3000", min_size=1))
def test_any_text_of_known_characters_comes_back_with_single_spaces(letters: Tokenizer, text: str) -> None:
    assert letters.decode(letters.encode(text)) == " ".join(text.split())
    assert letters.cannot_spell(text) is None


def test_special_pieces_are_read_from_the_model(tmp_path: Path) -> None:
    tokenizer = icefall(tmp_path)
    assert (tokenizer.unk_id, tokenizer.special_ids) == (2, frozenset({0, 1, 2}))
    assert tokenizer.missing_characters("jazz") == {"j", "z"}
    assert tokenizer.cannot_spell("jazz") == "the tokenizer has no 'j z' (text: 'jazz')"
    ids = tokenizer.encode("yes stop")
    assert tokenizer.decode([1, *ids, 2, 0]) == "yes stop"
    other = foreign(tmp_path, pad_id=0, pad_piece="<blk>", bos_id=1, eos_id=2, unk_id=3, byte_fallback=False)
    assert (other.unk_id, other.special_ids) == (3, frozenset({0, 1, 2, 3}))
    assert other.missing_characters("jazz") == {"j", "z"}
    with pytest.raises(UserError, match="piece 0 is '<unk>', not <blk>"):
        foreign(tmp_path, unk_id=0, bos_id=1, eos_id=2)


def test_pieces_of_bytes_stand_for_text(tmp_path: Path) -> None:
    tokenizer = foreign(
        tmp_path, pad_id=0, pad_piece="<blk>", bos_id=-1, eos_id=-1, unk_id=1, byte_fallback=True, vocab_size=300
    )  # fmt: skip
    assert tokenizer.special_ids == {0, 1} and tokenizer.decode(tokenizer.encode("jazz")) == "jazz"


def test_a_tokenizer_that_normalizes_is_told_with_what_it_makes(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["stop"] * 3, "char", 30, tmp_path / "own.model")
    assert tokenizer.cannot_spell("stop") is None
    other = foreign(tmp_path, pad_id=0, pad_piece="<blk>", bos_id=-1, eos_id=-1, unk_id=1)
    assert unicodedata.normalize("NFKC", "ｓｔｏｐ") == "stop"
    assert other.missing_characters("ｓｔｏｐ") == set()
    assert "the tokenizer makes 'stop' of 'ｓｔｏｐ'" in str(other.cannot_spell("ｓｔｏｐ"))
