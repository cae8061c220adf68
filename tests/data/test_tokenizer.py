"""Tokenizers: own ones give every text back, special pieces of foreign ones are read from the model."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asrkit.config import from_dict
from asrkit.data.bucketing import BucketPlan
from asrkit.data.cut_table import CutTable
from asrkit.data.text.tokenizer import Tokenizer, TokenizerKind, train_tokenizer
from asrkit.data.train_batches import DataConfig, TrainBatches
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


ENGLISH = ["hello there my friend", "good day to you all", "some words are longer than others", "other days"]


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(ENGLISH * 5, "bpe", 60, tmp_path_factory.mktemp("bpe") / "tokenizer.model")


@given(st.text("helotrmyfindgaus €", max_size=40))
def test_without_dropout_the_merges_are_those_of_sentencepiece(english: Tokenizer, text: str) -> None:
    assert english.encode_with_dropout(text, 0.0, np.random.default_rng(0)) == english.encode(text)


@pytest.mark.parametrize("option", ["split_by_whitespace", "treat_whitespace_as_suffix"])
def test_merges_over_the_beginning_of_a_word_are_made(tmp_path: Path, option: str) -> None:
    """As tokenizers of other toolkits may have them."""
    path = tmp_path / "tokenizer.model"
    options: dict[str, Any] = {option: option == "treat_whitespace_as_suffix"}
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(ENGLISH * 5), model_writer=file, model_type="bpe", vocab_size=60, minloglevel=2,
            pad_id=0, pad_piece="<blk>", unk_id=1, bos_id=-1, eos_id=-1, **options,
        )  # fmt: skip
    tokenizer = Tokenizer(path)
    for text in ENGLISH:
        assert tokenizer.encode_with_dropout(text, 0.0, np.random.default_rng(0)) == tokenizer.encode(text)


@given(st.text("helotrmyfindgaus ", max_size=40), st.floats(0.0, 1.0, exclude_max=True), st.integers(0, 5))
def test_dropout_keeps_the_text(english: Tokenizer, text: str, dropout: float, seed: int) -> None:
    ids = english.encode_with_dropout(text, dropout, np.random.default_rng(seed))
    assert english.decode(ids) == english.decode(english.encode(text))


def test_dropout_leaves_out_each_merge_with_its_probability(tmp_path: Path) -> None:
    """With one merge the share is known; a second way to make a piece is another merge, and another draw."""
    one = train_tokenizer(["ab"] * 20, "bpe", 6, tmp_path / "one.model")
    assert [one.id_to_piece(number) for number in range(2, one.vocab_size)].count("ab") == 1
    random = np.random.default_rng(0)
    pieces = [len(one.encode_with_dropout("ab", 0.3, random)) for _ in range(4000)]
    most = max(pieces)
    assert np.mean([count == most for count in pieces]) == pytest.approx(0.3, abs=0.03)


def test_dropout_is_the_same_in_every_process(english: Tokenizer) -> None:
    """sentencepiece's own draws depend on the process too."""
    drawn = english.encode_with_dropout(ENGLISH[2], 0.5, np.random.default_rng(7))
    code = (
        "import sys, numpy; from pathlib import Path; from asrkit.data.text.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer(Path(sys.argv[1]))\n"
        "print(tokenizer.encode_with_dropout(sys.argv[2], 0.5, numpy.random.default_rng(7)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(english.path), ENGLISH[2]], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == drawn != english.encode(ENGLISH[2])


@pytest.mark.parametrize("kind", ["char", "unigram"])
def test_a_tokenizer_without_merges_has_no_dropout(tmp_path: Path, kind: TokenizerKind) -> None:
    tokenizer = train_tokenizer(ENGLISH * 5, kind, 40, tmp_path / "tokenizer.model")
    assert tokenizer.merges == {}
    table = CutTable([])
    plan = BucketPlan(np.ones(1), 1.0, 1, 1, 1)
    data = from_dict(DataConfig, {"bpe_dropout": 0.1}, "test")
    with pytest.raises(UserError, match="which only bpe tokenizers have"):
        TrainBatches(table, plan, 1, data, tokenizer, None, 1)
