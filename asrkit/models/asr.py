"""The recognizer: encoder, stateless predictor, joiner, CTC head.

Shapes: B batch, T feature frames, T' encoder frames, U symbols, D encoder dim, P predictor dim, J joiner dim,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asrkit.devices import send
from asrkit.errors import UserError
from asrkit.models.encoder import Caches, Encoder
from asrkit.models.spec import HeadSpec, ModelSpec, PredictorSpec
from asrkit.nn.compression import compress, switch_compression
from asrkit.nn.context import FULL, Context
from asrkit.nn.dropout import Dropout


class Predictor(nn.Module):
    """Stateless predictor: embeddings of the last tokens, mixed by one filter for each channel.

    A token of -1 stands for "none yet" and contributes zeros, as the runtime sends it.
    Source: Ghodsi et al. 2020 (stateless transducer).
    """

    def __init__(self, spec: PredictorSpec, vocab_size: int) -> None:
        super().__init__()
        self.context_size = spec.context_size
        self.embedding = nn.Embedding(vocab_size, spec.dim)
        # One weight for each position in the context and channel: a depthwise convolution, written as a sum.
        self.mix = nn.Parameter(torch.full((spec.context_size, spec.dim), spec.context_size**-0.5))
        self.bias = nn.Parameter(torch.zeros(spec.dim))
        self.dropout = Dropout(spec.dropout)

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


class Head(nn.Module):
    """Two linear layers from a backbone layer to the classes of a unit (arXiv 2110.10429); the ReLU between them is our choice."""

    def __init__(self, dim: int, spec: HeadSpec) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, spec.hidden)
        self.out = nn.Linear(spec.hidden, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T', D) -> logits (B, T', classes)."""
        return self.out(F.relu(self.hidden(x)))


class AsrModel(nn.Module):
    """A transducer and a CTC recognizer on one convolutional backbone.

    The masks and integers of compressed layers are on as a variant says: ``encode`` and ``streaming_step`` select theirs, and
    predictor, joiner and CTC head run as the variant selected last, which at first is the default one.
    """

    blank = 0
    subsampling = 4

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vocab_size = spec.vocab_size
        self.context_size = spec.predictor.context_size
        dim = spec.encoder.dim
        self.encoder = Encoder(spec.encoder, spec.features, spec.submodels, spec.languages)
        self.predictor = Predictor(spec.predictor, spec.vocab_size)
        self.joiner = Joiner(dim, spec.predictor.dim, spec.joiner_dim, spec.vocab_size)
        self.ctc_head = nn.Linear(dim, spec.vocab_size)
        # The cheap joiner that only serves to prune the lattice; exports leave it out.
        self.simple_encoder = nn.Linear(dim, spec.vocab_size)
        self.simple_predictor = nn.Linear(spec.predictor.dim, spec.vocab_size)
        # Where teachers' encoders are met, by teacher: filled by the stage that needs it, in no run directory.
        self.teacher_maps = nn.ModuleDict()
        # Earlier weights of this model, by name: filled by the stage that needs them, in no run directory.
        self.snapshots = nn.ModuleDict()
        compress(self, spec.compression)
        self.heads = nn.ModuleDict({name: Head(dim, head) for name, head in spec.heads.items()})
        self._no_masks = self._no_integers = False  # see ``compression_off``
        self._switches = (True, True)  # whether masks and integers are on, as layers begin
        self.selected = spec.variant
        self.select(spec.variant)

    def encode(
        self,
        features: Tensor,
        feature_lens: Tensor,
        variant: str | None = None,
        context: Context = FULL,
        gates: Tensor | None = None,
        languages: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, T, 80), (B,) -> (B, T', D), (B,), in one pass; see ``Encoder.forward``.

        ``languages`` (B,) as ``language_ids`` makes them.
        """
        return self.encoder(features, feature_lens, self.select(variant), context, gates, languages)

    def streaming_step(
        self,
        features: Tensor,
        caches: Caches,
        variant: str | None = None,
        frame_lens: Tensor | None = None,
        languages: Tensor | None = None,
    ) -> tuple[Tensor, Caches]:
        """The next chunk, (B, 4 c + 3, 80) -> (B, c, D) and the caches after it; see ``Encoder.streaming_step``."""
        return self.encoder.streaming_step(features, caches, self.select(variant), frame_lens, languages)

    def select(self, variant: str | None = None) -> tuple[str, ...]:
        """Run as a variant from here on, None being the default: its masks and integers are on or off; returns its active
        sub-models.

        Raises:
            UserError: there is no such variant.
        """
        submodels = self.submodels_of(variant)
        self.selected = self.spec.variant if variant is None else variant
        wanted = self.spec.variants[self.selected]
        switches = (wanted.masks and not self._no_masks, wanted.integers and not self._no_integers)
        if switches != self._switches:
            self._switches = switches
            switch_compression(self, masks=switches[0], integers=switches[1])
        return submodels

    @contextmanager
    def compression_off(self, *, masks: bool = True, integers: bool = True) -> Iterator[None]:
        """Within, every pass runs without masks, without integers, or without either, whatever its variant says."""
        before = self._no_masks, self._no_integers
        self._no_masks, self._no_integers = before[0] or masks, before[1] or integers
        self.select(self.selected)
        try:
            yield
        finally:
            self._no_masks, self._no_integers = before
            self.select(self.selected)

    def language_ids(self, languages: Sequence[str] | None) -> Tensor | None:
        """The names of utterances' languages as ``encode`` takes them, (B,) int64; None for a model without a language input.

        Raises:
            ValueError: the model does not know one; cuts are checked before work starts.
        """
        if self.encoder.languages is None or languages is None:
            return None
        numbers = [self.spec.languages.index(language) for language in languages]
        return send(torch.tensor(numbers), self.ctc_head.weight.device)

    def submodels_of(self, variant: str | None = None) -> tuple[str, ...]:
        """The active sub-models of a variant, None being the one the model was last trained in.

        Raises:
            UserError: there is no such variant.
        """
        name = self.spec.variant if variant is None else variant
        if name not in self.spec.variants:
            raise UserError(f"no variant {name}; there are {', '.join(self.spec.variants)}")
        return tuple(self.spec.variants[name].submodels)

    def ctc_log_probs(self, encoder_out: Tensor) -> Tensor:
        """(B, T', D) -> (B, T', V), in float32 whatever the precision around it."""
        return self.ctc_head(encoder_out).float().log_softmax(dim=-1)


@contextmanager
def tapped(model: AsrModel, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Yield a dictionary that holds, after each pass through the encoder, what the named blocks gave: (B, T', D)."""
    outputs: dict[int, Tensor] = {}
    num_frames: list[int] = []

    def keep(layer: int) -> Any:
        # Without the frames that a GPU computes to fill up a multiple.
        return lambda block, arguments, output: outputs.update({layer: output[0][:, : num_frames[-1]]})

    handles = [model.encoder.blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    handles.append(
        model.encoder.subsampling.register_forward_hook(lambda *given: num_frames.append(given[2][0].shape[1]))
    )
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
