"""N-best lists: no text twice, and how sure each word of the best text is.

Shapes: N texts of an utterance, W words of the best one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.hypothesis import Hypothesis
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


Scorer = Callable[[Sequence[Sequence[int]]], Sequence[float]]  # log P of sequences of tokens, by a language model


def rescored(n_best: Sequence[Sequence[Hypothesis]], scorer: Scorer, scale: float) -> list[list[Hypothesis]]:
    """N-best lists of a batch by their score + ``scale`` log P(text), the best one first."""
    if scale == 0:
        return [list(hypotheses) for hypotheses in n_best]
    scores = iter(scorer([hypothesis.tokens for hypotheses in n_best for hypothesis in hypotheses]))
    return [
        sorted(
            (Hypothesis(h.tokens, h.frames, h.score + scale * next(scores)) for h in hypotheses),
            key=lambda hypothesis: -hypothesis.score,
        )
        for hypotheses in n_best
    ]


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


def calibrate(utterances: Sequence[Agreement], right: Sequence[Sequence[bool]]) -> float:
    """The temperature with which the confidences of words predict best which are right: least cross-entropy, on dev data.

    Args:
        right: for each utterance, whether each word of its best text is right.

    Source: Guo et al. 2017, temperature scaling; there of a network's outputs, here of an n-best list's scores.
    """
    correct = torch.tensor([bool(word) for words in right for word in words], dtype=torch.float64)

    def cross_entropy(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        rows = [utterance.confidences(temperature) for utterance in utterances]
        confidences = torch.cat(rows).clamp(1e-6, 1 - 1e-6)  # a word that all texts have would make it infinite
        return float(torch.nn.functional.binary_cross_entropy(confidences, correct))

    if correct.numel() == 0:
        return 1.0
    bounds = (-np.log(HOTTEST), np.log(HOTTEST))
    return float(np.exp(minimize_scalar(cross_entropy, bounds=bounds, method="bounded").x))
