"""Forced alignment: which frames a known text takes.

Shapes: B utterances, T frames, S states of a path, U symbols, V vocabulary with blank 0, P phones, D cepstra.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lhotse.supervision import AlignmentItem
from torch import Tensor
from torch.nn import functional as F

from asrkit.data.senones import SMALLEST_VARIANCE, cepstra_of, parts_of
from asrkit.frames import FRAME_SHIFT


def viterbi(emissions: Tensor, frame_lens: Tensor, state_lens: Tensor, optional: Tensor) -> tuple[Tensor, Tensor]:
    """The best way through states from the first to the last, each frame staying in its state or going on to the next.

    Args:
        emissions: (B, T, S) log-likelihoods; frame_lens, state_lens: (B,), each at least 1.
        optional: (B, S) bool, states that may be left out, no two of them neighbors.

    Returns:
        (B, T) int64 the state of each frame, -1 beyond ``frame_lens`` and where there is no way; (B,) its log-likelihood, -inf
        where there is none.
    """
    num_frames, num_states = emissions.shape[1:]
    alpha = torch.full_like(emissions[:, 0], -torch.inf)
    alpha[:, 0] = emissions[:, 0, 0]
    if num_states > 1:
        alpha[:, 1] = emissions[:, 0, 1].masked_fill(~optional[:, 0], -torch.inf)
    barred = ~F.pad(optional, (1, 0))[:, :-1]  # states that cannot be entered by skipping the one before
    steps = []
    for frame in range(1, num_frames):
        ways = [alpha, F.pad(alpha, (1, 0), value=-torch.inf)[:, :-1]]
        if num_states > 2:
            ways.append(F.pad(alpha, (2, 0), value=-torch.inf)[:, :-2].masked_fill(barred, -torch.inf))
        best, step = torch.stack(ways).max(dim=0)
        active = (frame < frame_lens).unsqueeze(1)
        alpha = torch.where(active, best + emissions[:, frame], alpha)
        steps.append(step.masked_fill(~active, 0).to(torch.int8))
    rows = torch.arange(len(emissions), device=emissions.device)
    state = state_lens - 1
    before = (state - 1).clamp(min=0)
    early = optional[rows, state] & (state_lens > 1) & (alpha[rows, before] > alpha[rows, state])
    state = torch.where(early, before, state)
    scores = alpha[rows, state]
    path = [state]
    for step in reversed(steps):
        state = state - step[rows, state]
        path.append(state)
    states = torch.stack(path[::-1], dim=1)
    beyond = torch.arange(num_frames, device=states.device) >= frame_lens.unsqueeze(1)
    return states.masked_fill(beyond | scores.isinf().unsqueeze(1), -1), scores


def ctc_align(
    log_probs: Tensor, encoder_out_lens: Tensor, symbols: Tensor, symbol_lens: Tensor
) -> tuple[Tensor, Tensor]:
    """The best CTC path of known symbols.

    Args:
        log_probs: (B, T, V); encoder_out_lens, symbol_lens: (B,), frames at least 1.
        symbols: (B, U) int64 without blanks, padded with 0.

    Returns:
        (B, T) int64 the index in ``symbols`` of what a frame emits, -1 for blank, padding, and where no path fits;
        (B,) the path's log-probability, -inf where none fits.

    Source: Graves et al. 2006, with the maximum instead of the sum.
    """
    states = F.pad(symbols, (0, 1)).repeat_interleave(2, dim=1)[:, :-1]  # each symbol twice, and a blank
    labels = states.clone()
    labels[:, 0::2] = 0
    emissions = log_probs.gather(2, labels.unsqueeze(1).expand(-1, log_probs.shape[1], -1))
    optional = torch.zeros_like(labels, dtype=torch.bool)
    optional[:, 0::2] = True
    optional[:, 2:-1:2] = symbols[:, 1:] != symbols[:, :-1]  # equal neighbors need a blank between them
    path, scores = viterbi(emissions, encoder_out_lens, 2 * symbol_lens + 1, optional)
    return torch.where(path % 2 == 1, path // 2, -1), scores


def spans_of(path: Tensor, num_symbols: int, num_frames: int, extension: int) -> Tensor:
    """The frames of each symbol, (U, 2) first and one past the last, of one utterance's path (T,).

    A CTC model emits most symbols in a single frame, with blanks around it. Each symbol is extended at both ends by up to
    ``extension`` blank frames; where fewer than twice as many lie between two symbols, each gets half of them.
    """
    frames = torch.nonzero(path[:num_frames] >= 0).squeeze(1)
    emitted = path[frames]
    indices = torch.arange(num_symbols, device=path.device)
    first = frames[torch.searchsorted(emitted, indices)]
    last = frames[torch.searchsorted(emitted, indices, right=True) - 1] + 1
    ends = torch.tensor([num_frames], device=path.device)
    gap = torch.cat([first, ends]) - torch.cat([ends * 0, last])  # before each symbol, and after the last one
    shared = gap[1:-1]
    before = torch.cat([gap[:1], shared // 2]).clamp(max=extension)
    after = torch.cat([shared - shared // 2, gap[-1:]]).clamp(max=extension)
    return torch.stack([first - before, last + after], dim=1)


@dataclass(frozen=True)
class Gaussians:
    """A diagonal Gaussian of cepstra for each phone: numbers by phone, mean and variance (P, D)."""

    numbers: dict[str, int]
    mean: Tensor
    variance: Tensor

    def log_likelihoods(self, log_mel: np.ndarray) -> Tensor:
        """(T, 80) -> (T, P), without a constant that is the same for all."""
        x = torch.from_numpy(cepstra_of(log_mel)).unsqueeze(1)
        return -0.5 * (self.variance.log() + (x - self.mean).square() / self.variance).sum(dim=-1)


def fit_gaussians(utterances: Iterable[tuple[Sequence[AlignmentItem], np.ndarray]]) -> Gaussians:
    """The Gaussian of each phone, from aligned phones and log-mel features (T, 80) of 10 ms frames."""
    numbers: dict[str, int] = {}
    frames, owners = [], []
    for items, log_mel in utterances:
        cepstra = cepstra_of(log_mel)
        for item in items:
            phone_frames = cepstra[round(item.start / FRAME_SHIFT) : round(item.end / FRAME_SHIFT)]
            frames.append(phone_frames)
            owners.append(np.full(len(phone_frames), numbers.setdefault(item.symbol, len(numbers))))
    x, owner = torch.from_numpy(np.concatenate(frames)), torch.from_numpy(np.concatenate(owners))
    count = torch.bincount(owner, minlength=len(numbers)).clamp(min=1).unsqueeze(1)
    mean, square = (
        torch.zeros(len(numbers), x.shape[1], dtype=x.dtype).index_add(0, owner, values) / count
        for values in (x, x.square())
    )
    return Gaussians(numbers, mean, (square - mean.square()).clamp(min=SMALLEST_VARIANCE))


def even_parts(word: AlignmentItem, symbols: Sequence[str]) -> list[AlignmentItem]:
    """A word's time, shared evenly among its phones or pieces."""
    spans = parts_of(word.start, word.end, len(symbols))
    return [
        AlignmentItem(symbol, start, round(end - start, 4)) for symbol, (start, end) in zip(symbols, spans, strict=True)
    ]


