"""Decoding graphs from language models: CTC topology ∘ lexicon ∘ grammar, by k2.

The grammar is an n-gram model of pieces or of words, or a list of sentences. The lexicon spells words as the tokenizer does, which is
the only spelling they have, so a path's tokens say its words, and the graph is an acceptor.

Source: Mohri, Pereira and Riley 2002; the order of the steps is icefall's compile_hlg.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from asrkit.data.text.tokenizer import Tokenizer
from asrkit.errors import UserError
from asrkit.models.ctc_graph import END, MAX_ARCS, CtcGraph
from asrkit.models.ngram.arpa import UNKNOWN
from asrkit.models.ngram.automaton import Ngram

TOPOLOGY_GROWTH = 3  # a token's arc becomes at most three with CTC's blanks and repetitions


def graph_of_pieces(k2: ModuleType, lm: Ngram, tokenizer: Tokenizer) -> CtcGraph:
    """The graph of an n-gram model whose symbols are the tokenizer's pieces, 0 being the end."""
    tokens = [token for token in range(1, tokenizer.vocab_size) if token not in tokenizer.special_ids]
    grammar = _grammar(k2, lm, tokens, backoff=0)
    return _with_ctc(k2, grammar, tokenizer.vocab_size)


def graph_of_words(k2: ModuleType, lm: Ngram, spelled: Mapping[int, Sequence[int]], tokenizer: Tokenizer) -> CtcGraph:
    """The graph of an n-gram model of words.

    Args:
        spelled: the tokens of each word, by its number among the model's symbols; other words are not in the graph.
    """
    # Symbols that keep the composition deterministic: the first stands for backing off, the second ends a word whose tokens begin
    # another word's.
    backoff_token, ended = tokenizer.vocab_size, tokenizer.vocab_size + 1
    backoff_word = len(lm.symbols)
    grammar = _grammar(k2, lm, list(spelled), backoff_word)
    lexicon = _lexicon(k2, spelled, backoff_token, ended, backoff_word)
    composed = k2.connect(k2.compose(lexicon, k2.arc_sort(grammar)))
    arcs = composed.arcs.values()[:, :3].clone()
    acceptor = _fsa(k2, arcs, composed.scores)
    acceptor = k2.connect(k2.determinize(k2.arc_sort(acceptor)))
    arcs = acceptor.arcs.values()[:, :3].clone()
    arcs[:, 2] = torch.where(arcs[:, 2] >= tokenizer.vocab_size, 0, arcs[:, 2])
    return _with_ctc(k2, _fsa(k2, arcs, acceptor.scores), tokenizer.vocab_size)


def graph_of_sentences(k2: ModuleType, sentences: Sequence[Sequence[int]], vocab_size: int) -> CtcGraph:
    """The graph that accepts the sentences, each a list of tokens, and nothing else; all are equally likely."""
    after: dict[tuple[int, int], int] = {}  # a tree of their beginnings: the state after each state and token
    ends: dict[int, None] = {}
    for sentence in sentences:
        state = 0
        for token in sentence:
            state = after.setdefault((state, token), len(after) + 1)
        ends[state] = None
    rows = [(state, target, token) for (state, token), target in after.items()]
    rows += [(state, len(after) + 1, END) for state in ends]
    arcs = torch.tensor(sorted(rows), dtype=torch.int32)
    return _with_ctc(k2, _fsa(k2, arcs, torch.zeros(len(arcs))), vocab_size)


