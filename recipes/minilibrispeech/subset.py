"""So many minutes of a manifest, as many of each part of it: utterances spread evenly over its length.

python subset.py data/train.jsonl.gz --minutes 60 --out data/labeled/60.jsonl.gz
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lhotse import CutSet

from asrkit.data.manifests import open_cuts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cuts = list(open_cuts(arguments.manifest))
    share = min(1.0, 60 * arguments.minutes / sum(cut.duration for cut in cuts))
    chosen = [cut for index, cut in enumerate(cuts) if int((index + 1) * share) > int(index * share)]
    partial = arguments.out.with_name(f"new-{arguments.out.name}")  # lhotse goes by the end of the name
    CutSet.from_cuts(chosen).to_file(partial)
    partial.replace(arguments.out)
    print(
        f"{len(chosen)} of {len(cuts)} utterances, {sum(cut.duration for cut in chosen) / 60:.1f} min, in {arguments.out}"
    )


if __name__ == "__main__":
    main()
