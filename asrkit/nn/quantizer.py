"""A product quantizer that is trained through Gumbel noise (arXiv 2006.11477, section 2 and equation 1).

Shapes: ... any, D width of the input, G groups, V entries of a group, C width of the entries of all groups together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantized:
    """vectors (..., C): the chosen entries of all groups, one after the other. codes (..., G) int64: which they are.
    probabilities (..., G, V): the softmax of the logits, without noise and temperature."""

    vectors: Tensor
    codes: Tensor
    probabilities: Tensor


class GumbelQuantizer(nn.Module):
    """Of each group an entry is chosen by argmax; the gradient is that of a softmax (straight-through).

    In training, Gumbel noise is added to the logits l, and the gradient is that of softmax((l + n) / temperature): the logits are
    divided, as in all known code; the paper's equation prints the temperature outside of the exponential. In evaluation there is
    no noise. Entries begin uniform in [0, 1), the weights of the logits normal with deviation 1.
    """

    def __init__(self, dim: int, groups: int, entries: int, code_dim: int) -> None:
        super().__init__()
        self.groups, self.entries = groups, entries
        self.logits = nn.Linear(dim, groups * entries)
        nn.init.normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        self.codebooks = nn.Parameter(torch.rand(groups, entries, code_dim // groups))

    def forward(self, x: Tensor, temperature: float) -> Quantized:
        """(..., D) to a target for each; noise is drawn by torch's generator."""
        logits = self.logits(x).view(*x.shape[:-1], self.groups, self.entries)
        noisy = logits
        if self.training:
            # -log of an exponential number is a Gumbel number. One that is rounded to 0 would be infinite.
            exponential = torch.empty_like(logits).exponential_().clamp_(min=torch.finfo(logits.dtype).tiny)
            noisy = logits - exponential.log()
        codes = noisy.argmax(-1)
        weights = (codes.unsqueeze(-1) == torch.arange(self.entries, device=codes.device)).to(logits.dtype)
        if self.training:
            soft = (noisy / temperature).softmax(-1)
            weights = weights + (soft - soft.detach())  # plus an exact zero
        vectors = torch.einsum("...gv,gvc->...gc", weights, self.codebooks).flatten(-2)
        return Quantized(vectors, codes, logits.softmax(-1))
