"""Language models beside CTC: opened, checked against the recognizer's tokenizer, and asked for the probabilities of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.nbest import Scorer
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.losses.language_model import sequence_nll
from asrkit.models.lm import LanguageModel
from asrkit.models.ngram.automaton import Ngram, load_ngram, symbols_of_pieces
from asrkit.models.registry import LM, NGRAM, load_lm, spec_of_kind
from asrkit.run_dir import ARPA, RunDir, open_run

SCORED_AT_ONCE = 64  # texts


def open_language_model(path: Path, tokenizer: Tokenizer, device: torch.device) -> tuple[Ngram | LanguageModel, RunDir]:
    """The n-gram or neural model of a run directory, over the tokenizer's pieces.

    Raises:
        UserError: it is something else, or a model of other units or of another tokenizer's pieces.
    """
    run = open_run(path)
    if run.kind not in (LM, NGRAM):
        raise UserError(f"{path}: is no language model; train one with `asrkit train-lm`")
    unit = spec_of_kind(run, run.kind).unit
    if unit != "bpe":
        use = "; make a graph of it with `asrkit graph`" if unit == "word" else ""
        raise UserError(
            f"{path}: is a language model of {unit} units, and this search needs one of word pieces (bpe){use}"
        )
    if sha256_of(run.tokenizer_path) != sha256_of(tokenizer.path):
        raise UserError(
            f"{path}: its tokenizer is not the recognizer's; train one with `asrkit train-lm --tokenizer {tokenizer.path}`"
        )
    if run.kind == NGRAM:
        return load_ngram(path / ARPA, symbols_of_pieces(tokenizer)).to(device), run
    return load_lm(run).to(device).eval(), run


def scorer_of(model: Ngram | LanguageModel) -> Scorer:
    """log P of sequences of tokens, their ends included."""
    return _Scorer(model)


class _Scorer:
    def __init__(self, model: Ngram | LanguageModel) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        scores: list[float] = []
        for begin in range(0, len(sequences), SCORED_AT_ONCE):
            part = sequences[begin : begin + SCORED_AT_ONCE]
            if isinstance(self.model, Ngram):
                scores += self.model.sequence_log_probs(part).double().sum(dim=1).tolist()
                continue
            device = next(self.model.parameters()).device
            rows = [torch.tensor(sequence, dtype=torch.int64, device=device) for sequence in part]
            symbols, lens = (
                pad_sequence(rows, batch_first=True),
                torch.tensor([len(row) for row in rows], device=device),
            )
            scores += (-sequence_nll(self.model(symbols), symbols, lens)).tolist()
        return scores
