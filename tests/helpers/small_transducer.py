"""A small transducer of real layers for tests of searches, and what it says of a frame, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asrkit.decoding.acoustic import AcousticModel, EncoderOutput

BLANK = 0
SPECIAL = (BLANK, 1, 3)  # as a tokenizer lists them, the blank too


class SmallModel(nn.Module):
    """A transducer of real layers, small and sharp enough that searches have something to choose."""

    def __init__(self, vocab_size: int = 7, seed: int = 0, sharpness: float = 3.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vocab_size, self.context_size, self.blank = vocab_size, 2, BLANK
        self.encoder = nn.Linear(4 * 80, 8)
        self.embedding = nn.Embedding(vocab_size, 8)
        self.mix = nn.Linear(16, 8)
        self.output = nn.Linear(8, vocab_size)
        self.ctc = nn.Linear(8, vocab_size)
        self.sharpness = sharpness
        self.predicted_rows = 0
        self.double().eval()

    def encode(self, features: Tensor, feature_lens: Tensor, languages: Sequence[str] | None = None) -> EncoderOutput:
        lens = ((feature_lens - 3) // 4).clamp(min=0)
        steps = (features.shape[1] - 3) // 4
        encoded = self.encoder(features[:, : steps * 4].reshape(len(features), steps, -1).double())
        return EncoderOutput(encoded, lens, (self.sharpness * self.ctc(encoded)).log_softmax(-1))

    def predict(self, contexts: Tensor) -> Tensor:
        self.predicted_rows += len(contexts)
        embedded = self.embedding(contexts.clamp(min=0)) * (contexts >= 0).unsqueeze(-1)
        return self.mix(embedded.flatten(1))

    def join(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        return self.sharpness * self.output(torch.tanh(encoded + predicted))


def random_batch(lens: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Encoder frames (B, T', 8) whose padding is not a number, so that reading it shows."""
    generator = torch.Generator().manual_seed(seed)
    frames = 2 * torch.randn(len(lens), max(lens, default=0), 8, dtype=torch.float64, generator=generator)
    for row, length in enumerate(lens):
        frames[row, length:] = math.nan
    return frames, torch.tensor(lens)


def frame_log_probs(model: AcousticModel, frame: Tensor, prefix: tuple[int, ...]) -> list[float]:
    context = (-1, BLANK, *prefix)[-2:]
    predicted = model.predict(torch.tensor([context]))
    logits = model.join(frame.unsqueeze(0), predicted)[0]
    ordinary = [token for token in range(model.vocab_size) if token == BLANK or token not in SPECIAL]
    log_probs = [-math.inf] * model.vocab_size
    for token, log_prob in zip(ordinary, logits[ordinary].log_softmax(-1).tolist(), strict=True):
        log_probs[token] = log_prob
    return log_probs
