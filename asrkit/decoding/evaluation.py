"""Decoding against references."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asrkit.data.batch import Batch
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import AcousticModel
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.search import Method, decode
from asrkit.reporting.wer import ErrorCounts, Scored, total_chars, total_words


def score(batch: Batch, hypotheses: Sequence[Hypothesis], tokenizer: Tokenizer) -> list[Scored]:
    """Each utterance of a batch beside its reference, with the pieces that were emitted and when."""
    return [
        Scored(
            cut_id,
            ref,
            tokenizer.decode(hypothesis.tokens),
            language,
            pieces=tuple(map(tokenizer.id_to_piece, hypothesis.tokens)),
            frames=tuple(hypothesis.frames),
        )
        for cut_id, ref, hypothesis, language in zip(
            batch.cut_ids, batch.texts, hypotheses, batch.languages, strict=True
        )
    ]


def measure_wer(
    model: AcousticModel,
    batches: Iterable[Batch],
    tokenizer: Tokenizer,
    method: Method = "greedy",
    beam: int = 4,
) -> tuple[ErrorCounts, ErrorCounts, list[tuple[str, str, str]]]:
    """Word errors, character errors, and (cut id, reference, hypothesis) of every utterance."""
    scored: list[Scored] = []
    for batch in batches:
        hypotheses = decode(
            model, batch.features, batch.feature_lens, method, beam, batch.languages, tokenizer.special_ids
        )
        scored += score(batch, hypotheses, tokenizer)
    return total_words(scored), total_chars(scored), [(s.cut_id, s.ref, s.hyp) for s in scored]
