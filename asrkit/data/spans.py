"""Spans of frames that are hidden, chosen at random, and the distractors to tell a hidden frame's content from (arXiv 2006.11477).

Shapes: B batch, T' frames, M hidden frames of each row, K distractors. Without any loop over rows or frames.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def spans(starts: Tensor, length: int) -> Tensor:
    """Where spans of ``length`` lie that begin at ``starts``: (B, N) bool -> (B, N) bool. The last may be cut off by the end."""
    begun = starts.to(torch.int32).cumsum(1)
    ended = torch.zeros_like(begun)
    ended[:, length:] = begun[:, :-length]
    return begun > ended


def hidden_frames(lens: np.ndarray, probability: float, length: int, random: np.random.Generator) -> Tensor:
    """The frames to hide of each row, ascending: (B,) -> (B, M) int64, the same number in each.

    Of a row of T' frames, ``probability`` * T' (rounded up or down at random, at least 1) are the first ones of spans of ``length``;
    spans may overlap and lie within the row. Rows with more hidden frames than the one with the fewest show some again, chosen at
    random, as the reference code does.

    Args:
        lens: at least 2 frames each.
    """
    if lens.min() < 2 or length < 2:
        raise ValueError("a row needs two hidden frames, one to tell from the other")
    shape, frames = (len(lens), int(lens.max())), np.arange(lens.max())
    places = np.maximum(lens - length + 1, 1)  # where a span can begin
    count = np.clip(np.floor(probability * lens + random.random(len(lens))), 1, places).astype(np.int64)
    order = np.where(frames < places[:, None], random.random(shape), 2.0).argsort(1, kind="stable")
    starts = np.zeros(shape, dtype=bool)
    np.put_along_axis(starts, order, frames < count[:, None], axis=1)
    hidden = spans(torch.from_numpy(starts), length).numpy() & (frames < lens[:, None])
    order = np.where(hidden, random.random(shape), 2.0).argsort(1, kind="stable")
    return torch.from_numpy(np.sort(order[:, : hidden.sum(1).min()], axis=1))


def drawn_distractors(own: Tensor, sizes: np.ndarray, count: int, random: np.random.Generator) -> Tensor:
    """Others of the same row for each of ``own``, uniformly and with repetitions: (B, M) -> (B, M, ``count``) int64.

    Args:
        own: index of each, among the row's ``sizes`` (B,), at least 2.
    """
    drawn = random.integers((sizes - 1)[:, None, None], size=(*own.shape, count))
    return torch.from_numpy(drawn + (drawn >= own.numpy()[..., None]))
