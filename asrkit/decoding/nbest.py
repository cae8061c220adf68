"""n-best lists as a user reads them: the texts of a search's hypotheses, each once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.hypothesis import Hypothesis


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
    if nbest and method != "beam":
        return [f"--nbest {nbest}: --method {method} has one text only; decode with --method beam"]
    if nbest > beam:
        return [f"--nbest {nbest}: a beam of {beam} ends with {beam} hypotheses at most; give --beam {nbest}"]
    return []


def alternatives(hypotheses: Sequence[Hypothesis], tokenizer: Tokenizer, most: int) -> list[Alternative]:
    """The texts of one utterance's hypotheses in their order, at most ``most``; the scores of hypotheses with the same text, which
    split it differently into pieces, are added up."""
    scores: dict[str, float] = {}
    for hypothesis in hypotheses:
        text = tokenizer.decode(hypothesis.tokens)
        before = scores.get(text, -math.inf)
        high, low = max(before, hypothesis.score), min(before, hypothesis.score)
        scores[text] = high + math.log1p(math.exp(low - high))
    return [Alternative(text, score) for text, score in list(scores.items())[:most]]
