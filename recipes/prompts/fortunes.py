"""English sentences for espeak-ng to read: Debian's `fortunes` package, one sentence of 3 to 12 words a line.

python fortunes.py --out data/fortunes.txt
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from asrkit.data.debian import fetch_packages, members_of
from asrkit.data.text import TextError, normalise
from asrkit.run_dir import atomic_write


def sentences(raw: str) -> list[str]:
    """Normalised sentences of running text; those with numbers too long to spell and the like are left out."""
    found = []
    for part in re.split(r'[.!?;:%"()\[\]]|--|\n\s*\n', raw):
        try:
            text = normalise(" ".join(part.split()), "en")
        except TextError:
            continue
        if 3 <= len(text.split()) <= 12 and re.fullmatch(r"[a-z' ]+", text):
            found.append(text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("data/cache"))
    arguments = parser.parse_args()
    (package,) = fetch_packages(["fortunes"], arguments.cache)
    lines = {
        sentence: None
        for name, content in sorted(members_of(package))
        if "/games/fortunes/" in name and not name.endswith((".dat", ".u8")) and "ascii-art" not in name
        for sentence in sentences(content.decode("utf-8", errors="ignore"))
    }
    with atomic_write(arguments.out) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))
    print(f"{len(lines)} sentences in {arguments.out}")


if __name__ == "__main__":
    main()
