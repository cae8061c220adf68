"""Hypotheses and sampled paths of a batch, their errors, and their log-probabilities with a gradient.

Shapes: B utterances, N hypotheses or paths of each, U tokens, T' encoder frames, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from kaldialign import edit_distance
from torch import Tensor
from torch.nn import functional as F

from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.ctc import ctc_beam_n_best
from asrkit.decoding.hypothesis import NBest, silent_columns, without_blanks
from asrkit.decoding.transducer import beam_n_best, sampled_paths
from asrkit.losses.transducer import fits, gather_pruned, prune_ranges, pruned_loss, simple_loss
from asrkit.methods.sequence.config import Head, Unit
from asrkit.models.asr import AsrModel
from asrkit.training.asr_loss import LossConfig


@contextmanager
def searching(model: AsrModel) -> Iterator[TorchAcousticModel]:
    """The model as searches see it: its decoder without dropout, whatever mode the model is in."""
    training = model.predictor.training
    model.predictor.train(False)
    try:
        with torch.no_grad():
            yield TorchAcousticModel(model)
    finally:
        model.predictor.train(training)
        torch.clear_autocast_cache()  # it holds weights cast in this pass, which have no gradient


def find_n_best(
    model: AsrModel, head: Head, encoder_out: Tensor, lens: Tensor, beam: int, special_ids: Sequence[int]
) -> NBest:
    """The hypotheses that the head's beam search ends with; encoder_out (B, T', D), lens (B,)."""
    with searching(model) as acoustic:
        if head == "ctc":
            return ctc_beam_n_best(model.ctc_log_probs(encoder_out), lens, beam, model.blank, special_ids)
        return beam_n_best(acoustic, model.joiner.project_encoder(encoder_out), lens, beam, special_ids)


def with_reference(n_best: NBest, symbols: Tensor, symbol_lens: Tensor, score: float = 0.0) -> NBest:
    """With the reference as one more hypothesis, of any finite ``score``, where it is not among them: (B, N + 1)."""
    size = max(n_best.tokens.shape[2], symbols.shape[1])
    tokens = F.pad(n_best.tokens, (0, size - n_best.tokens.shape[2]))
    reference = F.pad(symbols, (0, size - symbols.shape[1]))
    reference = reference.masked_fill(torch.arange(size, device=symbols.device) >= symbol_lens.unsqueeze(1), 0)
    there = ((tokens == reference.unsqueeze(1)).all(dim=2) & n_best.scores.isfinite()).any(dim=1, keepdim=True)
    scores = torch.full_like(n_best.scores[:, :1], score).masked_fill(there, -torch.inf)
    return NBest(
        torch.cat([tokens, reference.unsqueeze(1)], dim=1),
        torch.cat([n_best.lens, symbol_lens.unsqueeze(1)], dim=1),
        torch.cat([n_best.scores, scores], dim=1),
    )


def errors_of(
    tokens: Tensor,
    lens: Tensor,
    texts: Sequence[str],
    symbols: Tensor,
    symbol_lens: Tensor,
    tokenizer: Tokenizer,
    unit: Unit,
) -> tuple[Tensor, int]:
    """The errors of each hypothesis, (B, N) float32 on its device, and the number of words, characters or tokens that there are to
    get right.

    Args:
        tokens: (B, N, U); lens: (B, N). texts: the references; symbols (B, U), symbol_lens (B,): their tokens.
    """

    def units(ids: list[int], text: str | None) -> list[str] | list[int]:
        if unit == "token":
            return ids
        text = tokenizer.decode(ids) if text is None else text
        return text.split() if unit == "word" else list(" ".join(text.split()))

    rows, total = [], 0
    references = zip(symbols.tolist(), symbol_lens.tolist(), texts, strict=True)
    for (ids, length, text), hypotheses, sizes in zip(references, tokens.tolist(), lens.tolist(), strict=True):
        reference = units(ids[:length], text)
        total += len(reference)
        known: dict[tuple[int, ...], int] = {}  # sampled paths are often alike
        for hypothesis, size in zip(hypotheses, sizes, strict=True):
            key = tuple(hypothesis[:size])
            if key not in known:
                known[key] = edit_distance(reference, units(list(key), None))["total"]
            rows.append(known[key])
    return torch.tensor(rows, dtype=torch.float32, device=tokens.device).view(lens.shape), total


def transducer_log_probs(
    model: AsrModel, encoder_out: Tensor, lens: Tensor, tokens: Tensor, token_lens: Tensor, settings: LossConfig
) -> Tensor:
    """The log-probability of each hypothesis by the pruned transducer loss, (B, N) differentiable; -inf where its topology has no
    path.

    Args:
        encoder_out: (B, T', D); lens: (B,). tokens: (B, N, U); token_lens: (B, N).
    """
    count = tokens.shape[1]
    symbols, symbol_lens = tokens.flatten(0, 1), token_lens.flatten()
    predicted = model.predictor(model.predictor.contexts_of(symbols))  # (B N, U + 1, P)
    lens = lens.repeat_interleave(count)
    possible = fits(settings.topology, lens, symbol_lens)
    symbol_lens = torch.where(possible, symbol_lens, torch.minimum(symbol_lens, lens))
    with torch.no_grad():
        _, px_grad, py_grad = simple_loss(
            model.simple_encoder(encoder_out).repeat_interleave(count, dim=0),
            model.simple_predictor(predicted),
            symbols,
            lens,
            symbol_lens,
            settings.lm_scale,
            settings.am_scale,
            settings.backend,
            settings.topology,
        )
        torch.clear_autocast_cache()
    ranges = prune_ranges(
        px_grad, py_grad, lens, symbol_lens, settings.prune_range, settings.backend, settings.topology
    )
    encoded = model.joiner.project_encoder(encoder_out).repeat_interleave(count, dim=0)
    logits = model.joiner(*gather_pruned(encoded, model.joiner.project_predictor(predicted), ranges))
    losses = pruned_loss(logits, symbols, ranges, lens, symbol_lens, settings.backend, settings.topology)
    return torch.where(possible, -losses, -torch.inf).view(token_lens.shape)


def sample_transducer(
    model: AsrModel, encoder_out: Tensor, lens: Tensor, paths: int, special_ids: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Paths drawn from the transducer, one symbol a frame at most: their tokens (B, N, U) and lengths (B, N), and their
    log-probabilities (B, N), differentiable. Neither the draw nor the probabilities have the predictor's dropout."""
    with searching(model) as acoustic:
        joiner_in = model.joiner.project_encoder(encoder_out)
        emitted = sampled_paths(acoustic, joiner_in, lens, paths, special_ids)
    training = model.predictor.training
    model.predictor.train(False)
    log_probs = path_log_probs(model, encoder_out, lens, emitted, special_ids)
    model.predictor.train(training)
    return *without_blanks(emitted, model.blank), log_probs


def path_log_probs(
    model: AsrModel, encoder_out: Tensor, lens: Tensor, emitted: Tensor, special_ids: Sequence[int]
) -> Tensor:
    """The log-probabilities of paths by the transducer, (B, N) differentiable.

    Args:
        emitted: (B, N, T') the token or blank of each frame.
    """
    tokens, _ = without_blanks(emitted, model.blank)
    predicted = model.predictor(model.predictor.contexts_of(tokens.flatten(0, 1)))  # (B N, U + 1, P)
    emits = emitted != model.blank
    before = (emits.cumsum(dim=2) - emits.long()).flatten(0, 1)  # (B N, T'): tokens before each frame
    rows = before + predicted.shape[1] * torch.arange(len(before), device=before.device).unsqueeze(1)
    contexts = F.embedding(rows, model.joiner.project_predictor(predicted).flatten(0, 1))  # (B N, T', J)
    joiner_in = model.joiner.project_encoder(encoder_out).repeat_interleave(emitted.shape[1], dim=0)
    logits = model.joiner(joiner_in, contexts).float()
    logits = logits.index_fill(2, silent_columns(special_ids, model.blank, logits.device), -torch.inf)
    scores = -F.cross_entropy(logits.flatten(0, 1), emitted.flatten(), reduction="none").view(emitted.shape)
    valid = torch.arange(emitted.shape[2], device=lens.device) < lens.view(-1, 1, 1)
    return torch.where(valid, scores, 0.0).sum(dim=2)


def sample_ctc(
    log_probs: Tensor, lens: Tensor, paths: int, blank: int, special_ids: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from CTC's log_probs (B, T', V), whose frames are independent of each other."""
    silent = silent_columns(special_ids, blank, log_probs.device)
    log_probs = log_probs.index_fill(2, silent, -torch.inf).log_softmax(dim=2)
    batch, num_frames, _ = log_probs.shape
    with torch.no_grad():
        probs = log_probs.exp().nan_to_num(nan=1.0).flatten(0, 1)  # NaN of a model that has diverged
        drawn = torch.multinomial(probs, paths, replacement=True).view(batch, num_frames, paths)
    scores = log_probs.gather(2, drawn).transpose(1, 2)
    drawn = drawn.transpose(1, 2)  # (B, N, T')
    valid = torch.arange(num_frames, device=lens.device) < lens.view(-1, 1, 1)
    repeated = drawn == F.pad(drawn[:, :, :-1], (1, 0), value=blank)
    tokens, token_lens = without_blanks(drawn.masked_fill(repeated | ~valid, blank), blank)
    return tokens, token_lens, torch.where(valid, scores, 0.0).sum(dim=2)
