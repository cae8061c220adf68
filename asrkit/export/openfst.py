"""Decoding graphs as OpenFst files, which sherpa-onnx searches CTC over."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from asrkit.extras import require
from asrkit.models.ctc_graph import END, CtcGraph

GRAPH_FST = "ctc-graph.fst"


def write_openfst(path: Path, graph: CtcGraph, scale: float) -> None:
    """Write a graph as a const FST with tropical weights.

    The client takes an input label less one for the token, as 0 means no frame, and reads the tokens from them; it makes nothing of
    output labels, which are 0. Weights are costs: -``scale`` times the graph's scores.
    """
    kaldifst = require("kaldifst", for_="export --graph")
    source, target, label = graph.arcs.numpy().T
    costs = -scale * graph.scores.numpy().astype(np.float64)
    inner = label != END
    best = np.full(graph.num_states, np.inf)
    np.minimum.at(best, source[~inner], costs[~inner])
    arcs = zip(source[inner], target[inner], label[inner] + 1, costs[inner], strict=True)
    lines = [f"{state} {to} {token} 0 {cost:.7g}" for state, to, token, cost in arcs]
    lines += [f"{state} {best[state]:.7g}" for state in np.flatnonzero(np.isfinite(best))]
    fst = kaldifst.compile("\n".join(lines) + "\n", acceptor=False)
    if not kaldifst.StdConstFst(fst).write(str(path)):
        raise OSError(f"cannot write {path}")
