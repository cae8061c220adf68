"""Hotwords: phrases whose tokens get a bonus while a hypothesis spells them, taken back where it breaks off.

The automaton is Aho and Corasick's (1975) over tokens, with the rules of the runtime the models are exported to (sherpa-onnx's
ContextGraph, not strict): each token of a phrase adds its score; a token that leaves the phrase takes back what a longer match no
longer has; a phrase that is complete keeps its bonus, and the next token begins afresh.

Shapes: N hypotheses, S states (0 is the root), V vocabulary.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from asrkit.data.text.tokenizer import Tokenizer, single_spaces
from asrkit.decoding.phrases import read_lines
from asrkit.errors import UserError, clip

MAX_PHRASES = 100_000
MOST_EDGES = 3_000_000  # of the automaton, of which every one takes a few hundred bytes while it is built
MAX_FINDINGS = 20  # unusable lines that an error names


@dataclass
class _Node:
    """A state while the automaton is built; ``score`` is that of all tokens from the root to here."""

    token_score: float = 0.0
    score: float = 0.0
    ends: bool = False
    fail: int = 0
    output: int = 0  # the longest phrase that ends here as the end of a longer one; 0: none
    next: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Hotwords:
    """The automaton as tensors.

    scores: (S,) what each state has added and would be taken back. root_gains, root_targets: (V,) what a token adds at the root,
    and the state after it. keys: (E + 1,) state * V + token, ascending, of the pairs that lead elsewhere than the token does from
    the root, and one that none is; gains, targets: (E + 1,).
    """

    scores: Tensor
    root_gains: Tensor
    root_targets: Tensor
    keys: Tensor
    gains: Tensor
    targets: Tensor

    def step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens (N,) add to hypotheses in ``states`` (N,), and their next states."""
        wanted = states * len(self.root_gains) + tokens
        place = torch.searchsorted(self.keys, wanted)
        there = self.keys[place] == wanted
        gains = torch.where(there, self.gains[place], self.root_gains[tokens] - self.scores[states])
        return gains, torch.where(there, self.targets[place], self.root_targets[tokens])

    def all_gains(self, states: Tensor) -> Tensor:
        """What each token would add, (N, V), to hypotheses in ``states`` (N,)."""
        gains, vocab = self.root_gains - self.scores[states].unsqueeze(1), len(self.root_gains)
        begin = torch.searchsorted(self.keys, states * vocab)
        counts = torch.searchsorted(self.keys, (states + 1) * vocab) - begin
        row = torch.arange(len(states), device=states.device).repeat_interleave(counts)
        edge = torch.arange(len(row), device=states.device) + (begin - counts.cumsum(0) + counts)[row]
        gains[row, self.keys[edge] % vocab] = self.gains[edge]
        return gains

    def to(self, device: torch.device) -> Hotwords:
        """The same with its tensors on a device."""
        return Hotwords(*(getattr(self, name.name).to(device) for name in fields(self)))


