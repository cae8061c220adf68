"""Greedy and prefix beam search for CTC."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from asrkit.decoding.fusion import TokenScorer
from asrkit.decoding.hypothesis import (
    Hypothesis,
    NBest,
    append_hash,
    collect,
    collect_n_best,
    n_best_of,
    silent_columns,
    traced,
)


@torch.no_grad()
def ctc_greedy_search(
    log_probs: Tensor, lens: Tensor, blank: int = 0, special_ids: Collection[int] = ()
) -> list[Hypothesis]:
    """The best symbol at each frame of ``log_probs`` (B, T', V) but for ``special_ids``, without repeats and blanks.

    A repeated symbol counts at its first frame.
    """
    silent = silent_columns(special_ids, blank, log_probs.device)
    best, tokens = log_probs.index_fill(2, silent, -torch.inf).max(dim=-1)  # (B, T')
    valid = torch.arange(tokens.shape[1], device=tokens.device) < lens.unsqueeze(1)
    repeated = tokens == pad(tokens[:, :-1], (1, 0), value=blank)
    emitted = tokens.masked_fill(repeated | ~valid, blank)
    return collect(emitted, best.masked_fill(~valid, 0.0).sum(dim=1), blank)


@dataclass(frozen=True)
class CtcFusion:
    """What counts beside CTC: a text's score is log P(text | speech) + the weighted scores of ``parts`` + ``bonus`` for each token.

    Every candidate is scored before the best are chosen, so the states of the parts are numbers, as those of n-grams and of hotwords
    are; they are kept as tensors (..., P).

    Source: Hannun et al. 2014, equation 3; there of words.
    """

    parts: Sequence[tuple[TokenScorer, float]]
    bonus: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether it changes any score."""
        return self.bonus != 0 or any(weight != 0 for _, weight in self.parts)

    def start(self, batch: int, beam: int, device: torch.device) -> Tensor:
        """The states (B, K, P) before the first token."""
        states = [part.start(batch * beam)[0].view(batch, beam) for part, _ in self.parts]
        none = torch.zeros(batch, beam, 0, dtype=torch.int64, device=device)
        return torch.stack(states, dim=2) if states else none

    def step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What ``tokens`` (...) add to the score after states (..., P), and the states after them."""
        total, after = torch.full(tokens.shape, self.bonus, device=tokens.device), states.clone()
        for number, (part, weight) in enumerate(self.parts):
            scores, (changed,) = part.step((states[..., number].flatten(),), tokens.flatten())
            total = total + weight * scores.view(tokens.shape)
            after[..., number] = changed.view(tokens.shape)
        return total, after

    def end(self, states: Tensor) -> Tensor:
        """What the end of the text adds after states (..., P)."""
        total = torch.zeros(states.shape[:-1], device=states.device)
        for number, (part, weight) in enumerate(self.parts):
            total = total + weight * part.end((states[..., number].flatten(),)).view(total.shape)
        return total


def ctc_beam_n_best(
    log_probs: Tensor, lens: Tensor, beam: int = 4, blank: int = 0, special_ids: Collection[int] = ()
) -> NBest:
    """The ``beam`` likeliest texts that a prefix beam search keeps, the likeliest first; each adds up the paths it has seen.

    Args:
        log_probs: (B, T', V); lens: (B,).
    """
    emitted, scores = _ctc_beams(log_probs, lens, beam, blank, special_ids, None)
    return n_best_of(emitted, scores, blank)


def ctc_beam_search(
    log_probs: Tensor,
    lens: Tensor,
    beam: int = 4,
    blank: int = 0,
    special_ids: Collection[int] = (),
    fusion: CtcFusion | None = None,
) -> list[list[Hypothesis]]:
    """The same as hypotheses, by the score of ``fusion`` where there is one; with weights and a bonus of 0 it changes nothing."""
    fusion = fusion if fusion is not None and fusion.counts else None
    emitted, scores = _ctc_beams(log_probs, lens, beam, blank, special_ids, fusion)
    return collect_n_best(emitted, scores, blank)


@torch.no_grad()
def _ctc_beams(
    log_probs: Tensor, lens: Tensor, beam: int, blank: int, special_ids: Collection[int], fusion: CtcFusion | None
) -> tuple[Tensor, Tensor]:
    """Prefix beam search: what each of the last hypotheses emitted in each frame (B, K, T'), and their scores (B, K), best first.

    Source: Graves et al. 2006 and Hannun et al. 2014, batched by tensor operations: equal prefixes are found by their hashes, and
    a frame's symbols are its ``beam`` + 1 likeliest ones.
    """
    silent = silent_columns(special_ids, blank, log_probs.device)
    log_probs = log_probs.index_fill(2, silent, -torch.inf)
    (batch, num_frames, vocab), device = log_probs.shape, log_probs.device
    choices = min(beam + 1, vocab - 1)
    tokens_only = log_probs.index_fill(2, torch.tensor([blank], device=device), -torch.inf)
    best, symbols = tokens_only.topk(choices, dim=2)  # (B, T', C)
    ends_blank = log_probs.new_full((batch, beam), -torch.inf)  # of each prefix, the paths that end with a blank
    ends_token = ends_blank.clone()  # and those that end with its last token
    ends_blank[:, 0] = 0.0
    prefixes = torch.zeros(batch, beam, dtype=torch.int64, device=device)
    last = torch.full_like(prefixes, blank)
    unmoved = torch.arange(beam, device=device).expand(batch, beam)
    fused = torch.zeros_like(ends_blank)  # of each prefix, what the language model adds, and its state
    states = (fusion or CtcFusion([])).start(batch, beam, device)  # (B, K, P)
    parents, emitted = [], []
    for t in range(num_frames):
        total = torch.logaddexp(ends_blank, ends_token)
        added = symbols[:, t].unsqueeze(1).expand(-1, beam, -1)  # (B, K, C)
        before = torch.where(added == last.unsqueeze(2), ends_blank.unsqueeze(2), total.unsqueeze(2))
        grown = before + best[:, t].unsqueeze(1)
        longer = append_hash(prefixes.unsqueeze(2), added)
        # A prefix that grows into another one of the beam adds to it instead of standing twice.
        same = longer.unsqueeze(3) == prefixes.view(batch, 1, 1, beam)  # (B, K, C, K)
        same = same & total.isfinite().view(batch, 1, 1, beam)
        joins = grown.unsqueeze(3).masked_fill(~same, -torch.inf).flatten(1, 2).logsumexp(dim=1)
        grown = grown.masked_fill(same.any(dim=3), -torch.inf)
        stays = ends_token + log_probs[:, t].gather(1, last).masked_fill(last == blank, -torch.inf)
        stays = torch.logaddexp(stays, joins)
        rests = total + log_probs[:, t, blank].unsqueeze(1)
        everything = torch.cat([torch.logaddexp(stays, rests), grown.flatten(1)], dim=1)
        if fusion is not None:
            gains, after = fusion.step(states.unsqueeze(2).expand(-1, -1, choices, -1), added)
            all_fused = torch.cat([fused, (fused.unsqueeze(2) + gains).flatten(1)], dim=1)
            all_states = torch.cat([states, after.flatten(1, 2)], dim=1)
            everything = everything + all_fused
        _, chosen = everything.topk(beam, dim=1)
        grows = chosen >= beam
        pair = (chosen - beam).clamp(min=0)
        parent = torch.where(grows, torch.div(pair, choices, rounding_mode="floor"), chosen)
        token = torch.where(grows, added.flatten(1).gather(1, pair), blank)
        active = (t < lens).unsqueeze(1)
        parent, token = torch.where(active, parent, unmoved), torch.where(active, token, blank)
        new_blank = rests.gather(1, parent).masked_fill(grows, -torch.inf)
        new_token = torch.where(grows, grown.flatten(1).gather(1, pair), stays.gather(1, parent))
        ends_blank, ends_token = (
            torch.where(active, new, old) for new, old in ((new_blank, ends_blank), (new_token, ends_token))
        )
        if fusion is not None:
            fused = torch.where(active, all_fused.gather(1, chosen), fused)
            picked = all_states.gather(1, chosen.unsqueeze(2).expand(-1, -1, states.shape[2]))
            states = torch.where(active.unsqueeze(2), picked, states)
        emits = token != blank
        prefixes, last = prefixes.gather(1, parent), last.gather(1, parent)
        prefixes, last = torch.where(emits, append_hash(prefixes, token), prefixes), torch.where(emits, token, last)
        parents.append(parent)
        emitted.append(token)
    scores = torch.logaddexp(ends_blank, ends_token)
    if fusion is not None:
        scores = scores + fused + fusion.end(states)
    scores, order = scores.sort(dim=1, descending=True)
    return traced(parents, emitted, order), scores
