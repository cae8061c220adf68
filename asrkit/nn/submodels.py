"""What a sub-model adds to a layer of the backbone: attention, or a feed-forward adapter. Each is added to its input.

Shapes: B batch, T frames, S frames seen (a cache's and the T), D model dim, A attention dim, H heads.
Sources: attention sub-models on a convolutional backbone (US20240185839A1); the module itself is the Conformer's
(arXiv 2005.08100) with rotary relative positions (Su et al. 2021, arXiv 2104.09864; our choice, as the patent leaves the
position encoding open); adapters (Houlsby et al. 2019, arXiv 1902.00751; Bapna and Firat 2019, arXiv 1909.08478).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asrkit.nn.conformer import LayerNorm
from asrkit.nn.dropout import Dropout


class Attention(nn.Module):
    """LayerNorm, multi-head self-attention with relative positions, projection: to be added to its input.

    Args:
        dim: D.
        attention_dim: A of queries, keys and values, shared out over ``heads``; A / heads must be even.
        per_mode_norm: a second LayerNorm for streaming.
    """

    def __init__(self, dim: int, attention_dim: int, heads: int, dropout: float, per_mode_norm: bool = False) -> None:
        super().__init__()
        if attention_dim % (2 * heads):
            raise ValueError("attention_dim / heads must be an even whole number")
        self.heads, self.attention_dim = heads, attention_dim
        self.norm = LayerNorm(dim, per_mode=per_mode_norm)
        self.query = nn.Linear(dim, attention_dim)
        self.key = nn.Linear(dim, attention_dim)
        self.value = nn.Linear(dim, attention_dim)
        self.out = nn.Linear(attention_dim, dim)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, seen: Tensor, streaming: bool = False, history: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, T, D), seen bool (B or 1, T, S), history keys and values (B, S - T, A) before x.

        Returns:
            (B, T, D), and keys and values (B, S, A) for the next step's history.
        """
        x = self.norm(x, streaming)
        query, keys, values = self.query(x), self.key(x), self.value(x)
        if history is not None:
            keys, values = torch.cat([history[0], keys], dim=1), torch.cat([history[1], values], dim=1)
        # Positions count from the first frame seen: only differences matter to a rotation.
        turns = rotations(keys.shape[1], self.attention_dim // self.heads, x.device)
        q = rotate(self._split(query), turns[-query.shape[1] :])
        attended = attend(q, rotate(self._split(keys), turns), self._split(values).to(q.dtype), seen.unsqueeze(1))
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2))), (keys, values)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, A) -> (B, H, T, A / H)."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)  # torch 1.13 cannot export unflatten

    def silence(self) -> None:
        """Make the module add nothing: its output projection is zeroed."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)


class Adapter(nn.Module):
    """LayerNorm, a bottleneck with SiLU, back to D: to be added to its input. Every frame by itself."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float, per_mode_norm: bool = False) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, per_mode=per_mode_norm)
        self.narrow = nn.Linear(dim, hidden_dim)
        self.widen = nn.Linear(hidden_dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, streaming: bool = False) -> Tensor:
        return self.dropout(self.widen(F.silu(self.narrow(self.norm(x, streaming)))))

    def silence(self) -> None:
        """Make the module add nothing: its output projection is zeroed."""
        nn.init.zeros_(self.widen.weight)
        nn.init.zeros_(self.widen.bias)


def rotations(length: int, head_dim: int, device: torch.device) -> Tensor:
    """Angles (length, head_dim / 2) of positions 0, 1, ...: one frequency for each pair of channels."""
    exponents = -torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequency = torch.pow(10000.0, exponents)  # ** of a number copies it to the device in torch 1.13, and waits
    return torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of channels (the first half's with the second half's) of x (B, H, T, A / H) by its angle, in float32.

    The product of a rotated query and key then depends on the distance of their frames alone.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


def attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Scaled dot-product attention: query (B, H, T, E), keys and values (B, H, S, E), seen bool (B or 1, 1, T, S)."""
    if hasattr(F, "scaled_dot_product_attention"):  # torch >= 2
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
    scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = scores.float().masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return weights.to(values.dtype) @ values
