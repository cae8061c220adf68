"""The texts of a manifest in runs of a few words, one a line, for espeak-ng to read.

python clauses.py data/train.jsonl.gz --words 7 --out data/clauses.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

from asrkit.data.manifests import open_cuts, text_of
from asrkit.disk import atomic_write

SHORTEST = 3  # words


def clauses(text: str, words: int) -> list[str]:
    """Runs of ``words`` words from the first word on; a rest of fewer than ``SHORTEST`` is left out."""
    every = text.split()
    runs = [every[start : start + words] for start in range(0, len(every), words)]
    return [" ".join(run) for run in runs if len(run) >= SHORTEST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--words", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = [line for cut in open_cuts(arguments.manifest) for line in clauses(text_of(cut), arguments.words)]
    with atomic_write(arguments.out) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} lines in {arguments.out}")


if __name__ == "__main__":
    main()
