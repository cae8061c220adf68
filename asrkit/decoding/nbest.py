"""N-best lists as a user reads them: no text twice, and how sure each word of the best text is, by them or by a lattice.

Shapes: N texts of an utterance, W words of the best one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.search import BEAMS, CTC_GRAPH
from asrkit.decoding.words import word_frames
from asrkit.reporting.wer import NOTHING, align

HOTTEST = 100.0  # temperatures that calibration looks at lie between 1 and this, or its inverse


def distinct(hypotheses: Sequence[Hypothesis], tokenizer: Tokenizer) -> list[Hypothesis]:
    """One hypothesis for each text, in the order given: the first with it, its score the log of the sum over all of them.

    A text may be spelled by several sequences of tokens.
    """
    firsts: dict[str, Hypothesis] = {}
    scores: dict[str, list[float]] = {}
    for hypothesis in hypotheses:
        text = tokenizer.decode(hypothesis.tokens)
        firsts.setdefault(text, hypothesis)
        scores.setdefault(text, []).append(hypothesis.score)
    return [
        Hypothesis(first.tokens, first.frames, float(np.logaddexp.reduce(scores[text])))
        for text, first in firsts.items()
    ]


@dataclass(frozen=True)
class Alternative:
    """A text, and the natural logarithm of the sum of its hypotheses' scores."""

    text: str
    score: float


@dataclass(frozen=True)
class PieceTexts:
    """The n-best texts of a piece of a file, which begins at ``start`` and ends at ``end``, in seconds."""

    start: float
    end: float
    texts: list[Alternative]


def cannot_list(nbest: int, method: str, beam: int) -> list[str]:
    """Why a search has no ``nbest`` texts; [] if it may."""
    if not nbest or method == CTC_GRAPH:
        return []
    if method not in BEAMS:
        return [f"--nbest {nbest}: --method {method} has one text only; decode with --method beam, ctc-beam or --graph"]
    if nbest > beam:
        return [f"--nbest {nbest}: a beam of {beam} ends with {beam} hypotheses at most; give --beam {nbest}"]
    return []


def no_confidence(option: str, method: str) -> str:
    """Why an option about confidences is of no use to a search; "" if it is."""
    if method in (*BEAMS, CTC_GRAPH):
        return ""
    return f"{option}: --method {method} has no alternatives; choose beam, ctc-beam or --graph"


def bad_temperature(temperature: float | None) -> list[str]:
    """Why confidences cannot have this temperature; [] if they can."""
    if temperature is None or 0 < temperature < math.inf:
        return []
    return [f"--confidence-temperature {temperature}: must be a number above 0"]


def alternatives(hypotheses: Sequence[Hypothesis], tokenizer: Tokenizer, most: int) -> list[Alternative]:
    """The texts of one utterance's hypotheses in their order, at most ``most``; see ``distinct``."""
    return [Alternative(tokenizer.decode(h.tokens), h.score) for h in distinct(hypotheses, tokenizer)[:most]]


class WordConfidence(Protocol):
    """How sure each word of an utterance's best text is."""

    words: list[str]

    def confidences(self, temperature: float = 1.0) -> Tensor:
        """A number between 0 and 1 for each word, (W,); a higher ``temperature`` makes them less sure."""


def word_confidence(hypotheses: Sequence[Hypothesis], tokenizer: Tokenizer) -> WordConfidence:
    """By the lattice's posteriors where the best text has them, otherwise by the n-best texts."""
    if hypotheses[0].posteriors:
        return LatticeConfidence(hypotheses[0], tokenizer)
    return Agreement(distinct(hypotheses, tokenizer), tokenizer)


class LatticeConfidence:
    """How sure each word is by the posteriors of its tokens in a lattice: those of the least likely token, as no word is likelier than
    any of its tokens (our choice)."""

    def __init__(self, hypothesis: Hypothesis, tokenizer: Tokenizer) -> None:
        words = word_frames(hypothesis, tokenizer)
        self.words = [word.text for word in words]
        lowest = [min(hypothesis.posteriors[token] for token in word.pieces) for word in words]
        self.log_odds = torch.tensor(lowest, dtype=torch.float64).logit(eps=1e-6)

    def confidences(self, temperature: float = 1.0) -> Tensor:
        """The probabilities (W,), whose log odds are divided by ``temperature``.

        Source: Guo et al. 2017, temperature scaling of two classes.
        """
        return (self.log_odds / temperature).sigmoid()


class Agreement:
    """How far the texts of an utterance agree with the best one, word by word, with their scores.

    matches: (N, W) bool, whether a text has the best one's word in its place, by an alignment with the fewest errors. scores: (N,).
    """

    def __init__(self, hypotheses: Sequence[Hypothesis], tokenizer: Tokenizer) -> None:
        words = [[word.text for word in word_frames(hypothesis, tokenizer)] for hypothesis in hypotheses]
        self.words = words[0]
        self.matches = torch.tensor([_matches(words[0], other) for other in words]).view(len(words), len(words[0]))
        self.scores = torch.tensor([hypothesis.score for hypothesis in hypotheses], dtype=torch.float64)

    def confidences(self, temperature: float = 1.0) -> Tensor:
        """The posterior probability (W,) of each word of the best text: the sum over the texts that have it in its place, where a
        text's probability is its score's over ``temperature``, renormalized over the N texts.

        Source: Wessel et al. 2001, section III, on n-best lists.
        """
        posteriors = (self.scores / temperature).softmax(dim=0)
        return posteriors @ self.matches.to(posteriors.dtype)


def _matches(best: Sequence[str], other: Sequence[str]) -> list[bool]:
    return [one == two for one, two in align(best, other) if one != NOTHING]


def calibrate(utterances: Sequence[WordConfidence], right: Sequence[Sequence[bool]]) -> float:
    """The temperature with which the confidences of words predict best which are right: least cross-entropy, on dev data.

    Args:
        right: for each utterance, whether each word of its best text is right.

    Source: Guo et al. 2017, temperature scaling; there of a network's outputs, here of an n-best list's scores or a lattice's log odds.
    """
    correct = torch.tensor([bool(word) for words in right for word in words], dtype=torch.float64)

    def cross_entropy(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        rows = [utterance.confidences(temperature) for utterance in utterances]
        confidences = torch.cat(rows).clamp(1e-6, 1 - 1e-6)  # a word that all texts have would make it infinite
        return float(torch.nn.functional.binary_cross_entropy(confidences, correct))

    if correct.numel() == 0:
        return 1.0
    from scipy.optimize import minimize_scalar  # half a second, which most commands never need

    bounds = (-np.log(HOTTEST), np.log(HOTTEST))
    return float(np.exp(minimize_scalar(cross_entropy, bounds=bounds, method="bounded").x))
