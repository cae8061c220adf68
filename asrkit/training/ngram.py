"""N-gram models as run directories: estimated from sentences, measured on those held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from asrkit.config import config
from asrkit.data.sequences import Sentence
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.models.ngram.arpa import END, UNKNOWN, write_arpa
from asrkit.models.ngram.automaton import Ngram, automaton, symbols_of_pieces
from asrkit.models.ngram.kneser_ney import estimate
from asrkit.models.spec import NgramSpec
from asrkit.run_dir import ARPA, TOKENIZER
from asrkit.training.run_writer import whole_run

MEASURED_TOGETHER = 512  # sentences


@config
class NgramConfig:
    """An n-gram model with modified Kneser-Ney smoothing (Chen and Goodman 1998)."""

    order: Annotated[int, Field(ge=2, le=10)] = 4
    """Number of units of the longest n-grams."""
    cutoffs: list[Annotated[int, Field(ge=0)]] = field(default_factory=list)
    """By order, the number of occurrences up to which n-grams are left out, as in [0, 0, 1, 2]; the last one counts for higher
    orders. Empty: none is."""

    @model_validator(mode="after")
    def _grow(self) -> Any:
        if list(self.cutoffs) != sorted(self.cutoffs) or self.cutoffs[:1] > [0]:
            raise ValueError("cutoffs must begin with 0 and not decrease, as in [0, 0, 1, 2]")
        return self


def train_ngram(
    sentences: Iterable[tuple[Sentence, Sequence[str], bool]],
    out: Path,
    how: NgramConfig,
    tokenizer: Tokenizer | None,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path | None],
    command: str,
    note: Callable[[str], None],
) -> None:
    """Estimate an n-gram model and write it as the run directory ``out``.

    Args:
        sentences: each with its units, and whether it is held out to measure on.
        tokenizer: of bpe units, all of whose pieces are in the model; None for words, of which those of the sentences are.
        settings, inputs, command: for the run's config.yaml and lineage.
        note: is called with what was made and how well it predicts what was held out.

    Raises:
        UserError: what ``sentences`` raises, or ``out`` cannot be written.
    """
    pieces = [] if tokenizer is None else symbols_of_pieces(tokenizer)
    numbers = {piece: n for n, piece in enumerate(sorted({*pieces} - {END, UNKNOWN}, key=pieces.index))}
    words: set[str] = set()
    rows, held_out = [], []
    for sentence, units, measured in sentences:
        if measured:
            held_out.append((sentence.text.split(), units))
            continue
        words.update(sentence.text.split())
        rows.append(np.array([numbers.setdefault(unit, len(numbers)) for unit in units], dtype=np.int64))
    arpa, notes = estimate(rows, list(numbers), how.order, how.cutoffs)
    for line in notes:
        note(f"{out}: {line}")
    model = automaton(arpa, None, str(out))
    unit: Literal["bpe", "word"] = "word" if tokenizer is None else "bpe"
    spec = NgramSpec(unit=unit, vocab_size=len(model.symbols), order=how.order, counts=arpa.counts)
    with whole_run(out, "train-lm", settings, spec, inputs, command=command) as (folder, entry):
        write_arpa(arpa, folder / ARPA)
        if tokenizer is not None:
            tokenizer.copy_to(folder / TOKENIZER)
        entry["metrics"] = measure(model, held_out, words)
    size = (out / ARPA).stat().st_size
    note(f"{out}: {how.order}-gram model of {unit} units, {sum(arpa.counts):,} n-grams, {size:,} bytes")
    if not held_out:
        note(f"{out}: no sentence is held out, so perplexity is not measured; pass --dev or raise held_out")
        return
    metrics = entry["metrics"]
    note(
        f"{out}: {len(held_out)} held-out sentences: perplexity {metrics['perplexity']:.2f} a {unit} unit, "
        f"{100 * metrics['oov_rate']:.2f} % of their words do not occur in the training text"
    )


def measure(model: Ngram, held_out: Sequence[tuple[Sequence[str], Sequence[str]]], words: set[str]) -> dict[str, float]:
    """Perplexity over the units that the model has, ends included, and the share of words that are not among ``words``.

    Args:
        held_out: the words and the units of each sentence.
    """
    ids = {symbol: number for number, symbol in enumerate(model.symbols)}
    unknown = ids[UNKNOWN]
    total, count = 0.0, 0
    for first in range(0, len(held_out), MEASURED_TOGETHER):
        part = [[ids.get(unit, unknown) for unit in units] for _, units in held_out[first : first + MEASURED_TOGETHER]]
        scores = model.sequence_log_probs(part)
        for row, sequence in zip(scores.double(), part, strict=True):
            known = [position for position, unit in enumerate(sequence) if unit != unknown]
            total += float(row[[*known, len(sequence)]].sum())
            count += len(known) + 1
    if not count:
        return {}
    spoken = [word for text, _ in held_out for word in text]
    oov = sum(word not in words for word in spoken) / max(1, len(spoken))
    return {"perplexity": math.exp(-total / count), "oov_rate": oov}
