"""A traced graph as TorchScript, for libtorch."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from asrkit.export.graphs import Graph


def write_script(graph: Graph, path: Path) -> None:
    """Trace ``graph`` and write it to ``path``; tensors it does not use are left out."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of shapes that are constants on purpose; the parity check tries others
        traced = torch.jit.trace(graph.module.eval(), graph.example, check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.freeze(traced).save(str(path))
