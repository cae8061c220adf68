"""The model's spec: all that is needed, beside the weights, to rebuild a model. It is model.yaml."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, field_validator

from asrkit.config import config

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


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

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("kernel_size must be odd, so that the filter has a centre")
        return value


@config
class PredictorSpec:
    """A stateless predictor: the last ``context_size`` tokens, each with its own filter."""

    dim: Positive
    context_size: Positive = 2
    dropout: Probability = 0.0


@config
class ModelSpec:
    """A convolutional backbone with a CTC head and a transducer on top."""

    vocab_size: Annotated[int, Field(ge=2)]
    encoder: EncoderSpec
    predictor: PredictorSpec
    joiner_dim: Positive
    features: FeatureSpec = field(default_factory=FeatureSpec)
    # A configuration is a named list of active sub-models; `backbone` is the empty one.
    configurations: dict[str, list[str]] = field(default_factory=lambda: {"backbone": []})


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
