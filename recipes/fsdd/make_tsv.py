"""Write the TSV that ``asrkit data import`` reads, for one split of the Free Spoken Digit Dataset.

The corpus is a folder of ``{digit}_{speaker}_{index}.wav``, or a TSV with the columns id, which is
``{speaker}_{digit}_{index}``, and path, relative to the TSV's folder or the folder above.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLIT_OF_SPEAKER = {
    "jackson": "train",
    "nicolas": "train",
    "theo": "train",
    "george": "dev",
    "lucas": "test",
    "yweweler": "test",
}


def split_of(split: str, speaker: str, index: int) -> str:
    """The set a recording belongs to: train, dev or test."""
    if split == "speakers":
        return SPLIT_OF_SPEAKER[speaker]
    # The corpus's own rule names only the test set; dev is our choice, so that weights are not chosen on the test set.
    return "test" if index < 5 else "dev" if index < 7 else "train"


def from_folder(recordings: Path) -> Iterator[tuple[int, str, int, Path]]:
    """(digit, speaker, index, path) of each wav file."""
    for path in sorted(recordings.glob("*_*_*.wav")):
        digit, speaker, index = path.stem.split("_")
        yield int(digit), speaker, int(index), path.resolve()


def from_tsv(tsv: Path) -> Iterator[tuple[int, str, int, Path]]:
    """The same, from a TSV."""
    with open(tsv, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            speaker, digit, index = row["id"].split("_")
            candidates = (tsv.parent / row["path"], tsv.parent.parent / row["path"])
            path = next((path for path in candidates if path.exists()), candidates[0])
            yield int(digit), speaker, int(index), path.resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recordings", type=Path, help="the corpus's folder recordings/")
    source.add_argument("--tsv", type=Path, help="a TSV with the columns id and path")
    parser.add_argument("--split", choices=("own", "speakers"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.recordings is not None:
        recordings = list(from_folder(arguments.recordings))
    else:
        recordings = list(from_tsv(arguments.tsv))
    known = [recording for recording in recordings if recording[1] in SPLIT_OF_SPEAKER]
    if not known:
        source = arguments.recordings or arguments.tsv
        sys.exit(
            f"error: {source}: no recordings of the six speakers; pass the corpus's folder recordings/, or a TSV of it"
        )
    lines = ["id\tpath\tsplit\tlang\tspeaker\ttext"]
    for digit, speaker, index, path in known:
        part = split_of(arguments.split, speaker, index)
        lines.append(f"{speaker}_{digit}_{index}\t{path}\t{part}\ten\t{speaker}\t{DIGITS[digit]}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.out.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(arguments.out)


if __name__ == "__main__":
    main()