def build_hotwords(phrases: Mapping[tuple[int, ...], float], vocab_size: int, first: float = 1.0) -> Hotwords:
    """The automaton of phrases, each a sequence of tokens with the score of each of them; the first token's is multiplied by ``first``."""
    nodes = [_Node()]
    for phrase, score in phrases.items():
        state = 0
        for position, token in enumerate(phrase):
            added = score * first if position == 0 else score
            if token not in nodes[state].next:
                nodes[state].next[token] = len(nodes)
                nodes.append(_Node(added))
            child = nodes[nodes[state].next[token]]
            child.token_score = max(added, child.token_score)  # of phrases that begin alike
            state = nodes[state].next[token]
        nodes[state].ends = True
    for node in nodes:  # once all of them are known, parents first
        for child in map(nodes.__getitem__, node.next.values()):
            child.score = node.score + child.token_score
    order = _fail_links(nodes)
    elsewhere: dict[int, dict[int, int]] = {
        0: {}
    }  # by state, the state after each token that has an edge below the root
    rows: list[tuple[int, float, int]] = []
    for state in order:
        elsewhere[state] = {**elsewhere[nodes[state].fail], **nodes[state].next}
        for token, target in elsewhere[state].items():
            direct = nodes[state].next.get(token) == target
            gain = nodes[target].token_score if direct else nodes[target].score - nodes[state].score
            rows.append((state * vocab_size + token, *_settled(nodes, target, gain)))
        if len(rows) > MOST_EDGES:
            raise UserError(
                f"{len(phrases)} hotwords make a search table of more than {MOST_EDGES:,} entries; give fewer phrases"
            )
    rows.sort()
    rows.append((torch.iinfo(torch.int64).max, 0.0, 0))
    root = {token: _settled(nodes, target, nodes[target].token_score) for token, target in nodes[0].next.items()}
    keys, gains, targets = zip(*rows, strict=True)
    return Hotwords(
        torch.tensor([node.score for node in nodes]),
        torch.tensor([root.get(token, (0.0, 0))[0] for token in range(vocab_size)]),
        torch.tensor([root.get(token, (0.0, 0))[1] for token in range(vocab_size)]),
        torch.tensor(keys),
        torch.tensor(gains),
        torch.tensor(targets),
    )


def _fail_links(nodes: Sequence[_Node]) -> list[int]:
    """Give each state the longest other state that it ends with; returns the states but for the root, shorter ones first."""
    order, waiting = [], deque(nodes[0].next.values())
    while waiting:
        state = waiting.popleft()
        order.append(state)
        for token, child in nodes[state].next.items():
            fail = nodes[state].fail
            while token not in nodes[fail].next and fail:
                fail = nodes[fail].fail
            nodes[child].fail = nodes[fail].next.get(token, 0)
            waiting.append(child)
    for state in order:
        fail = nodes[state].fail
        nodes[state].output = fail if nodes[fail].ends else nodes[fail].output
    return order


def _settled(nodes: Sequence[_Node], target: int, gain: float) -> tuple[float, int]:
    """What a step to ``target`` adds and where it ends: a complete phrase keeps its own score and returns to the root."""
    node = nodes[target]
    if node.ends:
        return gain, 0
    if node.output:
        return gain + nodes[node.output].score - node.score, 0
    return gain, target


def read_hotwords(path: Path, tokenizer: Tokenizer, score: float, first: float = 1.0) -> Hotwords:
    """The automaton of a file with one phrase a line, as sherpa-onnx reads it: ``SAN FRANCISCO`` or, with a score of its own for
    each token, ``SAN FRANCISCO :2.5``.

    Args:
        score: for each token of the other phrases. first: the first token's share of a phrase's score.

    Raises:
        UserError: the file cannot be read, is too large, has no phrase, or a line for each phrase that the tokenizer cannot spell or whose score
            is no number.
    """
    lines = read_lines(path, "word or phrase")
    phrases: dict[tuple[int, ...], float] = {}
    findings = []
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"(.*?)(?:\s+:(\S+))?", single_spaces(line))
        assert match is not None
        text, own = match[1], match[2]
        if not text:
            continue
        try:
            value = score if own is None else float(own)
        except ValueError:
            value = float("nan")
        if not -1e4 < value < 1e4:
            findings.append(
                f"{path}:{number}: {clip(own or score)!r} is not a score; write a number after the colon, such as :2.5"
            )
        elif problem := tokenizer.cannot_spell(text):
            findings.append(f"{path}:{number}: {problem}")
        else:
            phrases[tuple(tokenizer.encode(text))] = value
    if len(phrases) > MAX_PHRASES:
        findings.append(f"{path}: has more than {MAX_PHRASES} phrases")
    if not phrases and not findings:
        findings.append(f"{path}: has no word or phrase")
    if findings:
        more = [f"{path}: {len(findings)} unusable lines"] if len(findings) > MAX_FINDINGS else []
        raise UserError.of([*findings[:MAX_FINDINGS], *more])
    return build_hotwords(phrases, tokenizer.vocab_size, first)
