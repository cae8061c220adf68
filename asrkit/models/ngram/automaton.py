"""An n-gram model as a back-off automaton of tensors, scored for a batch of states at once.

A state is what the model remembers: an n-gram of less than the highest order, or nothing (state 0). A symbol that follows it in
the model is an arc; any other symbol is scored by the state without its oldest word, plus the back-off weight.

Shapes: N states asked at once, S states, A arcs, V symbols (0 is the end of a sequence, as in the neural models), W words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asrkit.data.text.tokenizer import Tokenizer
from asrkit.errors import UserError, clip
from asrkit.models.ngram.arpa import BEGIN, END, UNKNOWN, Arpa, read_arpa

UNKNOWN_LOG_PROB = -100.0 * math.log(10)  # of what a model without <unk> does not know, as KenLM has it
MAX_SUM = 1.05  # what the probabilities after a state may add up to: files have them rounded
SHOWN = 5  # words that an error names


@dataclass(frozen=True)
class Ngram:
    """The automaton. Log-probabilities are natural logarithms; words are those of the model, W of them.

    symbols: the V symbols that are scored; the first is the end. words: (V,) int64, the word of each; that of <unk> for a symbol
        that the model does not have.
    order, num_words: of the model. start_state: the state before the first symbol.
    keys: (A,) int64, state * W + word of each arc, ascending; the first W are those of state 0, which has every word.
    log_probs, targets: (A,) float32 and int64, its score and where it leads. arc_begins: (S + 1,) the first arc of each state.
    chains, weights: (S, order) int64 and float32: each state and those it backs off to, down to 0, and the sum of the back-off
        weights on the way.
    """

    symbols: Sequence[str]
    words: Tensor
    order: int
    num_words: int
    start_state: int
    keys: Tensor
    log_probs: Tensor
    targets: Tensor
    arc_begins: Tensor
    chains: Tensor
    weights: Tensor

    @property
    def num_states(self) -> int:
        return len(self.chains)

    def to(self, device: torch.device) -> Ngram:
        """The same with its tensors on a device."""
        moved: Any = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def step(self, states: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Log P of symbols (N,) after states (N,), and the states after them."""
        return self._step(states, self.words.index_select(0, symbols))

    def advance(self, states: Tensor, symbols: Tensor) -> Tensor:
        """The states (N,) after symbols (N,)."""
        return self.step(states, symbols)[1]

    def score(self, states: Tensor) -> Tensor:
        """Log-probabilities (N, V) of every symbol after each of ``states`` (N,)."""
        number, num_words = torch.arange(len(states), device=states.device), self.num_words
        rows = self.weights[states, -1].unsqueeze(1) + self.log_probs[:num_words]
        for level in range(self.order - 2, -1, -1):  # the longest match is written last
            state, weight = self.chains[states, level], self.weights[states, level]
            begin = self.arc_begins[state]
            counts = torch.where(state > 0, self.arc_begins[state + 1] - begin, 0)
            row = number.repeat_interleave(counts)
            arc = torch.arange(len(row), device=row.device) + (begin - counts.cumsum(0) + counts)[row]
            rows[row, self.keys[arc] % num_words] = weight[row] + self.log_probs[arc]
        return rows[:, self.words]

    def sequence_log_probs(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Log P of each symbol of each sequence, and of its end: (B, longest + 1), 0 beyond it."""
        lens = torch.tensor([len(sequence) for sequence in sequences])
        padded = torch.zeros(len(lens), int(lens.max()) + 1, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            padded[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        states = torch.full((len(lens),), self.start_state, dtype=torch.int64)
        columns = []
        for position in range(padded.shape[1]):
            scores, states = self.step(states, padded[:, position])
            columns.append(scores.masked_fill(position > lens, 0.0))
        return torch.stack(columns, dim=1)

    def _step(self, states: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        wanted = words.unsqueeze(1).add(self.chains.index_select(0, states), alpha=self.num_words)  # (N, order)
        arcs = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
        there = self.keys.index_select(0, arcs.flatten()).view_as(arcs) == wanted
        level = there.to(torch.uint8).argmax(dim=1, keepdim=True)  # the first: the longest match
        arc = arcs.gather(1, level).squeeze(1)
        weight = self.weights.index_select(0, states).gather(1, level).squeeze(1)
        return weight + self.log_probs.index_select(0, arc), self.targets.index_select(0, arc)


def symbols_of_pieces(tokenizer: Tokenizer) -> list[str]:
    """The symbols of a tokenizer for ``load_ngram``: its blank is the end; its other special pieces, which no text has, are unknown."""
    pieces = map(tokenizer.id_to_piece, range(1, tokenizer.vocab_size))
    return [END, *(UNKNOWN if n in tokenizer.special_ids else piece for n, piece in enumerate(pieces, start=1))]


def load_ngram(path: Path, symbols: Sequence[str] | None = None) -> Ngram:
    """The automaton of an ARPA file.

    Args:
        symbols: what is scored, in order, the end first, such as ``symbols_of_pieces``. None: the end, <unk> and every word of the
            file.

    Raises:
        UserError: the file cannot be read, its back-off is broken, or none of its words is among the symbols.
    """
    return automaton(read_arpa(path), symbols, str(path))


def automaton(arpa: Arpa, symbols: Sequence[str] | None, where: str) -> Ngram:
    """The automaton of a model; see ``load_ngram``. ``where`` names the model in errors."""
    rows = {word: row for row, word in enumerate(arpa.vocabulary)}
    own = [word for word in arpa.vocabulary if word not in (BEGIN, END, UNKNOWN)]
    symbols = [END, UNKNOWN, *own] if symbols is None else list(symbols)
    if rows.keys().isdisjoint(set(symbols) - {END, UNKNOWN}):
        raise UserError(
            f"{where}: none of its words, such as {clip(' '.join(own[:SHOWN]))}, is among the units it is needed for, such as "
            f"{clip(' '.join(symbols[2 : 2 + SHOWN]))}; train one of this unit with the same tokenizer (train-lm --tokenizer)"
        )
    unknown = rows.get(UNKNOWN, len(rows))  # one word more where the model has none
    size = len(rows) + (UNKNOWN not in rows)
    words = [rows.get(symbol, unknown) for symbol in symbols]
    index = _Index(arpa, size)
    unigrams = np.full(size, UNKNOWN_LOG_PROB)
    unigrams[: len(rows)] = arpa.sections[0].log_probs
    firsts = np.zeros(size, dtype=np.int64)  # the state after each word alone
    if arpa.order > 1:
        firsts[: len(rows)] = 1 + np.arange(len(rows))
    keys, log_probs, targets = [np.arange(size)], [unigrams], [firsts]
    lower, backoffs = [np.zeros(1, dtype=np.int64)], [np.zeros(1)]
    for n, section in enumerate(arpa.sections, start=1):
        longest = index.longest(section.words[:, 1:])
        if n < arpa.order:
            lower.append(longest)
            backoffs.append(section.backoffs)
        if n == 1:
            continue
        histories = index.rows(section.words[:, :-1])
        if (histories < 0).any():
            row = int((histories < 0).argmax())
            text = " ".join(arpa.vocabulary[word] for word in section.words[row])
            raise UserError(
                f"{where}: its back-off is broken: it has the {n}-gram {clip(text)!r} but not the {n - 1}-gram of its first "
                f"{n - 1} words; make the model again"
            )
        if (np.diff(index.sorted[n]) == 0).any():
            raise UserError(f"{where}: the same {n}-gram stands there twice; make the model again")
        order = index.order[n]
        keys.append(((index.begins[n - 2] + histories) * size + section.words[:, -1])[order])
        log_probs.append(section.log_probs[order])
        targets.append((longest if n == arpa.order else index.begins[n - 1] + np.arange(len(longest)))[order])
    all_keys = np.concatenate(keys)
    chains, weights = _chains(np.concatenate(lower), np.concatenate(backoffs), arpa.order)
    model = Ngram(
        symbols=symbols,
        words=torch.tensor(words),
        order=arpa.order,
        num_words=size,
        start_state=int(firsts[rows[BEGIN]]) if BEGIN in rows else 0,
        keys=torch.from_numpy(all_keys),
        log_probs=torch.from_numpy(np.concatenate(log_probs)).float(),
        targets=torch.from_numpy(np.concatenate(targets)),
        arc_begins=torch.from_numpy(np.searchsorted(all_keys, np.arange(len(chains) + 1) * size)),
        chains=torch.from_numpy(chains),
        weights=torch.from_numpy(weights).float(),
    )
    _check_sums(model, arpa, index, where)
    return model


def _chains(lower: np.ndarray, backoffs: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """``chains`` and ``weights`` of ``Ngram``, of the state each one backs off to and its weight, (S,)."""
    states, weights = [np.arange(len(lower))], [np.zeros(len(lower))]
    for _ in range(order - 1):
        weights.append(weights[-1] + backoffs[states[-1]])
        states.append(lower[states[-1]])
    return np.stack(states, axis=1), np.stack(weights, axis=1)


class _Index:
    """Where the n-grams of a model are: state 0, then those of each order below the highest, in the order of the file."""

    def __init__(self, arpa: Arpa, size: int) -> None:
        self.size = size
        self.begins = np.concatenate([[1], 1 + np.cumsum(arpa.counts[:-1], dtype=np.int64)])
        self.sorted: dict[int, np.ndarray] = {}
        self.order: dict[int, np.ndarray] = {}
        for n, section in enumerate(arpa.sections[1:], start=2):
            keys = self.rows(section.words[:, :-1]) * size + section.words[:, -1]
            self.order[n] = np.argsort(keys, kind="stable")
            self.sorted[n] = keys[self.order[n]]

    def rows(self, words: np.ndarray) -> np.ndarray:
        """The row of each n-gram of ``words`` (G, n) in its section; -1 for one that is not there."""
        rows = words[:, 0].astype(np.int64)
        for n in range(2, words.shape[1] + 1):
            keys = rows * self.size + words[:, n - 1]
            places = np.searchsorted(self.sorted[n], keys)
            places = np.minimum(places, max(len(self.sorted[n]) - 1, 0))
            there = (rows >= 0) & (self.sorted[n][places] == keys) if len(self.sorted[n]) else np.zeros(len(rows), bool)
            rows = np.where(there, self.order[n][places] if len(self.sorted[n]) else 0, -1)
        return rows

    def longest(self, words: np.ndarray) -> np.ndarray:
        """The state of the longest end of ``words`` (G, n) that the model has."""
        states = np.zeros(len(words), dtype=np.int64)
        for n in range(1, words.shape[1] + 1):
            rows = self.rows(words[:, -n:])
            states = np.where(rows >= 0, self.begins[n - 1] + rows, states)
        return states


def _check_sums(model: Ngram, arpa: Arpa, index: _Index, where: str) -> None:
    """Refuse a model whose probabilities add up to more than 1 after some history: its back-off weights are not of these n-grams."""
    unigrams = float(model.log_probs[: len(arpa.vocabulary)].double().exp().sum())
    if unigrams > MAX_SUM:
        raise UserError(f"{where}: its unigrams' probabilities add up to {unigrams:.3g}, not 1; make the model again")
    if model.order == 1:
        return
    keys = model.keys[model.num_words :]
    states = torch.div(keys, model.num_words, rounding_mode="floor")
    below, _ = model._step(model.chains[states, 1], keys % model.num_words)
    sums = [
        torch.zeros(model.num_states, dtype=torch.float64).index_add(0, states, scores.double().exp())
        for scores in (model.log_probs[model.num_words :], below)
    ]
    total = sums[0] + model.weights[:, 1].double().exp() * (1.0 - sums[1]).clamp(min=0.0)
    followed = torch.bincount(states, minlength=model.num_states) > 0
    worst = int(total.masked_fill(~followed, 0.0).argmax())
    if followed.any() and float(total[worst]) > MAX_SUM:
        n = int(np.searchsorted(index.begins, worst, side="right"))
        words = arpa.sections[n - 1].words[worst - int(index.begins[n - 1])]
        text = " ".join(arpa.vocabulary[word] for word in words)
        raise UserError(
            f"{where}: its back-off is broken: the probabilities after {clip(text)!r} add up to {float(total[worst]):.3g}, not 1; "
            "make the model again"
        )
