"""The specs of recognizers, encoders and language models: all that is needed, beside the weights, to rebuild a model;
model.yaml holds one. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from asrkit.config import Positive, Probability, config
from asrkit.data.text.units import Unit
from asrkit.nn.compression_config import Compression
from asrkit.nn.context import parse_context

# "full", or "chunk=16,left=64": written in one way only.
ContextText = Annotated[str, AfterValidator(lambda text: str(parse_context(text)))]
BACKBONE = "backbone"
# Layers that only serve training are never compressed: no export holds them.
TRAINING_ONLY = ("simple_encoder", "simple_predictor", "heads")
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
    """How features are computed."""
    sample_rate: Literal[16000] = 16000
    """Samples per second of the audio."""
    num_mel_bins: Literal[80] = 80
    """Features per frame of 10 ms."""


@config
class EncoderSpec:
    """The convolutional backbone."""

    dim: Positive
    """Width of the backbone."""
    num_layers: Positive
    """Number of blocks."""
    feedforward_dim: Positive
    """Width inside a feed-forward module."""
    kernel_size: Positive = 31
    """Frames of 40 ms that a depthwise convolution sees; odd."""
    subsampling_channels: tuple[Positive, Positive] = (8, 32)
    """Channels of the two convolutions that subsample by 4."""
    dropout: Probability = 0.1
    """Share of values dropped in training."""
    norms: Literal["shared", "per_mode"] = "shared"
    """shared: one gain and bias a norm (our choice); per_mode: a second one for streaming (arXiv 2010.06030)."""

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("kernel_size must be odd, so that the filter has a center")
        return value


@config
class PredictorSpec:
    """A stateless predictor: the last tokens, each with its own filter."""

    dim: Positive
    """Width of the embeddings."""
    context_size: Positive = 2
    """How many of the last tokens it sees."""
    dropout: Probability = 0.0
    """Share of values dropped in training."""


@config
class SubModelSpec:
    """Modules added to layers of the backbone under one name."""

    kind: Literal["attention", "adapter"]
    """attention, or a feed-forward adapter."""
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """The backbone's layers that get a module, counted from 0."""
    position: Literal["serial", "parallel"] = "serial"
    """Where it attaches: serial (before the convolution) or parallel (beside it)."""
    dim: Positive
    """Width of attention's queries, keys and values, or of an adapter's bottleneck."""
    heads: Positive = 4
    """Attention heads."""
    context: ContextText = "full"
    """What attention sees at most, whatever context the model runs in; a streaming chunk limits it further."""
    dropout: Probability = 0.1
    """Share of values dropped in training."""

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
    """A frame classifier of two linear layers on a backbone layer, which only serves training (arXiv 2110.10429)."""

    unit: Unit
    """The unit of speech it classifies."""
    classes: Positive
    """Size of the unit's inventory, with 0 for silence."""
    hidden: Positive
    """Width between its two layers."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """The block it hangs on; null is the top."""


@config
class VariantSpec:
    """A named operating point of one set of weights."""

    submodels: list[str] = field(default_factory=list)
    """The sub-models that are active, in the order they are added."""
    contexts: Annotated[list[ContextText], Field(min_length=1)] = field(default_factory=lambda: ["full"])
    """The contexts it was trained in, the default one first."""
    masks: bool = True
    """Whether the masks of the compressed layers are on; without them the latent weights count as they are."""
    integers: bool = True
    """Whether the integers of the compressed layers are on; without them weights and inputs are float."""


def _check_parts(
    encoder: EncoderSpec, submodels: Mapping[str, SubModelSpec], variants: Mapping[str, VariantSpec], variant: str
) -> None:
    """Refuse sub-models and variants with unusable names, of other layers or other sub-models than there are, and a default variant
    that is none."""
    for name, submodel in submodels.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"sub-model {name}: a name is letters, digits, - and _, a letter first")
        if submodel.layers[-1] >= encoder.num_layers:
            raise ValueError(
                f"sub-model {name}: layer {submodel.layers[-1]} is out of range; "
                f"the encoder has layers 0 to {encoder.num_layers - 1}"
            )
    for name, one in variants.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"variant {name}: a name is letters, digits, - and _, a letter first")
        if missing := [part for part in one.submodels if part not in submodels]:
            raise ValueError(f"variant {name}: no sub-model {', '.join(missing)}")
    if variant not in variants:
        raise ValueError(f"no variant {variant}")


@config
class ModelSpec:
    """A recognizer: a convolutional backbone with a CTC head and a transducer on top, and the sub-models added to it."""

    vocab_size: Annotated[int, Field(ge=2)]
    """Number of tokens, blank included."""
    encoder: EncoderSpec
    """The backbone."""
    predictor: PredictorSpec
    """The transducer's predictor."""
    joiner_dim: Positive
    """Width in which encoder and predictor meet."""
    features: FeatureSpec = field(default_factory=FeatureSpec)
    """What the encoder takes."""
    languages: Languages = field(default_factory=list)
    """Languages the model takes as an input: a learned vector for each is added to the frames."""
    submodels: dict[str, SubModelSpec] = field(default_factory=dict)
    """The sub-models, by name."""
    variants: dict[str, VariantSpec] = field(default_factory=lambda: {BACKBONE: VariantSpec()})
    """The operating points, by name."""
    variant: str = BACKBONE
    """The variant the last stage trained, which is used where none is named."""
    compression: dict[str, Compression] = field(default_factory=dict)
    """How linear layers are masked and quantized, by path, such as ``encoder.blocks.0.conv.out``; each variant says which of it is on."""
    heads: dict[str, HeadSpec] = field(default_factory=dict)
    """Heads the run was trained with; loading the model leaves them out."""

    @model_validator(mode="after")
    def _names_and_layers(self) -> Any:
        _check_parts(self.encoder, self.submodels, self.variants, self.variant)
        for name, head in self.heads.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"head {name}: a name is letters, digits, - and _, a letter first")
            if head.layer is not None and head.layer >= self.encoder.num_layers:
                raise ValueError(
                    f"head {name}: layer {head.layer} is out of range; "
                    f"the encoder has layers 0 to {self.encoder.num_layers - 1}"
                )
        return self

    def contexts_of(self, submodel: str) -> list[str]:
        """The contexts of every variant a sub-model is in, each once, in order."""
        every = [
            text for variant in self.variants.values() if submodel in variant.submodels for text in variant.contexts
        ]
        return list(dict.fromkeys(every))


