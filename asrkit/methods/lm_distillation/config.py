"""The settings of distill-lm."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from asrkit.config import Advanced, Positive, Share, config
from asrkit.data.text.units import Unit
from asrkit.training.session import FineTuneConfig


@config
class HeadConfig:
    """One head on the encoder that learns from a language model (arXiv 2110.10429)."""

    weight: Annotated[float, Field(ge=0.0)] | None = None
    """Weight of the head's loss (w_j); null gives J heads 1/J each, as in the paper."""
    hidden: Positive | None = None
    """Inner width of the head; null takes the encoder's."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Encoder block the head reads, from 0; null is the top one, as in the paper."""


@config
class DistillLmConfig(FineTuneConfig):
    """Settings of distill-lm (arXiv 2110.10429; LST is arXiv 1907.06017). config.yaml of the run holds them all."""

    variant: str | None = None
    """Variant to train; null trains the parent's default."""
    mode: Literal["mtl", "lst"] = "mtl"
    """mtl gives each language model its own head (equation 4 of the paper); lst trains one supervised head whose labels
    are mixed with the posteriors (equation 3), the baseline of the paper."""
    labels: Share = 0.9
    """Share lambda of the recognizer's own loss (mtl), or of the labels (lst). 0.9 is the best of arXiv 1907.06017."""
    temperature: Annotated[float, Field(gt=0.0)] | None = None
    """Temperature the language model's logits are divided by; null is 1 for mtl and 5 for lst, as the paper compares
    them."""
    both_temperatures: Advanced[bool] = False
    """Divide the student's logits by the temperature too. The paper does not."""
    heads: dict[str, HeadConfig] = field(default_factory=dict)
    """Settings of single heads, by the name given in --lm NAME=RUN, or `supervised`."""
    supervised: Unit | None = None
    """Unit of a further head trained on the aligned labels themselves: bpe, phone or senone; null for none. lst always
    has one, of its language model's unit."""
    supervised_scale: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the supervised head's loss, beside the recognizer's."""
    silence: Advanced[Literal["ignore", "own", "previous"]] = "ignore"
    """Target of frames between two units: ignore (no target), own (class 0), or previous (the unit before)."""
    repeats: Advanced[Literal["keep", "merge"]] = "keep"
    """keep counts a unit spoken twice as two segments; merge joins neighbors with the same label into one."""
    unaligned: Literal["refuse", "allow"] = "refuse"
    """Cuts without an alignment: refuse to start, or allow them, which then train the recognizer alone."""