def _grammar(k2: ModuleType, lm: Ngram, symbols: Sequence[int], backoff: int) -> Any:
    """The back-off automaton as an acceptor of k2 over some of its symbols; arcs that back off have the label ``backoff``."""
    num_states, num_words = lm.num_states, lm.num_words
    scored = torch.tensor([0, *symbols])
    words = lm.words[scored]
    known = words != lm.words[lm.symbols.index(UNKNOWN)]
    symbol_of = torch.full((num_words,), -1).scatter(0, words[known], scored[known])
    states = torch.arange(num_states)
    longer = states[1:]  # all but the state that remembers nothing, which has nothing to back off to
    lower, backoffs = (part[1:, -1 if lm.order == 1 else 1] for part in (lm.chains, lm.weights))
    keys = lm.keys[num_words:]  # those before are of the state that remembers nothing, which has every word
    source = torch.cat([keys // num_words, torch.zeros_like(scored), longer])
    target = torch.cat([lm.targets[num_words:], lm.targets[words], lower])
    symbol = torch.cat([symbol_of[keys % num_words], scored, torch.full_like(longer, backoff)])
    scores = torch.cat([lm.log_probs[num_words:], lm.log_probs[words], backoffs]).float()
    backs_off = torch.arange(len(symbol)) >= len(symbol) - len(longer)
    ends = (symbol == 0) & ~backs_off
    target = torch.where(ends, num_states, target)
    label = torch.where(ends, END, symbol)
    keep = symbol >= 0
    swap = states.clone()  # k2 begins in state 0
    swap[0], swap[lm.start_state] = lm.start_state, 0
    swap = torch.cat([swap, torch.tensor([num_states])])
    arcs = torch.stack([swap[source], swap[target], label], dim=1)[keep].to(torch.int32)
    return k2.connect(_fsa(k2, arcs, scores[keep]))


def _lexicon(
    k2: ModuleType, spelled: Mapping[int, Sequence[int]], backoff_token: int, ended: int, backoff_word: int
) -> Any:
    """A transducer from the tokens of any words to the words."""
    prefixes = {tuple(tokens[:length]) for tokens in spelled.values() for length in range(1, len(tokens))}
    rows, words, states = [(0, 0, backoff_token)], [backoff_word], 1
    for word, tokens in spelled.items():
        labels = [*tokens, ended] if tuple(tokens) in prefixes else list(tokens)
        stops = [0, *range(states, states + len(labels) - 1), 0]
        states += len(labels) - 1
        rows += list(zip(stops[:-1], stops[1:], labels, strict=True))
        words += [word] + [0] * (len(labels) - 1)
    rows.append((0, states, END))
    words.append(END)
    arcs = torch.tensor(rows, dtype=torch.int32)
    order = arcs[:, 0].argsort(stable=True)
    fsa = k2.Fsa(
        torch.cat([arcs[order], torch.zeros(len(rows), 1, dtype=torch.int32)], dim=1),
        aux_labels=torch.tensor(words, dtype=torch.int32)[order],
    )
    return k2.arc_sort(fsa)


def _with_ctc(k2: ModuleType, acceptor: Any, vocab_size: int) -> CtcGraph:
    """An acceptor of tokens, with epsilons (0) where it backs off, as one of frames.

    Raises:
        UserError: it would have more than ``MAX_ARCS`` arcs.
    """
    acceptor = k2.arc_sort(k2.connect(k2.remove_epsilon(acceptor)))
    if TOPOLOGY_GROWTH * acceptor.num_arcs > MAX_ARCS:
        raise UserError(
            f"the graph would have some {TOPOLOGY_GROWTH * acceptor.num_arcs:,} arcs, more than {MAX_ARCS:,}; train an n-gram of "
            "lower order or with cutoffs"
        )
    graph = k2.arc_sort(k2.connect(k2.compose(k2.ctc_topo(vocab_size - 1), acceptor)))
    if graph.num_arcs == 0:
        raise UserError("the graph accepts nothing; check the texts of the language model")
    return CtcGraph(graph.arcs.values()[:, :3].clone(), graph.scores.clone())


def _fsa(k2: ModuleType, arcs: Tensor, scores: Tensor) -> Any:
    """An acceptor of arcs (A, 3) in any order, with scores (A,)."""
    order = arcs[:, 0].argsort(stable=True)
    arcs, scores = arcs[order], scores[order].float()
    return k2.Fsa(torch.cat([arcs, scores.view(torch.int32).unsqueeze(1)], dim=1))