@config
class ContrastiveSpec:
    """What an encoder is pretrained with (arXiv 2006.11477): a mask vector, a quantizer with codebooks, and two projections."""

    groups: Positive
    """Codebooks; an entry of each makes a target."""
    entries: Annotated[int, Field(ge=2)]
    """Entries of a codebook."""
    code_dim: Positive
    """Width of the entries of all codebooks together; a multiple of groups."""
    final_dim: Positive
    """Width in which contexts and targets are compared."""

    @model_validator(mode="after")
    def _codes_fit(self) -> Any:
        if self.code_dim % self.groups:
            raise ValueError(f"code_dim {self.code_dim} must be a multiple of groups {self.groups}")
        return self


@config
class PretrainedEncoderSpec:
    """An encoder by itself, pretrained without text."""

    encoder: EncoderSpec
    """The backbone."""
    features: FeatureSpec = field(default_factory=FeatureSpec)
    """What the encoder takes."""
    submodels: dict[str, SubModelSpec] = field(default_factory=dict)
    """The sub-models, by name."""
    variants: dict[str, VariantSpec] = field(default_factory=lambda: {BACKBONE: VariantSpec()})
    """The operating points, by name."""
    variant: str = BACKBONE
    """The default variant of a recognizer that is made of it."""
    compression: dict[str, Compression] = field(default_factory=dict)
    """The masks it was pretrained with, by path of the layer; each variant says whether they are on."""
    objective: ContrastiveSpec | None = None
    """What it was pretrained with, so that pretraining can go on; a recognizer made of it has none of that."""

    @model_validator(mode="after")
    def _names_and_layers(self) -> Any:
        _check_parts(self.encoder, self.submodels, self.variants, self.variant)
        return self


@config
class LmShape:
    """Shape of a language model. The paper leaves the widths open; the defaults are our choice."""

    architecture: Literal["lstm", "transformer"] = "lstm"
    """lstm (the paper's) or a causal transformer."""
    dim: Annotated[int, Field(ge=2)] = 256
    """Width of the embedding and of the layers."""
    num_layers: Positive = 4
    """Number of layers."""
    heads: Positive = 4
    """Attention heads of the transformer; dim must be an even multiple of them."""
    dropout: Probability = 0.1
    """Dropout in the layers."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Any:
        if self.architecture == "transformer" and self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} must be an even multiple of heads {self.heads}")
        return self


@config
class LmSpec:
    """A language model; its units are the pieces of the run's tokenizer.model."""

    unit: Unit
    """The unit of speech it is a model of."""
    vocab_size: Annotated[int, Field(ge=2)]
    """Size of the unit's inventory, with 0 for the end of a sequence."""
    shape: LmShape
    """The network."""


@config
class NgramSpec:
    """An n-gram model; the run's lm.arpa holds its vocabulary, which is of words or of the pieces of the run's tokenizer.model."""

    unit: Literal["bpe", "word"]
    """The unit it is a model of."""
    vocab_size: Annotated[int, Field(ge=2)]
    """Number of units, with <unk> and the end of a sequence."""
    order: Annotated[int, Field(ge=1, le=10)]
    """The longest n-gram has this many units."""
    counts: list[int]
    """Number of n-grams of each order, from 1 on."""


Size = Literal["tiny", "small", "medium", "large"]

# Parameters with 500 tokens, the pruning joiner included, which only serves training: 1.53 M, 4.95 M, 24.8 M, 103.6 M.
SIZES: dict[str, dict[str, dict[str, int] | int]] = {
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
