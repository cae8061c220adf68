"""Texts as they are spoken: lower-case words, no punctuation, numbers spelled out; and the split they fall into."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import cache

import regex

from asrkit.data.text.languages import is_language, language_names

SPLITS = ("train", "dev", "test")
# Typographic quotes, the modifier letter, grave and acute accents standing alone: all of them typed for an apostrophe.
_APOSTROPHES = str.maketrans("\u2019\u2018\u02bc\u0060\u00b4", "'" * 5)
_BRACKETED = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>|\{[^}]*\}")
_NUMBER = re.compile(r"\d+")
# Words are made of letters and their marks, of an apostrophe between letters, and of what Unicode's word-break rules (UAX #29,
# WB4, WB6 to WB7c) keep within words: the middle dot of Catalan, Hebrew geresh and gershayim, joiners.
_LETTER = r"[\p{L}\p{M}]"
_WITHIN = rf"(?<={_LETTER})['\p{{WB=MidLetter}}](?={_LETTER})|(?<=\p{{Hebrew}})\u05f3|(?<={_LETTER})[\u200c\u200d](?={_LETTER})"
_BETWEEN_WORDS = regex.compile(rf"(?!{_WITHIN})[^\p{{L}}\p{{M}}]")
_NEVER_HEARD = regex.compile(r"[^\P{Cf}\u200c\u200d]")  # byte order mark, soft hyphen, marks of direction
_LOOSE_JOINER = regex.compile(rf"(?!(?<={_LETTER}).(?={_LETTER}))[\u200c\u200d]")
_SAID = regex.compile(r"[\p{S}\p{N}#*@&%\u00a7]")
# Typed for geresh, after a Hebrew letter, and for gershayim, between two.
_HEBREW_MARK = regex.compile(r"(?<=\p{Hebrew})'|(?<=\p{Hebrew})\"(?=\p{Hebrew})")
_HEBREW = {"'": "\u05f3", '"': "\u05f4"}


class TextError(ValueError):
    """A text that cannot be turned into words for certain; ``reason`` is one of a few, to be counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason} ({detail})")
        self.reason = reason


def normalize(text: str, language: str) -> str:
    """Spoken form of a text: NFC, lower case, words of letters and the marks within them, single spaces.

    A number of one or two digits is spelled in the language. What has several readings is refused, not guessed:
    longer numbers, digits beside letters, spoken symbols (#, *, %), notes in brackets.

    Raises:
        TextError: the text has no words, or they cannot be known for certain.
    """
    text = unicodedata.normalize("NFC", text).translate(_APOSTROPHES)
    text = _without_brackets(text)
    text = _NUMBER.sub(lambda match: f" {_spell(match, language)} ", text)
    if is_language(language, "tr", "az"):
        text = text.replace("I", "\u0131").replace("\u0130", "i")  # dotless and dotted i
    text = _HEBREW_MARK.sub(lambda match: _HEBREW[match[0]], _NEVER_HEARD.sub("", text))
    if symbol := _SAID.search(text):
        raise TextError("spoken symbol", f"'{symbol[0]}'")
    words = _BETWEEN_WORDS.sub(" ", _LOOSE_JOINER.sub("", text)).lower().split()
    if not words:
        raise TextError("no words", f"'{text.strip()}'")
    return " ".join(words)


def as_written(text: str) -> str:
    """The text with its case and punctuation, NFC and single spaces.

    Raises:
        TextError: empty, or nothing but a note in brackets.
    """
    text = " ".join(unicodedata.normalize("NFC", text).replace("\ufeff", "").split())
    if not any(character.isalnum() for character in _BRACKETED.sub("", text)):
        raise TextError("non-speech" if text else "no words", f"'{text}'")
    return text


def _without_brackets(text: str) -> str:
    """Drop brackets that hold no word ("dot [.]"); refuse the others: they may be said, or be a note."""
    for group in _BRACKETED.findall(text):
        if any(character.isalnum() for character in group):
            whole = text.strip().rstrip(".") == group
            raise TextError("non-speech" if whole else "note in brackets", group)
    return _BRACKETED.sub(" ", text)


def _spell(number: re.Match[str], language: str) -> str:
    digits, text = number[0], number.string
    before, after = text[: number.start()][-2:], text[number.end() :][:2]
    glued = re.search(r"\w[-.]?$|[-\u2010\u2011\u2013\ufe63\uff0d]$", before) or re.match(
        r"[-.,:/]?\d|-?[^\W\d]", after
    )
    if len(digits) > 2 or (len(digits) == 2 and digits[0] == "0") or glued:
        raise TextError("number with several readings", f"'{digits}'")
    return _number_words(int(digits), language)


@cache
def _number_words(number: int, language: str) -> str:
    from num2words import num2words

    for name in language_names(language):
        try:
            return str(num2words(number, lang=name))
        except (NotImplementedError, KeyError):
            continue
    known = f"language {language}" if language else "the language is not given"
    raise TextError("number that cannot be spelled", f"{number}, {known}")


def sentence_key(text: str) -> str:
    """What makes two texts the same sentence: its words, without case and punctuation."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFC", text).lower()))


def split_of(text: str, dev: float = 0.1, test: float = 0.1) -> str:
    """The split a sentence belongs to, by the SHA-256 of its key: the same on every machine and for every speaker."""
    digest = hashlib.sha256(sentence_key(text).encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < test:
        return "test"
    return "dev" if share < test + dev else "train"
