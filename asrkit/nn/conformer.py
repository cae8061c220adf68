"""The blocks of the convolutional backbone. Shapes: B batch, T frames, D model dim, K kernel taps.

Sources: Conformer (Gulati et al. 2020, arXiv 2005.08100); the backbone leaves its attention out
(US20240185839A1), LayerNorm replaces its BatchNorm so that a frame's result never depends on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 whatever autocast made of its input (torch 1.13 on CPUs does not mix dtypes)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Subsampling(nn.Module):
    """Two 3x3 convolutions of stride 2 and a projection: a quarter of the frames, 7 frames seen by each.

    No padding in time, so that a streaming encoder computes the same from a window of 4 c + 3 frames.

    Args:
        num_mel_bins: features per frame, F.
        channels: of the first and second convolution.
        dim: D of the output.
    """

    def __init__(self, num_mel_bins: int, channels: tuple[int, int], dim: int) -> None:
        super().__init__()
        first, second = channels
        self.conv1 = nn.Conv2d(1, first, kernel_size=3, stride=2, padding=(0, 1))
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, stride=2, padding=(0, 1))
        self.out = nn.Linear(second * ((num_mel_bins + 3) // 4), dim)
        self.norm = LayerNorm(dim)

    def forward(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F), (B,) -> (B, (T-3)//4, D), (B,)."""
        x = F.relu(self.conv1(features.unsqueeze(1)))
        x = F.relu(self.conv2(x))
        x = self.out(x.transpose(1, 2).flatten(2))
        return self.norm(x), subsampled_lens(feature_lens)


def subsampled_lens(feature_lens: Tensor) -> Tensor:
    """Encoder frames from feature frames: (T - 3) // 4, never below 0."""
    return torch.div(feature_lens - 3, 4, rounding_mode="floor").clamp(min=0)


class FeedForward(nn.Module):
    """LayerNorm, widen, SiLU, narrow: (B, T, D) -> (B, T, D), to be added to its input."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.widen = nn.Linear(dim, hidden_dim)
        self.narrow = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # Dropping the wide layer too would make random numbers a quarter of a CPU's training time.
        return self.dropout(self.narrow(F.silu(self.widen(self.norm(x)))))


class DepthwiseConv(nn.Module):
    """One filter of K taps for each channel along time, centred: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError("kernel_size must be odd")
        self.weight = nn.Parameter(torch.empty(dim, kernel_size))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.uniform_(self.weight, -(kernel_size**-0.5), kernel_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        # As a 2-D convolution of height 1: three times faster than conv1d on CPUs, the same numbers.
        dim, taps = self.weight.shape
        y = F.conv2d(
            x.transpose(1, 2).unsqueeze(2),
            self.weight[:, None, None, :],
            self.bias,
            padding=(0, taps // 2),
            groups=dim,
        )
        return y.squeeze(2).transpose(1, 2)


class ConvModule(nn.Module):
    """LayerNorm, gated pointwise, depthwise over time, norm, SiLU, pointwise: to be added to its input."""

    def __init__(self, dim: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise = DepthwiseConv(dim, kernel_size)
        self.depthwise_norm = LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """``padding`` (B, T, 1) is True beyond each utterance's end, where the filter must see zeros."""
        x = F.glu(self.gate(self.norm(x)), dim=-1).masked_fill(padding, 0.0)
        x = F.silu(self.depthwise_norm(self.depthwise(x)))
        return self.dropout(self.out(x))


class BackboneBlock(nn.Module):
    """Half feed-forward, convolution, half feed-forward, norm.

    x' = x + 1/2 FFN1(x); x'' = x' + Conv(x'); out = LN(x'' + 1/2 FFN2(x'')).
    Sub-models attach between x' and Conv, where a Conformer keeps its attention.
    """

    def __init__(self, dim: int, feedforward_dim: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.feedforward1 = FeedForward(dim, feedforward_dim, dropout)
        self.conv = ConvModule(dim, kernel_size, dropout)
        self.feedforward2 = FeedForward(dim, feedforward_dim, dropout)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = x + 0.5 * self.feedforward1(x)
        x = x + self.conv(x, padding)
        return self.norm(x + 0.5 * self.feedforward2(x))
