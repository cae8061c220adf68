"""Phones of words, in the International Phonetic Alphabet, as espeak-ng pronounces them one by one in a language.

Stress and ties between sounds are left out, length is kept. A word's phones do not depend on its neighbors (our choice, so that
those of a text and of an alignment agree), which leaves out French liaison.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cache

from asrkit.data.espeak import UTF8, load_espeak
from asrkit.data.text.languages import language_names
from asrkit.errors import UserError

VOICES = {"en": "en-us"}  # en alone is British
_IPA, _SEPARATOR = 2, "_"
_NO_PHONE = re.compile(r"\([^)]*\)|[ˈˌ\-;]")  # a change of language, stress, marks of liaison


def phones_of(text: str, language: str) -> list[list[str]]:
    """The phones of each word of ``text``.

    Raises:
        UserError: espeak-ng is not installed, has no such language, or has nothing to say for a word.
    """
    return [list(_phones_of_word(word, language)) for word in text.split()]


@cache
def _phones_of_word(word: str, language: str) -> Sequence[str]:
    library = _use(language)
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    library.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int]
    text = ctypes.create_string_buffer(word.encode())
    rest = ctypes.c_void_p(ctypes.addressof(text))
    clauses = []
    while rest.value:  # a clause a call; the pointer is moved on, to null at the end
        phones = library.espeak_TextToPhonemes(ctypes.byref(rest), UTF8, _IPA | ord(_SEPARATOR) << 8)
        clauses.append((phones or b"").decode())
    phones = tuple(filter(None, re.split(f"[{_SEPARATOR} ]", _NO_PHONE.sub("", " ".join(clauses)))))
    if not phones:
        raise UserError(f"word {word!r}: espeak-ng says nothing for it in language {language}; fix the text")
    return phones


def check_language(language: str) -> None:
    """Raise the ``UserError`` that every word of ``language`` would raise, if any."""
    _use(language)


def _use(language: str) -> ctypes.CDLL:
    library, _, _ = load_espeak()
    for name in language_names(language):
        if library.espeak_SetVoiceByName(VOICES.get(name, name).encode()) == 0:
            return library
    raise UserError(
        f"language {language or '(none)'}: espeak-ng has no voice of that name; give one it has, such as en, fr, it"
    )
