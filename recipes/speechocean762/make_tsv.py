"""Write the TSV that ``asrkit data import`` reads, from a checkout of speechocean762.

The corpus is two Kaldi data folders, train/ and test/, with wav.scp (paths relative to the checkout),
text and utt2spk.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def table(file: Path) -> dict[str, str]:
    """A Kaldi table: the first word of each line, and the rest."""
    pairs = (line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return {pair[0]: pair[1].strip() if len(pair) > 1 else "" for pair in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("corpus", type=Path, help="the checkout, holding train/, test/ and WAVE/")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = ["id\tpath\tsplit\tlang\tspeaker\ttext"]
    for part in ("train", "test"):
        folder = arguments.corpus / part
        missing = [name for name in ("wav.scp", "text", "utt2spk") if not (folder / name).is_file()]
        if missing:
            sys.exit(f"error: {folder}: no {', '.join(missing)}; pass the folder of a speechocean762 checkout")
        paths, texts, speakers = (table(folder / name) for name in ("wav.scp", "text", "utt2spk"))
        dev = set(sorted(set(speakers.values()))[::10]) if part == "train" else set()
        for utterance, path in sorted(paths.items()):
            speaker = speakers[utterance]
            split = "dev" if speaker in dev else part
            audio = (arguments.corpus / path).resolve()
            lines.append(f"{utterance}\t{audio}\t{split}\ten\t{speaker}\t{texts[utterance].lower()}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.out.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(arguments.out)


if __name__ == "__main__":
    main()
