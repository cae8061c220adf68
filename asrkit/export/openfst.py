"""FSTs as OpenFst files for sherpa-onnx: decoding graphs, which it searches CTC over, and n-grams, which it subtracts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from asrkit.extras import require
from asrkit.models.ctc_graph import END, CtcGraph

GRAPH_FST = "ctc-graph.fst"


def write_openfst(
    path: Path, arcs: np.ndarray, costs: np.ndarray, ends: np.ndarray, kind: Literal["const", "vector"]
) -> None:
    """Write an FST with tropical weights; state 0 is the first.

    Args:
        arcs: (A, 4) integers: from, to, input label, output label. costs: (A,).
        ends: (S,) the cost of ending in each state, infinite where it is not final.
        kind: of file: const is searched faster, vector can be changed.

    Raises:
        UserError: there is no kaldifst.
        OSError: the file cannot be written.
    """
    kaldifst = require("kaldifst", for_="export --graph and --lodr")
    # The first line is of the first state. Nine digits tell any two 32-bit numbers apart.
    lines = [f"0 {ends[0]:.9g}"] if np.isfinite(ends[0]) else []
    order = arcs[:, 0].argsort(kind="stable")
    rows = zip(*arcs[order].T.tolist(), costs[order].tolist(), strict=True)
    lines += [f"{source} {target} {label} {out} {cost:.9g}" for source, target, label, out, cost in rows]
    lines += [f"{state} {ends[state]:.9g}" for state in np.flatnonzero(np.isfinite(ends)).tolist() if state]
    fst = kaldifst.compile("\n".join(lines) + "\n", acceptor=False, keep_state_numbering=True)
    if not (kaldifst.StdConstFst(fst) if kind == "const" else fst).write(str(path)):
        raise OSError(f"cannot write {path}")


def write_graph(path: Path, graph: CtcGraph, scale: float) -> None:
    """Write a decoding graph, whose costs are -``scale`` times its scores.

    The client takes an input label less one for the token, as 0 means no frame, and reads the tokens from them; it makes nothing of
    output labels, which are 0.
    """
    source, target, label = graph.arcs.numpy().T
    costs = -scale * graph.scores.numpy().astype(np.float64)
    inner = label != END
    ends = np.full(graph.num_states - 1, np.inf)
    np.minimum.at(ends, source[~inner], costs[~inner])
    arcs = np.stack([source, target, label + 1, np.zeros_like(label)], axis=1)[inner]
    write_openfst(path, arcs, costs[inner], ends, "const")
