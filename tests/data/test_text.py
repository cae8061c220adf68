"""Texts as they are spoken, and the split they fall into."""

from __future__ import annotations

from collections import Counter

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from asrkit.data.text.languages import is_language, language_names
from asrkit.data.text.normalization import TextError, as_written, normalize, sentence_key, split_of


@pytest.mark.parametrize(
    ("language", "written", "spoken"),
    [
        ("en", "Don't STOP, it's 5 o'clock.", "don't stop it's five o'clock"),
        ("en", "Press 42; then hang-up…", "press forty two then hang up"),
        ("en", "rock 'n' roll", "rock n roll"),
        ("en", "dot [.]", "dot"),
        ("fr", "Entrez le nume\u0301ro d\u2019agent suivi du 7.", "entrez le numéro d'agent suivi du sept"),
        ("es", "Marque 1 para", "marque uno para"),
        ("it", "premere 2: così", "premere due così"),
        ("ru", "Нажмите 4, «Ёж»", "нажмите четыре ёж"),
        ("en-US", "9 lives", "nine lives"),
        ("tr", "ISPARTA İYİ", "ısparta iyi"),
        ("hi", "नमस्ते।", "नमस्ते"),
        ("en", "\ufeffsoft\u00adhyphen", "softhyphen"),
        ("ca", "Col·legi, il·lusió·", "col·legi il·lusió"),
        ("ca", "col\u2027legi", "col\u2027legi"),
        ("he", "צ׳יפס", "צ׳יפס"),
        ("he", "צ'יפס רח'", "צ׳יפס רח׳"),
        ("he", 'צה"ל אמר: "שלום"', "צה״ל אמר שלום"),
        ("sv", "k:a USA:s slut: ja", "k:a usa:s slut ja"),
        ("si", "ශ්‍රී", "ශ්‍රී"),
        ("fa", "می‌خواهم\u200c \u200dاو", "می‌خواهم او"),
        ("en", "end.Next (,)", "end next"),
        ("tr_TR", "IĞDIR", "ığdır"),
        ("tur", "IĞDIR", "ığdır"),
        ("TR-tr", "Iİ", "ıi"),
        ("azj", "I", "ı"),
        ("de_CH.utf8", "I", "i"),
        ("tgk", "I", "i"),
        ("eng", "2", "two"),
        ("fr_BE", "70 septante", "septante septante"),
        ("nob", "2", "to"),
    ],
)
def test_spoken_form(language, written, spoken):
    assert normalize(written, language) == spoken


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("[beep]", "non-speech"),
        (" (10 seconds of silence). ", "non-speech"),
        ("<beep ascending>", "non-speech"),
        ("IAX (note: does not say two)", "note in brackets"),
        ("press # now", "spoken symbol"),
        ("90% of it", "spoken symbol"),
        ("in 1984", "number with several readings"),
        ("3D audio", "number with several readings"),
        ("H.323", "number with several readings"),
        ("at 5:30", "number with several readings"),
        ("28.8 kilobit", "number with several readings"),
        ("agent 07", "number with several readings"),
        ("-5", "number with several readings"),
        ("it is -5 outside", "number with several readings"),
        ("\uff0d5", "number with several readings"),
        ("(-5", "number with several readings"),
        ("...", "no words"),
        ("", "no words"),
    ],
)
def test_what_is_not_certain_is_refused_with_a_reason(written, reason):
    with pytest.raises(TextError) as error:
        normalize(written, "en")
    assert error.value.reason == reason


def test_names_of_a_language():
    assert language_names("") == ()
    assert language_names("tr_TR") == ("tr_TR", "tr-TR", "tr")
    assert language_names("tur") == ("tur", "tr") and language_names("azj") == ("azj", "az")
    assert language_names("sr-latn-rs") == ("sr-latn-rs", "sr_Latn_RS", "sr-Latn-RS", "sr")
    assert language_names("English") == ("English", "english") and language_names("de_CH.utf8")[0] == "de_CH.utf8"
    assert is_language("ota-TR", "tr") is False and is_language("TR", "tr") and not is_language("", "tr")


@pytest.mark.parametrize("language", ["", "xx"])
def test_numbers_need_a_language_that_can_be_spelled(language):
    assert normalize("no number", language) == "no number"
    with pytest.raises(TextError, match="cannot be spelled"):
        normalize("press 1", language)


@given(st.text(max_size=60), st.sampled_from(["en", "fr", "ru", "tr"]))
def test_normalizing_twice_changes_nothing(text, language):
    try:
        once = normalize(text, language)
    except TextError:
        return
    assert normalize(once, language) == once == " ".join(once.split())
    assert regex.fullmatch(r"(?:[\p{L}\p{M}]|(?<=\w)(?:[\p{WB=MidLetter}'\u05f3\u200c\u200d]| (?=\w)))*", once)


def test_raw_text_keeps_case_and_punctuation():
    assert as_written("  Hello,\n World! 1984 ") == "Hello, World! 1984"
    for nothing in ("", "?!", "[beep]"):
        with pytest.raises(TextError):
            as_written(nothing)


def test_a_sentence_falls_into_one_split_however_it_is_written():
    for number in range(200):
        text = f"sentence number {number}"
        assert split_of(text) == split_of(f"  Sentence number {number}!")
    assert sentence_key("Thank you.") == sentence_key("thank  you")


def test_shares_of_the_splits():
    counts = Counter(split_of(f"sentence {number}", dev=0.2, test=0.3) for number in range(4000))
    assert counts["test"] / 4000 == pytest.approx(0.3, abs=0.03)
    assert counts["dev"] / 4000 == pytest.approx(0.2, abs=0.03)
    assert split_of("thank you") == "train"  # a fixed point: published splits must not move
