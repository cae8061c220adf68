"""Some minutes of a manifest: utterances that are spread evenly over it, so that each of its parts gives its share.

python subset.py data/train.jsonl.gz --minutes 60 --out data/labeled/60.jsonl.gz
"""

from __future__ import annotations

import argparse
from pathlib import Path

from asrkit.data.manifests import open_cuts, write_cuts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cuts = list(open_cuts(arguments.manifest))
    share = min(1.0, 60 * arguments.minutes / sum(cut.duration for cut in cuts))
    subset = [cut for index, cut in enumerate(cuts) if int((index + 1) * share) > int(index * share)]
    write_cuts(arguments.out, subset)
    print(
        f"{len(subset)} of {len(cuts)} utterances, {sum(cut.duration for cut in subset) / 60:.1f} min, in {arguments.out}"
    )


if __name__ == "__main__":
    main()
