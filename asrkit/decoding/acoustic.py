"""What a search needs of a model, whether it runs in torch or was exported.

Shapes: B utterances, T feature frames of 10 ms, T' encoder frames of 40 ms, N hypotheses of any utterances,
J joiner dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from asrkit.data.features import LOG_EPS
from asrkit.frames import SUBSAMPLING, count_window
from asrkit.nn.conformer import subsampled_lens
from asrkit.nn.context import FULL, Context

if TYPE_CHECKING:
    from asrkit.models import AsrModel
    from asrkit.models.encoder import Caches


class EncoderOutput(NamedTuple):
    """What the searches read: each frame's vector in joiner space, and the CTC head's log-probabilities."""

    joiner_in: Tensor  # (B, T', J)
    lens: Tensor  # (B,) int64, 0 for an utterance too short for one frame
    ctc_log_probs: Tensor | None  # (B, T', V); None for a model without a CTC head


class AcousticModel(Protocol):
    """A transducer cut at the places where a search enters it; every call is batched."""

    vocab_size: int
    context_size: int
    blank: int

    def encode(self, features: Tensor, feature_lens: Tensor, languages: Sequence[str] | None = None) -> EncoderOutput:
        """Features (B, T, 80), their lengths (B,) and, for a model with a language input, languages, to encoder frames."""

    def predict(self, contexts: Tensor) -> Tensor:
        """The last ``context_size`` tokens (N, context_size), -1 for none, to predictor vectors (N, J)."""

    def join(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """One encoder frame (N, J) and one predictor vector (N, J) to logits (N, V)."""


class TorchAcousticModel:
    """An ``AsrModel`` in evaluation mode as an ``AcousticModel``; inputs are moved to the model's device.

    Args:
        variant: the active sub-models; None is what the model was last trained in.
        context: full context in one pass, or a streaming one, which is run chunk by chunk, as on a device.

    A model with a language input takes the languages in ``encode``; ``step`` needs one that is ``in_language``.
    """

    def __init__(self, model: AsrModel, variant: str | None = None, context: Context = FULL) -> None:
        self.model = model
        self.variant = variant
        self.context = context
        self.vocab_size = model.vocab_size
        self.context_size = model.context_size
        self.blank = model.blank

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode(self, features: Tensor, feature_lens: Tensor, languages: Sequence[str] | None = None) -> EncoderOutput:
        features, feature_lens = features.to(self.device), feature_lens.to(self.device)
        language_ids = self.model.language_ids(languages)
        if self.context.streaming:
            encoder_out, lens = encode_by_chunks(
                self.model, features, feature_lens, self.variant, self.context, language_ids
            )
        else:
            encoder_out, lens = self.model.encode(features, feature_lens, self.variant, languages=language_ids)
        return self._output(encoder_out, lens)

    def start(self, batch: int = 1) -> Caches:
        """What ``batch`` streams remember before their first chunk."""
        submodels = self.model.submodels_of(self.variant)
        return self.model.encoder.initial_caches(batch, self.context.left, submodels)

    @torch.no_grad()
    def step(self, features: Tensor, caches: Caches, frame_lens: Tensor | None = None) -> tuple[EncoderOutput, Caches]:
        """The next chunk of each stream: (B, 4 c + 3, 80) to c encoder frames, and the caches after it.

        Where a stream ends within the chunk, ``frame_lens`` (B,) says how many of its c frames there are.
        """
        features = features.to(self.device)
        lens = None if frame_lens is None else frame_lens.to(self.device)
        encoder_out, caches = self.model.streaming_step(features, caches, self.variant, lens)
        if lens is None:
            lens = torch.full((len(features),), encoder_out.shape[1], device=self.device)
        return self._output(encoder_out, lens), caches

    def _output(self, encoder_out: Tensor, lens: Tensor) -> EncoderOutput:
        joiner_in = self.model.joiner.project_encoder(encoder_out)
        return EncoderOutput(joiner_in, lens, self.model.ctc_log_probs(encoder_out))

    @torch.no_grad()
    def predict(self, contexts: Tensor) -> Tensor:
        return self.model.joiner.project_predictor(self.model.predictor(contexts))

    @torch.no_grad()
    def join(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        return self.model.joiner(encoded, predicted)


def encode_by_chunks(
    model: AsrModel,
    features: Tensor,
    feature_lens: Tensor,
    variant: str | None,
    context: Context,
    languages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``model.encode`` gives in a streaming ``context``, from ``streaming_step`` chunk by chunk."""
    if context.chunk is None:
        raise ValueError("context must be a streaming one")
    lens, size = subsampled_lens(feature_lens), context.chunk
    num_frames = int(lens.max())
    caches = model.encoder.initial_caches(len(features), context.left, model.submodels_of(variant))
    last = count_window(-(-num_frames // size) * size)
    features = pad(features, (0, 0, 0, max(0, last - features.shape[1])), value=LOG_EPS)
    chunks = [features.new_zeros(len(features), 0, model.spec.encoder.dim)]
    for begin in range(0, num_frames, size):
        window = features[:, SUBSAMPLING * begin : count_window(begin + size)]
        frame_lens = (lens - begin).clamp(0, size)
        encoder_out, caches = model.streaming_step(window, caches, variant, frame_lens, languages)
        chunks.append(encoder_out)
    return torch.cat(chunks, dim=1)[:, :num_frames], lens
