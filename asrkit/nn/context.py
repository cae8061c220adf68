"""How far a frame sees: everything, or its own chunk and some frames before it. Counted in encoder frames of 40 ms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asrkit.frames import ENCODER_SHIFT_MS, LOOK_AHEAD_MS

if TYPE_CHECKING:  # run directories are described without torch
    from torch import Tensor


@dataclass(frozen=True)
class Context:
    """Full (``chunk`` None), or streaming: ``chunk`` frames at once and ``left`` frames before the chunk.

    A whole model in a streaming context computes its convolutions causally; a sub-model's own context only limits
    what its attention sees.
    """

    chunk: int | None = None
    left: int = 0

    @property
    def streaming(self) -> bool:
        return self.chunk is not None

    @property
    def latency_ms(self) -> float | None:
        """Algorithmic latency: the longest time from the sound of a frame to the end of the samples its output needs."""
        return None if self.chunk is None else self.chunk * ENCODER_SHIFT_MS + LOOK_AHEAD_MS

    def __str__(self) -> str:
        return "full" if self.chunk is None else f"chunk={self.chunk},left={self.left}"


FULL = Context()


def parse_context(text: str) -> Context:
    """``full``, or ``chunk=16,left=64`` in either order.

    Raises:
        ValueError: anything else; the message says what is expected.
    """
    if text == "full":
        return FULL
    expected = f"'{text}' is no context: write full, or chunk=16,left=64 (encoder frames of 40 ms)"
    numbers: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ("chunk", "left") or name in numbers or not value.strip().isdecimal():
            raise ValueError(expected)
        numbers[name] = int(value)
    if set(numbers) != {"chunk", "left"} or numbers["chunk"] < 1:
        raise ValueError(expected)
    return Context(**numbers)


def visible(queries: Tensor, keys: Tensor, context: Context) -> Tensor:
    """Which keys each query may see: frame numbers (..., T) and (..., S) -> bool (..., T, S)."""
    queries, keys = queries.unsqueeze(-1), keys.unsqueeze(-2)
    if context.chunk is None:  # all True, in the shape that broadcasting gives
        return (queries == queries) & (keys == keys)
    begin = queries.div(context.chunk, rounding_mode="floor") * context.chunk
    return (keys >= begin - context.left) & (keys < begin + context.chunk)
