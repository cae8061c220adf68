"""Language models over units of speech: what comes next, given all that came before.

Shapes: B sequences, N symbols, V vocabulary (with 0, which begins and ends every sequence), D model dim.
Source: the LSTM of arXiv 2110.10429 (an embedding and 4 LSTM layers); the Transformer is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asrkit.models.spec import LmShape, LmSpec
from asrkit.nn.conformer import FeedForward, LayerNorm
from asrkit.nn.dropout import Dropout
from asrkit.nn.submodels import Attention

LmState = tuple[Tensor, ...]
END = 0  # what every sequence begins and ends with: the tokenizer's blank, which is no unit


class LanguageModel(nn.Module):
    """An embedding, LSTM or causal Transformer layers, and a projection to the vocabulary."""

    def __init__(self, spec: LmSpec) -> None:
        super().__init__()
        self.spec = spec
        shape = spec.shape
        self.embedding = nn.Embedding(spec.vocab_size, shape.dim)
        self.dropout = Dropout(shape.dropout)
        between = shape.dropout if shape.num_layers > 1 else 0.0
        self.layers: nn.Module = (
            nn.LSTM(shape.dim, shape.dim, shape.num_layers, batch_first=True, dropout=between)
            if shape.architecture == "lstm"
            else nn.ModuleList(_Block(shape) for _ in range(shape.num_layers))
        )
        self.out = nn.Linear(shape.dim, spec.vocab_size)

    def forward(self, symbols: Tensor) -> Tensor:
        """(B, N) int64 -> logits (B, N + 1, V) of each next symbol: at n, given the first n; at the last, of the end.

        Padding after a sequence's end changes nothing before it.
        """
        start = symbols.new_full((symbols.shape[0], 1), END)  # len() would be a constant of an exported graph
        x = self.dropout(self.embedding(torch.cat([start, symbols], dim=1)))
        if isinstance(self.layers, nn.LSTM):
            x, _ = self.layers(x)
        else:
            positions = torch.arange(x.shape[1], device=x.device)
            seen = (positions <= positions.unsqueeze(1)).unsqueeze(0)
            assert isinstance(self.layers, nn.ModuleList)
            for block in self.layers:
                x = block(x, seen)
        return self.out(self.dropout(x)).float()

    def start(self, rows: int) -> LmState:
        """What ``step`` remembers of ``rows`` sequences before the ``END`` that begins them."""
        shape, new = self.spec.shape, self.out.weight.new_zeros
        if isinstance(self.layers, nn.LSTM):
            return new(rows, shape.num_layers, shape.dim), new(rows, shape.num_layers, shape.dim)
        empty = new(rows, shape.num_layers, 0, shape.dim)
        return torch.zeros(rows, dtype=torch.int64, device=empty.device), empty, empty

    def step(self, symbols: Tensor, state: LmState) -> tuple[Tensor, LmState]:
        """One symbol (N,) more to logits (N, V) of the next one, those of ``forward``, and the state after it.

        A state's tensors have the N sequences first: h and c (N, layers, D) of an LSTM; of a Transformer how many symbols there
        were (N,), and keys and values (N, layers, S, D), at the end of S those of the last symbol.
        """
        x = self.embedding(symbols).unsqueeze(1)
        if isinstance(self.layers, nn.LSTM):
            x, (h, c) = self.layers(x, (state[0].transpose(0, 1).contiguous(), state[1].transpose(0, 1).contiguous()))
            return self.out(x.squeeze(1)).float(), (h.transpose(0, 1), c.transpose(0, 1))
        lens, keys, values = state
        assert isinstance(self.layers, nn.ModuleList)
        longest = int(lens.max()) if len(lens) else 0
        keys, values = (part[:, :, part.shape[2] - longest :] for part in (keys, values))
        size = longest + 1
        seen = (torch.arange(size, device=x.device) >= size - 1 - lens.unsqueeze(1)).unsqueeze(1)
        later = []
        for number, block in enumerate(self.layers):
            assert isinstance(block, _Block)
            added, after = block.attention(x, seen, history=(keys[:, number], values[:, number]))
            x = x + added
            x = block.norm(x + block.feedforward(x))
            later.append(after)
        state = (
            lens + 1,
            torch.stack([key for key, _ in later], dim=1),
            torch.stack([value for _, value in later], dim=1),
        )
        return self.out(x.squeeze(1)).float(), state


class _Block(nn.Module):
    """Attention to what came before, then a feed-forward module four times as wide; each is added to its input."""

    def __init__(self, shape: LmShape) -> None:
        super().__init__()
        self.attention = Attention(shape.dim, shape.dim, shape.heads, shape.dropout)
        self.feedforward = FeedForward(shape.dim, 4 * shape.dim, shape.dropout)
        self.norm = LayerNorm(shape.dim)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attention(x, seen)[0]
        return self.norm(x + self.feedforward(x))
