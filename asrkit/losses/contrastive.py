"""The loss of wav2vec 2.0 (arXiv 2006.11477, section 3.2): a hidden frame is distinguished from others, and all codes are to be used.

Shapes: B utterances, M hidden frames of each, S targets of each, K distractors, F width, G codebooks, V entries of each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_logits(
    contexts: Tensor, targets: Tensor, codes: Tensor, own: Tensor, distractors: Tensor, temperature: float
) -> Tensor:
    """Cosines of each context with its own target and with the distractors, over the temperature: (B, M, 1 + K).

    A distractor with the very codes of the own target is -inf, as in the reference code: nothing could tell them apart.

    Args:
        contexts: (B, M, F). targets: (B, S, F). codes: (B, S, G), of the targets.
        own: (B, M) int64, distractors: (B, M, K) int64: indices of targets.
    """
    # All cosines of an utterance in one product: distractors of frames overlap many times.
    cosines = F.normalize(contexts, dim=-1) @ F.normalize(targets, dim=-1).transpose(1, 2)
    mine = codes.gather(1, own.unsqueeze(-1).expand(-1, -1, codes.shape[-1]))
    same = (mine.unsqueeze(2) == codes.unsqueeze(1)).all(-1)  # (B, M, S)
    positive = cosines.gather(2, own.unsqueeze(-1))
    negative = cosines.gather(2, distractors).masked_fill(same.gather(2, distractors), float("-inf"))
    return torch.cat([positive, negative], dim=-1) / temperature


def contrastive_nll(logits: Tensor) -> Tensor:
    """-log P of the first choice, summed over an utterance's frames: (B, M, 1 + K) -> (B,)."""
    return -logits.log_softmax(-1)[..., 0].sum(1)


def told_apart(logits: Tensor) -> Tensor:
    """Where the first choice is the best by itself: (B, M, 1 + K) -> (B, M) bool. A frame whose distractors all equal its target is
    not counted (our choice), so that a collapsed codebook does not look perfect."""
    best = logits[..., 1:].amax(-1)
    return (logits[..., 0] > best) & (best > float("-inf"))


def diversity_loss(probabilities: Tensor, counted: Tensor | None = None) -> Tensor:
    """How little the codebooks are used on average: (B, S, G, V) -> (), from 0 (all entries alike) to almost 1.

    (G V - sum over g of exp(H(p_g))) / (G V), with p_g the mean of the softmax without noise and temperature: what the reference
    code computes of the paper's equation 4.

    Args:
        counted: (B, S) bool, the targets that count; None is all.
    """
    groups, entries = probabilities.shape[-2:]
    return 1 - perplexity(_mean(probabilities, counted)) / (groups * entries)


def perplexity(shares: Tensor) -> Tensor:
    """The sum of exp(entropy) of some distributions, (G, V) -> (): G where each has a single value, G V where all are uniform."""
    # Of a share of 0, the logarithm of the smallest number: finite, as is its gradient.
    return (-(shares * shares.clamp(min=torch.finfo(shares.dtype).tiny).log()).sum(-1)).exp().sum()


def code_shares(codes: Tensor, entries: int, counted: Tensor | None = None) -> Tensor:
    """How often each entry was chosen: (B, S, G) -> (G, V), the sum over V being 1."""
    return _mean((codes.unsqueeze(-1) == torch.arange(entries, device=codes.device)).float(), counted)


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """The mean over utterances and targets: (B, S, G, V) -> (G, V)."""
    if counted is None:
        return values.mean((0, 1))
    weights = counted.to(values.dtype)
    return torch.einsum("bs,bsgv->gv", weights / weights.sum(), values)
