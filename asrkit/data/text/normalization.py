"""Texts as they are spoken: lower-case words, no punctuation, numbers spelled out; and the split they fall into."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import cache

SPLITS = ("train", "dev", "test")
# Typographic quotes, the modifier letter, grave and acute accents standing alone: all of them typed for an apostrophe.
_APOSTROPHES = str.maketrans("\u2019\u2018\u02bc\u0060\u00b4", "'" * 5)
_BRACKETED = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>|\{[^}]*\}")
_NUMBER = re.compile(r"\d+")


class TextError(ValueError):
    """A text that cannot be turned into words for certain; ``reason`` is one of a few, to be counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason} ({detail})")
        self.reason = reason


def normalize(text: str, language: str) -> str:
    """Spoken form of a text: NFC, lower case, words of letters with inner apostrophes, single spaces.

    A number of one or two digits is spelled in the language. What has several readings is refused, not guessed:
    longer numbers, digits beside letters, symbols that are said (#, *, %), notes in brackets.

    Raises:
        TextError: nothing is said, or the words cannot be known.
    """
    text = unicodedata.normalize("NFC", text).translate(_APOSTROPHES)
    text = _without_brackets(text)
    text = _NUMBER.sub(lambda found: f" {_spell(found, language)} ", text)
    if language.partition("-")[0].lower() in ("tr", "az"):
        text = text.replace("I", "\u0131").replace("\u0130", "i")  # dotless and dotted i
    words = "".join(_kept(text, i) for i in range(len(text))).lower().split()
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


def _spell(found: re.Match[str], language: str) -> str:
    digits, text = found[0], found.string
    before, after = text[: found.start()][-2:], text[found.end() :][:2]
    glued = re.search(r"\w[-.]?$", before) or re.match(r"[-.,:/]?\d|-?[^\W\d]", after)
    if len(digits) > 2 or (len(digits) == 2 and digits[0] == "0") or glued:
        raise TextError("number with several readings", f"'{digits}'")
    return _number_words(int(digits), language)


@cache
def _number_words(number: int, language: str) -> str:
    from num2words import num2words

    for name in (language.replace("-", "_"), re.split("[-_]", language)[0].lower()) if language else ():
        try:
            return str(num2words(number, lang=name))
        except (NotImplementedError, KeyError):
            continue
    known = f"language {language}" if language else "the language is not given"
    raise TextError("number that cannot be spelled", f"{number}, {known}")


def _kept(text: str, i: int) -> str:
    """The character at ``i`` as it enters the words: itself, nothing, or a space."""
    character, category = text[i], unicodedata.category(text[i])
    if category[0] in "LM":
        return character
    if character == "'" and 0 < i < len(text) - 1 and text[i - 1].isalpha() and text[i + 1].isalpha():
        return character
    if category == "Cf":  # byte order mark, soft hyphen, joiners: never heard
        return ""
    if category[0] in "SN" or character in "#*@&%\u00a7":
        raise TextError("symbol that is said", f"'{character}'")
    return " "


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
