"""What tests of encoders share: contexts, weights that are all their own, and frames compared."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from asrkit.nn.context import Context

contexts = st.builds(Context, st.integers(1, 5), st.integers(0, 7))


def randomize(module: nn.Module, seed: int) -> None:
    """Draw every parameter and statistic anew: gains and biases too, so that none can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if tensor.ndim > 1:
                tensor.copy_(noise * 1.2 / math.sqrt(tensor[0].numel()))
            elif name.endswith("mean"):
                tensor.copy_(noise - 6)
            elif name.endswith("std"):
                tensor.copy_(3 + noise.abs())
            else:  # gains of norms about 1, biases about 0
                tensor.copy_(0.4 * noise + float(tensor.mean().round()))


def assert_same_frames(one: Tensor, other: Tensor, lens: Tensor) -> None:
    """Equal on every utterance's own frames (up to the float32 of rotations)."""
    assert one.shape == other.shape
    for row, length in enumerate(lens.tolist()):
        torch.testing.assert_close(one[row, :length], other[row, :length], rtol=1e-4, atol=1e-4)
