"""The model's spec: all that is needed, beside the weights, to rebuild a model. It is model.yaml."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from asrkit.config import Positive, Probability, config
from asrkit.data.text.units import Unit
from asrkit.nn.compression import Compression
from asrkit.nn.context import parse_context

# "full", or "chunk=16,left=64": written in one way only.
ContextText = Annotated[str, AfterValidator(lambda text: str(parse_context(text)))]
BACKBONE = "backbone"
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def _each_once(names: list[str]) -> list[str]:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(repeated)}: named more than once")
    return names


Languages = Annotated[list[Annotated[str, Field(min_length=1)]], AfterValidator(_each_once)]


@config
class FeatureSpec:
    """80-bin Kaldi log-mel as lhotse computes it; mean and variance are buffers of the model."""

    kind: Literal["kaldi-fbank"] = "kaldi-fbank"
    sample_rate: Literal[16000] = 16000
    num_mel_bins: Literal[80] = 80


@config
class EncoderSpec:
    dim: Positive
    num_layers: Positive
    feedforward_dim: Positive
    kernel_size: Positive = 31
    subsampling_channels: tuple[Positive, Positive] = (8, 32)
    dropout: Probability = 0.1
    # per_mode: a second gain and bias in every norm, for streaming (arXiv 2010.06030); ours is one for both.
    norms: Literal["shared", "per_mode"] = "shared"

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("kernel_size must be odd, so that the filter has a center")
        return value


@config
class PredictorSpec:
    """A stateless predictor: the last ``context_size`` tokens, each with its own filter."""

    dim: Positive
    context_size: Positive = 2
    dropout: Probability = 0.0


@config
class SubModelSpec:
    """Modules added to layers of the backbone under one name.

    ``dim`` is that of attention's queries, keys and values, or an adapter's bottleneck. ``context`` limits what
    attention sees whatever the model's mode; in streaming the chunk limits it further.
    """

    kind: Literal["attention", "adapter"]
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    position: Literal["serial", "parallel"] = "serial"
    dim: Positive
    heads: Positive = 4
    context: ContextText = "full"
    dropout: Probability = 0.1

    @field_validator("layers")
    @classmethod
    def _sorted(cls, value: list[int]) -> list[int]:
        return sorted(set(value))

    @model_validator(mode="after")
    def _heads_fit(self) -> Any:
        if self.kind == "attention" and self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} must be an even multiple of heads {self.heads}")
        return self


@config
class HeadSpec:
    """A frame classifier of two linear layers on a backbone layer, which only serves training (arXiv 2110.10429).

    ``classes``: of the unit's inventory, with 0 for silence. ``layer``: the block it hangs on, None being the top.
    """

    unit: Unit
    classes: Positive
    hidden: Positive
    layer: Annotated[int, Field(ge=0)] | None = None


@config
class VariantSpec:
    """A named operating point: the sub-models that are active, and the contexts it was trained in, the first by default."""

    submodels: list[str] = field(default_factory=list)
    contexts: Annotated[list[ContextText], Field(min_length=1)] = field(default_factory=lambda: ["full"])


@config
class ModelSpec:
    """A convolutional backbone with a CTC head and a transducer on top, and the sub-models added to it.

    ``languages``, if any, are those the encoder is told apart: it has a learned vector for each.
    ``variant`` is the one the last stage trained, which is used where none is named. ``compression`` says, by the
    path of a linear layer such as ``encoder.blocks.0.conv.out``, how it is masked and quantized. ``heads`` are those the run
    was trained with; whoever loads the model leaves them out.
    """

    vocab_size: Annotated[int, Field(ge=2)]
    encoder: EncoderSpec
    predictor: PredictorSpec
    joiner_dim: Positive
    features: FeatureSpec = field(default_factory=FeatureSpec)
    languages: Languages = field(default_factory=list)
    submodels: dict[str, SubModelSpec] = field(default_factory=dict)
    variants: dict[str, VariantSpec] = field(default_factory=lambda: {BACKBONE: VariantSpec()})
    variant: str = BACKBONE
    compression: dict[str, Compression] = field(default_factory=dict)
    heads: dict[str, HeadSpec] = field(default_factory=dict)

    @model_validator(mode="after")
    def _names_and_layers(self) -> Any:
        for name, submodel in self.submodels.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"sub-model {name}: a name is letters, digits, - and _, a letter first")
            if submodel.layers[-1] >= self.encoder.num_layers:
                raise ValueError(
                    f"sub-model {name}: layer {submodel.layers[-1]} is out of range; "
                    f"the encoder has layers 0 to {self.encoder.num_layers - 1}"
                )
        for name, variant in self.variants.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"variant {name}: a name is letters, digits, - and _, a letter first")
            if missing := [part for part in variant.submodels if part not in self.submodels]:
                raise ValueError(f"variant {name}: no sub-model {', '.join(missing)}")
        for name, head in self.heads.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"head {name}: a name is letters, digits, - and _, a letter first")
            if head.layer is not None and head.layer >= self.encoder.num_layers:
                raise ValueError(
                    f"head {name}: layer {head.layer} is out of range; "
                    f"the encoder has layers 0 to {self.encoder.num_layers - 1}"
                )
        if self.variant not in self.variants:
            raise ValueError(f"no variant {self.variant}")
        return self


Size = Literal["tiny", "small", "medium", "large"]

SIZES: dict[str, dict[str, dict[str, int] | int]] = {
    # parameters with 500 tokens: 1.2 M, 4.6 M, 24 M, 104 M
    "tiny": {
        "encoder": {"dim": 128, "num_layers": 5, "feedforward_dim": 320, "kernel_size": 15},
        "predictor": {"dim": 128},
        "joiner_dim": 128,
    },
    "small": {
        "encoder": {"dim": 192, "num_layers": 6, "feedforward_dim": 768, "kernel_size": 31},
        "predictor": {"dim": 192},
        "joiner_dim": 192,
    },
    "medium": {
        "encoder": {"dim": 320, "num_layers": 12, "feedforward_dim": 1280, "kernel_size": 31},
        "predictor": {"dim": 320},
        "joiner_dim": 320,
    },
    "large": {
        "encoder": {"dim": 576, "num_layers": 16, "feedforward_dim": 2304, "kernel_size": 31},
        "predictor": {"dim": 512},
        "joiner_dim": 512,
    },
}
