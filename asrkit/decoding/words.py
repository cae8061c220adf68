"""Words and when they begin, from pieces and frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

from asrkit.data.text.tokenizer import WORD_START, Tokenizer
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.frames import ENCODER_SHIFT


@dataclass(frozen=True)
class Word:
    """A word, and in seconds when its first piece was emitted and when the frame of its last piece ends; a transducer emits
    somewhat late.

    confidence: the probability that the word is right, None where the search has no alternatives to it.
    """

    text: str
    start: float
    end: float
    confidence: float | None = None


@dataclass(frozen=True)
class WordFrames:
    """A word, the encoder frames that emitted its first and last piece, and which of the tokens are its pieces."""

    text: str
    first: int
    last: int
    pieces: range


def word_frames(hypothesis: Hypothesis, tokenizer: Tokenizer) -> list[WordFrames]:
    """The words of a hypothesis with the frames of their first and last piece."""
    groups: list[list[tuple[int, int]]] = []
    for token, frame in zip(hypothesis.tokens, hypothesis.frames, strict=True):
        if not groups or tokenizer.id_to_piece(token).startswith(WORD_START):
            groups.append([])
        groups[-1].append((token, frame))
    words, end = [], 0
    for group in groups:
        begin, end = end, end + len(group)
        text = tokenizer.decode([token for token, _ in group]).strip()
        # A piece that is only the space says nothing of when the word begins.
        spoken = [frame for token, frame in group if tokenizer.id_to_piece(token) != WORD_START]
        if text and spoken:
            words.append(WordFrames(text, spoken[0], spoken[-1], range(begin, end)))
    return words


def timed_words(
    hypothesis: Hypothesis,
    tokenizer: Tokenizer,
    offset: float = 0.0,
    confidences: Sequence[float] | None = None,
) -> list[Word]:
    """The words of a hypothesis whose first frame lies ``offset`` seconds into the recording, each with its confidence."""
    words = word_frames(hypothesis, tokenizer)
    return [
        Word(
            word.text,
            round(offset + word.first * ENCODER_SHIFT, 2),
            round(offset + (word.last + 1) * ENCODER_SHIFT, 2),
            confidence,
        )
        for word, confidence in zip(words, confidences or repeat(None, len(words)), strict=True)
    ]
