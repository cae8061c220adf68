"""The mean distillation weights that a run has logged, as points of a piecewise schedule: each holds for the steps it is the mean of.

A schedule's weights never rise, so where logged means do by chance, the nearest ones that do not are taken (isotonic regression).

python weights.py exp/half-adaptive
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scipy.optimize import isotonic_regression


def points(run: Path) -> list[list[float]]:
    """[first step, weight] pairs, the step counted from 0."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [(line["step"], line["kd_weight"]) for line in lines if "kd_weight" in line]
    if not logged:
        sys.exit(f"{run}: has logged no weights; give a run of distill with an adaptive weight")
    firsts = [0, *(step for step, _ in logged[:-1])]
    falling = isotonic_regression([weight for _, weight in logged], increasing=False).x
    return [[first, round(float(weight), 4)] for first, weight in zip(firsts, falling, strict=True)]


if __name__ == "__main__":
    print(json.dumps(points(Path(sys.argv[1]))))