def forced_parts(
    words: Sequence[AlignmentItem], phones: Sequence[Sequence[str]], log_mel: np.ndarray, gaussians: Gaussians
) -> list[AlignmentItem]:
    """The phones of each word where their Gaussians put them within the word, in 10 ms frames; evenly in a word that has fewer
    frames than phones.

    Args:
        words: of one utterance; phones: those of each word; log_mel: (T, 80).
    """
    ends = [(round(word.start / FRAME_SHIFT), min(round(word.end / FRAME_SHIFT), len(log_mel))) for word in words]
    frame_lens = torch.tensor([last - first for first, last in ends])
    state_lens = torch.tensor([len(word_phones) for word_phones in phones])
    fits = frame_lens >= state_lens
    scores = gaussians.log_likelihoods(log_mel)
    emissions = scores.new_zeros(len(words), max(1, int(frame_lens.max())), int(state_lens.max()))
    for row, ((first, last), word_phones) in enumerate(zip(ends, phones, strict=True)):
        emissions[row, : last - first, : len(word_phones)] = scores[
            first:last, [gaussians.numbers[phone] for phone in word_phones]
        ]
    never = torch.zeros(len(words), emissions.shape[2], dtype=torch.bool)
    states, _ = viterbi(emissions, frame_lens.clamp(min=1), state_lens, never)
    items = []
    for row, (word, word_phones) in enumerate(zip(words, phones, strict=True)):
        if not fits[row]:
            items += even_parts(word, word_phones)
            continue
        counts = torch.bincount(states[row, : int(frame_lens[row])], minlength=len(word_phones)).tolist()
        start = ends[row][0]
        for phone, count in zip(word_phones, counts, strict=True):
            items.append(AlignmentItem(phone, round(start * FRAME_SHIFT, 4), round(count * FRAME_SHIFT, 4)))
            start += count
    return items
