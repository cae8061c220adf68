"""What language models of several units teach a recognizer's frames through heads of their own.

Shapes: B utterances, T' encoder frames, N segments (units of an alignment), V a unit's vocabulary.
Source: Lee and Chang, arXiv 2110.10429, equations 1 to 4; the interpolated labels of equation 3 are those of
Bai et al., arXiv 1907.06017.
"""

from __future__ import annotations

import torch
from torch import Tensor

SILENCE = 0  # a head's class for frames of no unit: the blank, which is no unit of any inventory


def lm_posteriors(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(v / T) of equation 1: logits (..., V) -> (..., V), float32, without gradient."""
    return (logits.detach().float() / temperature).softmax(dim=-1)


def rearrange(of_segments: Tensor, frames: Tensor) -> Tensor:
    """Each frame's row is that of its segment (figure 2): (B, N, V) or (B, N), frames (B, T') int64 -> (B, T', V) or (B, T').

    ``frames`` says which segment a frame belongs to, -1 being none: such a frame's row is that of segment 0, to be masked.
    """
    rows = torch.arange(len(frames), device=frames.device).unsqueeze(1)
    return of_segments[rows, frames.clamp(min=0)]


def one_hot_silence(frames: Tensor, num_classes: int) -> Tensor:
    """Targets (B, T', V) that are silence everywhere, for frames of no unit."""
    silent = torch.zeros(num_classes, device=frames.device)
    silent[SILENCE] = 1.0
    return silent.expand(*frames.shape, num_classes)


def soft_cross_entropy(logits: Tensor, targets: Tensor, counted: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_i targets_i log softmax(u / T)_i over an utterance's counted frames.

    Args:
        logits: u, (B, T', V); targets: (B, T', V), rows of which sum to 1; counted: (B, T') bool.
        temperature: of the student; the paper's is 1.

    Returns:
        (B,) float32.
    """
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    return -(targets * log_probs).sum(dim=-1).masked_fill(~counted, 0.0).sum(dim=1)


def label_cross_entropy(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """-log softmax(u)_y over an utterance's counted frames: (B, T', V), (B, T') int64, (B, T') bool -> (B,) float32."""
    log_probs = logits.float().log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -log_probs.masked_fill(~counted, 0.0).sum(dim=1)


def interpolated_labels(labels: Tensor, soft: Tensor, weight: float) -> Tensor:
    """lambda Y + (1 - lambda) softmax(v / T), the targets of equation 3: labels (B, T') int64, soft (B, T', V) -> (B, T', V)."""
    targets = (1.0 - weight) * soft
    return targets.scatter_add(-1, labels.unsqueeze(-1), torch.full_like(targets[..., :1], weight))


def multi_task(main: Tensor, taught: Tensor, shares: Tensor, weight: float) -> Tensor:
    """lambda * main + (1 - lambda) * sum_j w_j * taught_j (equation 4; the sum over several heads is our choice).

    Args:
        main: (B,); taught: (J, B), a head's cross-entropies in each row; shares: (J,) the w_j.

    Returns:
        (B,).
    """
    return weight * main + (1.0 - weight) * (shares.unsqueeze(1) * taught).sum(dim=0)


def frame_accuracy(logits: Tensor, labels: Tensor, counted: Tensor) -> tuple[int, int]:
    """How many of the counted frames have their label as the best class, and how many are counted."""
    right = (logits.argmax(dim=-1) == labels) & counted
    return int(right.sum()), int(counted.sum())
