"""The recogniser: encoder, stateless predictor, joiner, CTC head.

Shapes: B batch, T feature frames, T' encoder frames, U symbols, D encoder dim, P predictor dim, J joiner dim,
V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asrkit.config import from_dict
from asrkit.errors import UserError
from asrkit.models.spec import EncoderSpec, ModelSpec, PredictorSpec
from asrkit.nn.conformer import BackboneBlock, Subsampling
from asrkit.run_dir import MODEL, RunDir


class Normalise(nn.Module):
    """Subtract the mean and divide by the deviation of each mel bin, both measured on the training manifest."""

    mean: Tensor
    std: Tensor

    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_mel_bins))
        self.register_buffer("std", torch.ones(num_mel_bins))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class Encoder(nn.Module):
    """Normalised features through the subsampling and the backbone's blocks."""

    def __init__(self, spec: EncoderSpec, num_mel_bins: int) -> None:
        super().__init__()
        self.normalise = Normalise(num_mel_bins)
        self.subsampling = Subsampling(num_mel_bins, spec.subsampling_channels, spec.dim)
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(
            BackboneBlock(spec.dim, spec.feedforward_dim, spec.kernel_size, spec.dropout)
            for _ in range(spec.num_layers)
        )

    def forward(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, 80), (B,) -> (B, T', D), (B,) with T' = (T - 3) // 4.

        An utterance of fewer than 7 frames has no encoder frame; a batch of only such gives T' = 0.
        """
        if features.shape[1] < 7:
            dim = self.subsampling.out.out_features
            return features.new_zeros(len(features), 0, dim), torch.zeros_like(feature_lens)
        x, encoder_out_lens = self.subsampling(self.normalise(features), feature_lens)
        x = self.dropout(x)
        padding = (torch.arange(x.shape[1], device=x.device) >= encoder_out_lens[:, None]).unsqueeze(-1)
        for block in self.blocks:
            x = block(x, padding)
        return x, encoder_out_lens


class Predictor(nn.Module):
    """Stateless predictor: embeddings of the last tokens, mixed by one filter for each channel.

    A token of -1 stands for "none yet" and contributes zeros, as the runtime sends it.
    Source: Ghodsi et al. 2020 (stateless transducer).
    """

    def __init__(self, spec: PredictorSpec, vocab_size: int) -> None:
        super().__init__()
        self.context_size = spec.context_size
        self.embedding = nn.Embedding(vocab_size, spec.dim)
        # One weight for each place in the context and channel: a depthwise convolution, written as a sum.
        self.mix = nn.Parameter(torch.full((spec.context_size, spec.dim), spec.context_size**-0.5))
        self.bias = nn.Parameter(torch.zeros(spec.dim))
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, contexts: Tensor) -> Tensor:
        """(..., context_size) int64, oldest token first -> (..., P)."""
        embedded = self.embedding(contexts.clamp(min=0)) * (contexts >= 0).unsqueeze(-1)
        return F.relu(self.dropout((embedded * self.mix).sum(dim=-2) + self.bias))

    def contexts_of(self, symbols: Tensor) -> Tensor:
        """The context before each symbol and after the last: (B, U) -> (B, U + 1, context_size)."""
        start = symbols.new_full((len(symbols), self.context_size), -1)
        start[:, -1] = 0
        return torch.cat([start, symbols], dim=1).unfold(1, self.context_size, 1)


class Joiner(nn.Module):
    """tanh(encoder + predictor) to logits; both inputs are projected to J once, before they meet."""

    def __init__(self, encoder_dim: int, predictor_dim: int, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.encoder_projection = nn.Linear(encoder_dim, dim)
        self.predictor_projection = nn.Linear(predictor_dim, dim)
        self.out = nn.Linear(dim, vocab_size)

    def project_encoder(self, encoder_out: Tensor) -> Tensor:
        return self.encoder_projection(encoder_out)

    def project_predictor(self, predictor_out: Tensor) -> Tensor:
        return self.predictor_projection(predictor_out)

    def forward(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """(..., J), (..., J) -> logits (..., V)."""
        return self.out(torch.tanh(encoder + predictor))


class AsrModel(nn.Module):
    """A transducer and a CTC recogniser on one convolutional backbone."""

    blank = 0
    subsampling = 4

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vocab_size = spec.vocab_size
        self.context_size = spec.predictor.context_size
        dim = spec.encoder.dim
        self.encoder = Encoder(spec.encoder, spec.features.num_mel_bins)
        self.predictor = Predictor(spec.predictor, spec.vocab_size)
        self.joiner = Joiner(dim, spec.predictor.dim, spec.joiner_dim, spec.vocab_size)
        self.ctc_head = nn.Linear(dim, spec.vocab_size)
        # The cheap joiner that only serves to prune the lattice; exports leave it out.
        self.simple_encoder = nn.Linear(dim, spec.vocab_size)
        self.simple_predictor = nn.Linear(spec.predictor.dim, spec.vocab_size)

    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, 80), (B,) -> (B, T', D), (B,)."""
        return self.encoder(features, feature_lens)

    def ctc_log_probs(self, encoder_out: Tensor) -> Tensor:
        """(B, T', D) -> (B, T', V), in float32 whatever the precision around it."""
        return self.ctc_head(encoder_out).float().log_softmax(dim=-1)


def load_model(run: RunDir) -> AsrModel:
    """Rebuild the model of a run directory, strictly: on the CPU, float32, eval mode.

    Raises:
        UserError: the weights do not fit the spec.
    """
    model = AsrModel(from_dict(ModelSpec, run.model_spec, str(run.path / MODEL)))
    try:
        model.load_state_dict(run.weights(), strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{run.path}: weights and model.yaml disagree ({' '.join(str(error).split())[:300]})"
        ) from error
    return model.eval()
