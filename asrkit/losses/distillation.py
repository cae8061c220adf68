"""What one transducer teaches another on a common lattice.

Shapes: B batch, T frames, U symbols, S prune range, V vocabulary with blank 0. Node (t, u): at frame t, u symbols emitted.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from asrkit.losses.transducer import arc_log_probs

Classes = Literal["three", "all"]
_SMALLEST = 1e-7  # of the third class's probability, which rounding may make negative


def node_divergence(
    student: Tensor,
    teacher: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    classes: Classes = "three",
) -> Tensor:
    """Sum over an utterance's kept nodes of KL(teacher || student), (B,), float32 (float64 for such inputs).

    Both logits are (B, T, S, V), at the nodes of the same ``ranges`` (B, T, S); symbols (B, U). The teacher gets no
    gradient. ``three``: of each node the next symbol, the blank and all the rest are compared (Panchapagesan et al. 2020,
    arXiv 2011.06110, equation 7); ``all``: the whole vocabulary. Nodes beyond the utterance's frames or symbols count
    nothing; after the last symbol only the blank and the rest are told apart.
    """
    teacher = teacher.detach()
    if classes == "all":
        expected, found = (_precise(logits).log_softmax(dim=-1) for logits in (teacher, student))
        divergence = (expected.exp() * (expected - found)).sum(dim=-1)
    else:
        last = ranges >= symbol_lens.view(-1, 1, 1)
        expected, found = (_three(logits, symbols, ranges, last) for logits in (teacher, student))
        divergence = (expected * (expected.log() - found.log())).sum(dim=-1)
    frames = torch.arange(student.shape[1], device=student.device).view(1, -1, 1)
    inside = (frames < encoder_out_lens.view(-1, 1, 1)) & (ranges <= symbol_lens.view(-1, 1, 1))
    return divergence.masked_fill(~inside, 0.0).sum(dim=(1, 2))


def _three(logits: Tensor, symbols: Tensor, ranges: Tensor, last: Tensor) -> Tensor:
    """Probabilities (B, T, S, 3) of the next symbol, the blank and the rest; where ``last``, the symbol is of the rest."""
    symbol, blank = (arc.exp() for arc in arc_log_probs(logits, symbols, ranges))
    symbol = symbol.masked_fill(last, 0.0)
    return torch.stack([symbol, blank, 1.0 - symbol - blank], dim=-1).clamp(min=_SMALLEST)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
