"""The blocks of the convolutional backbone. Shapes: B batch, T frames, D model dim, K kernel taps.

Sources: Conformer (Gulati et al. 2020, arXiv 2005.08100); the backbone leaves its attention out
(US20240185839A1), LayerNorm replaces its BatchNorm so that a frame's result never depends on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asrkit.frames import LOOK_AHEAD, SUBSAMPLING
from asrkit.nn.dropout import Dropout

Branch = Callable[[Tensor], Tensor]


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 whatever autocast made of its input (torch 1.13 on CPUs does not mix dtypes).

    With ``per_mode`` it has a second gain and bias, for streaming (dual-mode ASR, arXiv 2010.06030, section 3).
    """

    def __init__(self, dim: int, per_mode: bool = False) -> None:
        super().__init__(dim)
        self.streaming = LayerNorm(dim) if per_mode else None

    def forward(self, x: Tensor, streaming: bool = False) -> Tensor:
        if streaming and self.streaming is not None:
            return self.streaming(x)
        return super().forward(x.to(self.weight.dtype))


class Subsampling(nn.Module):
    """Two 3x3 convolutions of stride 2 and a projection: a quarter of the frames, 7 frames seen by each.

    No padding in time, so that a streaming encoder computes the same from a window of 4 c + 3 frames.

    Args:
        num_mel_bins: features per frame, F.
        channels: of the first and second convolution.
        dim: D of the output.
    """

    def __init__(self, num_mel_bins: int, channels: tuple[int, int], dim: int, per_mode_norm: bool = False) -> None:
        super().__init__()
        first, second = channels
        self.conv1 = nn.Conv2d(1, first, kernel_size=3, stride=2, padding=(0, 1))
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, stride=2, padding=(0, 1))
        self.out = nn.Linear(second * ((num_mel_bins + 3) // 4), dim)
        self.norm = LayerNorm(dim, per_mode_norm)

    def forward(self, features: Tensor, feature_lens: Tensor, streaming: bool = False) -> tuple[Tensor, Tensor]:
        """(B, T, F), (B,) -> (B, (T-3)//4, D), (B,)."""
        x = F.relu(self.conv1(features.unsqueeze(1)))
        x = F.relu(self.conv2(x))
        x = self.out(x.transpose(1, 2).flatten(2))
        return self.norm(x, streaming), subsampled_lens(feature_lens)


def subsampled_lens(feature_lens: Tensor) -> Tensor:
    """Encoder frames from feature frames: (T - 3) // 4, never below 0."""
    return torch.div(feature_lens - LOOK_AHEAD, SUBSAMPLING, rounding_mode="floor").clamp(min=0)


class FeedForward(nn.Module):
    """LayerNorm, widen, SiLU, narrow: (B, T, D) -> (B, T, D), to be added to its input."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float, per_mode_norm: bool = False) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, per_mode_norm)
        self.widen = nn.Linear(dim, hidden_dim)
        self.narrow = nn.Linear(hidden_dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, streaming: bool = False) -> Tensor:
        # Dropping the wide layer too would make random numbers a quarter of a CPU's training time.
        return self.dropout(self.narrow(F.silu(self.widen(self.norm(x, streaming)))))


class DepthwiseConv(nn.Module):
    """One filter of K taps for each channel along time: (B, T, D) -> (B, T, D).

    Centered, or causal: then only the left (K + 1) / 2 taps of the same filter count (arXiv 2010.06030, section 3).
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError("kernel_size must be odd")
        self.weight = nn.Parameter(torch.empty(dim, kernel_size))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.uniform_(self.weight, -(kernel_size**-0.5), kernel_size**-0.5)

    def forward(self, x: Tensor, history: Tensor | None = None) -> Tensor:
        """``history`` (B, K // 2, D), the frames before x, makes it causal."""
        half = self.weight.shape[1] // 2
        if history is None:
            return self._filter(x, self.weight, half)
        return self._filter(torch.cat([history, x], dim=1), self.weight[:, : half + 1], 0)

    def _filter(self, x: Tensor, weight: Tensor, padding: int) -> Tensor:
        # As a 2-D convolution of height 1: three times faster than conv1d on CPUs, the same numbers.
        y = F.conv2d(
            x.transpose(1, 2).unsqueeze(2),
            weight.unsqueeze(1).unsqueeze(1),
            self.bias,
            padding=(0, padding),
            groups=len(weight),
        )
        return y.squeeze(2).transpose(1, 2)


class ConvModule(nn.Module):
    """LayerNorm, gated pointwise, depthwise over time, norm, SiLU, pointwise: to be added to its input."""

    def __init__(self, dim: int, kernel_size: int, dropout: float, per_mode_norm: bool = False) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, per_mode_norm)
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise = DepthwiseConv(dim, kernel_size)
        self.depthwise_norm = LayerNorm(dim, per_mode_norm)
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), and the next step's history.

        ``padding`` (B, T, 1) is True beyond each utterance's end, where the filter must see zeros. ``history``
        (B, K // 2, D), what the filter saw before, makes the module causal and streaming.
        """
        streaming = history is not None
        x = F.glu(self.gate(self.norm(x, streaming)), dim=-1).masked_fill(padding, 0.0)
        y = F.silu(self.depthwise_norm(self.depthwise(x, history), streaming))
        if history is not None:
            history = torch.cat([history, x], dim=1)[:, x.shape[1] :]
        return self.dropout(self.out(y)), history


class BackboneBlock(nn.Module):
    """Half feed-forward, convolution, half feed-forward, norm.

    x' = x + 1/2 FFN1(x); x'' = x' + Conv(x'); out = LN(x'' + 1/2 FFN2(x'')).
    Sub-models attach between x' and Conv, where a Conformer keeps its attention: a serial one is added to x', which
    the convolution then sees; a parallel one is added to the convolution's result.
    """

    def __init__(
        self, dim: int, feedforward_dim: int, kernel_size: int, dropout: float, per_mode_norm: bool = False
    ) -> None:
        super().__init__()
        self.feedforward1 = FeedForward(dim, feedforward_dim, dropout, per_mode_norm)
        self.conv = ConvModule(dim, kernel_size, dropout, per_mode_norm)
        self.feedforward2 = FeedForward(dim, feedforward_dim, dropout, per_mode_norm)
        self.norm = LayerNorm(dim, per_mode_norm)

    def forward(
        self,
        x: Tensor,
        padding: Tensor,
        history: Tensor | None = None,
        serial: Sequence[Branch] = (),
        parallel: Sequence[Branch] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D) and the convolution's next history; ``serial`` and ``parallel`` are sub-models."""
        streaming = history is not None
        x = x + 0.5 * self.feedforward1(x, streaming)
        for branch in serial:
            x = x + branch(x)
        convolved, history = self.conv(x, padding, history)
        for branch in parallel:
            convolved = convolved + branch(x)
        x = x + convolved
        return self.norm(x + 0.5 * self.feedforward2(x, streaming), streaming), history
