"""Greedy and modified beam search for a transducer with a stateless predictor, batched by tensor operations.

Both follow the rule of the runtime the models are exported to (sherpa-onnx): at most one symbol a frame. Special tokens, which
stand for no text, are never emitted: their logits count as -inf, as in the exported files.

Shapes: B utterances, T' encoder frames, K hypotheses an utterance, C context size, J joiner dimension,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from asrkit.decoding.acoustic import AcousticModel
from asrkit.decoding.fusion import Fusion
from asrkit.decoding.hypothesis import (
    Hypothesis,
    NBest,
    append_hash,
    collect,
    collect_n_best,
    n_best_of,
    silent_columns,
    traced,
    without_blanks,
)


def _start_context(model: AcousticModel, device: torch.device) -> Tensor:
    """The context (C,) before any token: -1 = no token, then a blank."""
    context = torch.full((model.context_size,), -1, dtype=torch.int64, device=device)
    context[-1] = model.blank
    return context


def _extend(model: AcousticModel, contexts: Tensor, predicted: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Append ``tokens`` (M,) to the ``rows`` (M,) of ``contexts`` (N, C), and update those of ``predicted`` (N, J), in place."""
    if rows.numel() == 0:
        return
    shifted = torch.cat([contexts.index_select(0, rows)[:, 1:], tokens.unsqueeze(1)], dim=1)
    contexts.index_copy_(0, rows, shifted)
    predicted.index_copy_(0, rows, model.predict(shifted))


