"""The contexts a stage trains in, and attention dropout: what is drawn for each batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from asrkit.config import Advanced, NonNegative, config
from asrkit.data.batch import Batch
from asrkit.losses.distillation import Classes
from asrkit.models.asr import AsrModel
from asrkit.models.pretrained import PretrainedEncoder
from asrkit.models.spec import ContextText
from asrkit.nn.context import FULL, Context, parse_context

T = TypeVar("T")


@config
class TrainedContexts:
    """The contexts a stage trains in, one of them for each batch."""

    train: Annotated[list[ContextText], Field(min_length=1)] | None = None
    """Contexts to train in, such as [full, "chunk=8,left=32"], in encoder frames of 40 ms; dev cuts are measured in the
    first. null: full context for a new model, else those the variant was trained in."""

    @property
    def choices(self) -> list[Context]:
        return [parse_context(text) for text in self.train or [str(FULL)]]


@config
class ContextsConfig(TrainedContexts):
    """The contexts a stage trains in; ``joint`` is dual-mode training (arXiv 2010.06030, section 3)."""

    sampling: Literal["random", "joint"] = "random"
    """random draws one context for each batch and process; joint runs every batch in full context and in one of the
    others and adds the losses, which takes twice the time."""
    distillation_scale: NonNegative = 0.0
    """With joint sampling: weight of in-place distillation from the full to the streaming pass, over the streaming
    pass's pruned lattice; 0 is off."""
    distillation_classes: Advanced[Classes] = "three"
    """What in-place distillation compares: three (next symbol, blank, everything else) or all tokens."""
    distillation_delay: Annotated[int, Field(ge=-5, le=5)] = 0
    """Encoder frames of 40 ms by which the full-context teacher, which emits earlier, is delayed. The paper tries -2 to
    2."""

    @model_validator(mode="after")
    def _joint_needs_two(self) -> Any:
        streaming = [text for text in self.train or [] if text != str(FULL)]
        if self.sampling == "joint" and not (streaming and str(FULL) in (self.train or [])):
            raise ValueError("joint training needs full and at least one streaming context in contexts.train")
        if self.distillation_scale > 0 and self.sampling != "joint":
            raise ValueError("in-place distillation needs contexts.sampling=joint")
        return self


def drawn(choices: Sequence[T]) -> T:
    """A random one of the choices, such as contexts, drawn by torch's generator on the CPU."""
    return choices[0] if len(choices) == 1 else choices[int(torch.randint(len(choices), ()))]


@config
class AttentionDropoutConfig:
    """How attention is dropped at random while the backbone is trained (US20240185839A1, which leaves the details open)."""

    probability: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Probability that attention is dropped: 1 trains the backbone alone, without attention; 0 trains an ordinary
    Conformer; between, attention is the sub-model joint."""
    over: Advanced[Literal["model", "layer"]] = "model"
    """Draw once for the whole model, or for each layer by itself. With model (our choice) the backbone alone is trained
    in that share of the batches; layer by layer that is the share to the power of the number of layers, 3 % of them for
    0.5 and 5 layers, so that the backbone is hardly ever trained as it will run."""
    per: Advanced[Literal["batch", "utterance"]] = "batch"
    """Draw once for a batch, or for each utterance."""
    rescale: Advanced[bool] = False
    """Divide the rest by 1 - probability, as dropout does. Without it, the backbone alone computes what it computes in
    training when all attention is dropped."""


def draw_gates(settings: AttentionDropoutConfig, num_layers: int, batch: int) -> Tensor | None:
    """Factors of attention (num_layers, batch or 1) on the CPU, 0 where it is dropped; None if nothing is dropped.

    Drawn by torch's own generator, which the loop seeds from (seed, rank, step).
    """
    if settings.probability == 0:
        return None
    shape = (num_layers if settings.over == "layer" else 1, batch if settings.per == "utterance" else 1)
    gates = torch.bernoulli(torch.full(shape, 1 - settings.probability))
    if settings.rescale and settings.probability < 1:
        gates /= 1 - settings.probability
    return gates.expand(num_layers, -1)


def drawn_gates(
    model: AsrModel | PretrainedEncoder, settings: AttentionDropoutConfig | None, batch: Batch
) -> Tensor | None:
    """The gates of a batch in training; None in evaluation, and if no attention is dropped."""
    if settings is None or not model.training:
        return None
    return draw_gates(settings, len(model.encoder.blocks), len(batch.cut_ids))
