"""Sentences for espeak-ng to read: Debian's `fortunes` packages, one sentence of 3 to 12 words a line.

python fortunes.py --lang en --out data/fortunes-en.txt
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from asrkit.data.corpora.debian import fetch_packages, members_of
from asrkit.data.text.normalization import TextError, normalize
from asrkit.disk import atomic_write

# Debian has no package of French fortunes.
PACKAGES = {"en": "fortunes", "es": "fortunes-es", "it": "fortunes-it", "ru": "fortunes-ru"}
LETTERS = {"en": "a-z", "es": "a-záéíñóúü", "it": "a-zàèéìòù", "ru": "а-яё"}
GRAVE = str.maketrans("aeiou", "àèìòù")


def sentences(raw: str, language: str) -> list[str]:
    """Normalized sentences of running text; those that cannot be normalized, such as with long numbers, are left out."""
    usable = []
    if language == "it":  # accents typed as apostrophes: perche', e'
        raw = re.sub(r"([aeiou])'(?!\w)", lambda vowel: vowel[1].translate(GRAVE), raw)
    for part in re.split(r'[.!?¿¡;:%"«»()\[\]]|--|\n\s*\n', raw):
        try:
            text = normalize(" ".join(part.split()), language)
        except TextError:
            continue
        if 3 <= len(text.split()) <= 12 and re.fullmatch(rf"[{LETTERS[language]}' ]+", text):
            usable.append(text)
    return usable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lang", choices=list(PACKAGES), default="en")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("data/cache"))
    arguments = parser.parse_args()
    (package,) = fetch_packages([PACKAGES[arguments.lang]], arguments.cache)
    lines = {
        sentence: None
        for name, content in sorted(members_of(package))
        if "/games/fortunes/" in name and not name.endswith((".dat", ".u8")) and not re.search("ascii-art|/off/", name)
        for sentence in sentences(content.decode("utf-8", errors="ignore"), arguments.lang)
    }
    with atomic_write(arguments.out) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))
    print(f"{len(lines)} sentences in {arguments.out}")


if __name__ == "__main__":
    main()