def _emitting(tokens: Tensor, emits: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``tokens`` (N,) that ``emits`` (N,) marks, and their tokens."""
    rows = emits.nonzero().squeeze(1)
    return rows, tokens.index_select(0, rows)


@torch.no_grad()
def greedy_search(
    model: AcousticModel,
    joiner_in: Tensor,
    lens: Tensor,
    max_symbols: int = 1,
    special_ids: Collection[int] = (),
) -> list[Hypothesis]:
    """The best symbol at each frame of ``joiner_in`` (B, T', J), at most ``max_symbols`` of them a frame, never one of
    ``special_ids``."""
    batch, num_frames, _ = joiner_in.shape
    contexts = _start_context(model, joiner_in.device).repeat(batch, 1)
    predicted = model.predict(contexts)
    scores = joiner_in.new_zeros(batch)
    blank = contexts.new_tensor(model.blank)
    silent = silent_columns(special_ids, model.blank, joiner_in.device)
    emitted = contexts.new_full((num_frames, max_symbols, batch), model.blank)
    for t in range(num_frames):
        active = t < lens
        for slot in range(max_symbols):
            logits = model.join(joiner_in[:, t], predicted).index_fill(1, silent, -torch.inf)
            best, tokens = logits.log_softmax(dim=-1).max(dim=-1)
            scores = torch.where(active, scores + best, scores)
            tokens = torch.where(active, tokens, blank)
            active = tokens != blank
            _extend(model, contexts, predicted, *_emitting(tokens, active))
            emitted[t, slot] = tokens
            if slot + 1 < max_symbols and not active.any():
                break
    return collect(emitted.flatten(0, 1).T, scores, model.blank, max_symbols)


def _merge(scores: Tensor, prefixes: Tensor) -> Tensor:
    """Add up the probabilities of equal prefixes (B, K) in the first of them; the others get -inf.

    Expects ``scores`` (B, K) best first, so that the likeliest path's frames represent the merged hypothesis.
    """
    same = prefixes.unsqueeze(2) == prefixes.unsqueeze(1)  # (B, K, K)
    added = scores.unsqueeze(1).masked_fill(~same, -torch.inf).logsumexp(dim=2)
    return added.masked_fill(same.tril(-1).any(dim=2), -torch.inf)


@torch.no_grad()
def beam_search(
    model: AcousticModel,
    joiner_in: Tensor,
    lens: Tensor,
    beam: int = 4,
    special_ids: Collection[int] = (),
    fusion: Fusion | None = None,
) -> list[Hypothesis]:
    """Modified beam search over ``joiner_in`` (B, T', J) with ``beam`` hypotheses an utterance, without ``special_ids``.

    At each frame the ``beam`` best of all (hypothesis, symbol) pairs survive, then those with equal tokens
    are merged by adding their probabilities. The final choice is by log-probability over length, where the
    length counts the start context as the runtime does.

    Args:
        fusion: what else counts, language models for instance; None: nothing.
    """
    ended = _beams(model, joiner_in, lens, beam, special_ids, fusion)
    best = ended.normalized(model.context_size).argmax(dim=1, keepdim=True)  # (B, 1)
    return collect(ended.in_order(best).squeeze(1), ended.scores.gather(1, best).squeeze(1), model.blank)


@torch.no_grad()
def beam_hypotheses(
    model: AcousticModel,
    joiner_in: Tensor,
    lens: Tensor,
    beam: int = 4,
    special_ids: Collection[int] = (),
    fusion: Fusion | None = None,
) -> list[list[Hypothesis]]:
    """Every hypothesis that ``beam_search`` ends with, of each utterance, in its order: the first is the one it returns."""
    ended = _beams(model, joiner_in, lens, beam, special_ids, fusion)
    _, order = ended.normalized(model.context_size).sort(dim=1, descending=True, stable=True)
    return collect_n_best(ended.in_order(order), ended.scores.gather(1, order), model.blank)


@torch.no_grad()
def beam_n_best(
    model: AcousticModel,
    joiner_in: Tensor,
    lens: Tensor,
    beam: int = 4,
    special_ids: Collection[int] = (),
    fusion: Fusion | None = None,
) -> NBest:
    """Every hypothesis that ``beam_search`` ends with, the likeliest first; no two of an utterance have the same tokens."""
    ended = _beams(model, joiner_in, lens, beam, special_ids, fusion)
    scores, order = ended.scores.sort(dim=1, descending=True)
    return n_best_of(ended.in_order(order), scores, model.blank)


class _Beams(NamedTuple):
    """The hypotheses after the last frame: scores (B, K), how many tokens each has (B, K), and what it emitted in each frame
    (B, K, T'), a token or blank."""

    scores: Tensor
    sizes: Tensor
    emitted: Tensor

    def normalized(self, context_size: int) -> Tensor:
        """What the final choice is by, (B, K)."""
        return self.scores / (self.sizes + context_size)

    def in_order(self, order: Tensor) -> Tensor:
        """What the hypotheses ``order`` (B, N) emitted (B, N, T')."""
        return self.emitted.gather(1, order.unsqueeze(2).expand(-1, -1, self.emitted.shape[2]))


def _beams(
    model: AcousticModel,
    joiner_in: Tensor,
    lens: Tensor,
    beam: int,
    special_ids: Collection[int],
    fusion: Fusion | None,
) -> _Beams:
    (batch, num_frames, width), device = joiner_in.shape, joiner_in.device
    vocab = model.vocab_size
    contexts = _start_context(model, device).repeat(batch * beam, 1)  # (B * K, C)
    predicted = model.predict(contexts[:1]).repeat(batch * beam, 1)  # (B * K, J)
    scores = joiner_in.new_full((batch, beam), -torch.inf)
    scores[:, 0] = 0.0
    prefixes = torch.zeros(batch, beam, dtype=torch.int64, device=device)
    unmoved = torch.arange(beam, device=device)
    first_row = torch.arange(batch, device=device).unsqueeze(1) * beam
    silent = silent_columns(special_ids, model.blank, device)
    blank = prefixes.new_tensor(model.blank)
    shortest = int(lens.min()) if batch else 0
    parents, emitted = [], []
    fused = [] if fusion is None else fusion.start(batch * beam)
    for t in range(num_frames):
        frame = joiner_in[:, t].unsqueeze(1).expand(-1, beam, -1).reshape(-1, width)
        logits = model.join(frame, predicted).index_fill(1, silent, -torch.inf)
        if fusion is not None:
            logits = fusion.logits(logits, model.blank)
        every = logits.log_softmax(dim=1).view(batch, beam, vocab).add_(scores.unsqueeze(2))
        if fusion is not None and (boosts := fusion.boosts(fused, model.blank)) is not None:
            every = every + boosts.view(batch, beam, vocab)
        grown, pairs = every.flatten(1).topk(beam, dim=1)
        parent = torch.div(pairs, vocab, rounding_mode="floor")
        tokens = pairs - parent * vocab
        if t >= shortest:  # the hypotheses of an utterance that has ended stay
            active = (t < lens).unsqueeze(1)
            grown, parent = torch.where(active, grown, scores), torch.where(active, parent, unmoved)
            tokens = torch.where(active, tokens, blank)
        origin = (first_row + parent).flatten()
        contexts, predicted = contexts.index_select(0, origin), predicted.index_select(0, origin)
        emits = tokens != blank
        rows, new = _emitting(tokens.flatten(), emits.flatten())
        if fusion is not None:  # after the choice, as the runtime does
            gains, fused = fusion.advance(fused, origin, rows, new)
            grown = grown.flatten().index_add(0, rows, gains.to(grown.dtype)).view(batch, beam)
        scores, prefixes = grown, prefixes.gather(1, parent)
        if rows.numel():  # otherwise no two become equal
            prefixes = torch.where(emits, append_hash(prefixes, tokens), prefixes)
            scores = _merge(grown, prefixes)
            _extend(model, contexts, predicted, rows, new)
        parents.append(parent)
        emitted.append(tokens)
    grid = traced(parents, emitted, unmoved.expand(batch, beam))
    if fusion is not None:
        scores = scores + fusion.end(fused, *without_blanks(grid, model.blank))
    return _Beams(scores, (grid != blank).sum(dim=2), grid)


@torch.no_grad()
def sampled_paths(
    model: AcousticModel, joiner_in: Tensor, lens: Tensor, paths: int, special_ids: Collection[int] = ()
) -> Tensor:
    """Paths drawn from the model, frame by frame: one symbol or blank for each frame of ``joiner_in`` (B, T', J).

    Returns:
        (B, paths, T') int64, blank beyond ``lens`` (B,). A path's probability is the product of its symbols'; those of all
        paths add up to 1.
    """
    (batch, num_frames, _), device = joiner_in.shape, joiner_in.device
    contexts = _start_context(model, device).repeat(batch * paths, 1)
    predicted = model.predict(contexts[:1]).repeat(batch * paths, 1)
    silent = silent_columns(special_ids, model.blank, device)
    ended = torch.arange(num_frames, device=device).unsqueeze(1) >= lens.repeat_interleave(paths)  # (T', B * paths)
    emitted = contexts.new_full((num_frames, batch * paths), model.blank)
    for t in range(num_frames):
        frame = joiner_in[:, t].unsqueeze(1).expand(-1, paths, -1).reshape(batch * paths, -1)
        logits = model.join(frame, predicted).float().index_fill(1, silent, -torch.inf)
        probs = logits.softmax(dim=1).nan_to_num(nan=1.0)  # padding, or a model that has diverged
        drawn = torch.multinomial(probs, 1).squeeze(1).masked_fill(ended[t], model.blank)
        _extend(model, contexts, predicted, *_emitting(drawn, drawn != model.blank))
        emitted[t] = drawn
    return emitted.T.reshape(batch, paths, num_frames)
