"""The contexts a stage trains in, and attention dropout: what is drawn for each batch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from asrkit.config import NonNegative, config
from asrkit.losses.distillation import Classes
from asrkit.models.spec import ContextText
from asrkit.nn.context import FULL, Context, parse_context


@config
class ContextsConfig:
    """The contexts a stage trains in, ``train``; the first is the one dev WER is measured in.

    ``sampling`` random: each process draws one a batch. joint: every batch is seen in full context and in one drawn of
    the others, and the losses are added (dual-mode training, arXiv 2010.06030, section 3). Joint training can distil in
    place: ``distillation_scale`` times the divergence of the streaming from the full-context posteriors on the
    streaming pass's pruned lattice, the teacher delayed by ``distillation_delay`` encoder frames (it emits earlier; the
    paper tunes -2 to 2). Its scale and its classes are open in the paper: ours are 0, which is off, and three.
    """

    train: Annotated[list[ContextText], Field(min_length=1)] | None = None
    sampling: Literal["random", "joint"] = "random"
    distillation_scale: NonNegative = 0.0
    distillation_classes: Classes = "three"
    distillation_delay: Annotated[int, Field(ge=-5, le=5)] = 0

    @model_validator(mode="after")
    def _joint_needs_two(self) -> Any:
        streaming = [text for text in self.train or [] if text != str(FULL)]
        if self.sampling == "joint" and not (streaming and str(FULL) in (self.train or [])):
            raise ValueError("joint training takes full and at least one streaming context in contexts.train")
        if self.distillation_scale > 0 and self.sampling != "joint":
            raise ValueError("in-place distillation needs contexts.sampling=joint")
        return self

    @property
    def choices(self) -> list[Context]:
        return [parse_context(text) for text in self.train or [str(FULL)]]


def drawn(contexts: list[Context]) -> Context:
    """One of the contexts, by torch's generator on the CPU."""
    return contexts[0] if len(contexts) == 1 else contexts[int(torch.randint(len(contexts), ()))]


@config
class AttentionDropoutConfig:
    """How attention is dropped at random while the backbone trains (US20240185839A1, which leaves all of this open).

    ``probability`` 1 trains the backbone alone, 0 an ordinary Conformer. ``over``: each layer draws for itself, or the
    whole model at once; ``per`` batch or utterance. ``rescale`` divides what is left by 1 - probability; off, the
    backbone alone is what it is in training when all attention is dropped.
    """

    probability: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    over: Literal["layer", "model"] = "layer"
    per: Literal["batch", "utterance"] = "batch"
    rescale: bool = False


def draw_gates(settings: AttentionDropoutConfig, num_layers: int, batch: int) -> Tensor | None:
    """Factors of attention (num_layers, batch or 1) on the CPU, 0 where it is dropped; None where all of it stays.

    Drawn by torch's own generator, which the loop seeds from (seed, rank, step).
    """
    if settings.probability == 0:
        return None
    shape = (num_layers if settings.over == "layer" else 1, batch if settings.per == "utterance" else 1)
    gates = torch.bernoulli(torch.full(shape, 1 - settings.probability))
    if settings.rescale and settings.probability < 1:
        gates /= 1 - settings.probability
    return gates.expand(num_layers, -1)
