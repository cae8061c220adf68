"""When each word, word piece and phone of a cut is spoken, from the CTC path of its text, and how a cut stores it.

An *alignment* is a list of lhotse's items, in seconds from the beginning of the cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from lhotse.cut import Cut
from lhotse.supervision import AlignmentItem
from lhotse.utils import fastcopy

from asrkit.data.batch import Batch, evaluation_parts, named, plain_batch
from asrkit.data.checks import Finding
from asrkit.data.cut_audio import cut_features
from asrkit.data.parallel import ALONE, Workers, in_processes
from asrkit.data.text.tokenizer import WORD_START, Tokenizer
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.alignment import Gaussians, ctc_align, even_parts, fit_gaussians, forced_parts, spans_of
from asrkit.frames import ENCODER_SHIFT, encoder_start

WORD = "word"
SAMPLE = 2000  # cuts the phones' Gaussians are fitted on
Alignment = list[AlignmentItem]
Alignments = dict[str, dict[str, Alignment]]  # by cut id, then unit


def pieces_of_words(text: str, tokenizer: Tokenizer) -> list[list[str]]:
    """The pieces of each word of ``text``."""
    words: list[list[str]] = []
    for token in tokenizer.encode(text):
        piece = tokenizer.id_to_piece(token)
        if piece.startswith(WORD_START) or not words:
            words.append([])
        words[-1].append(piece)
    return words


def align_words(
    acoustic: TorchAcousticModel,
    cuts: Sequence[Cut],
    tokenizer: Tokenizer,
    extension: int,
    max_duration: float,
    workers: Workers = ALONE,
) -> tuple[Alignments, list[Finding]]:
    """``word`` and ``bpe``, the model's own pieces, of each cut; and the cuts whose text no CTC path fits.

    Args:
        extension: encoder frames a unit may grow by at each end. max_duration: seconds of padded audio at once.
    """
    alignments: Alignments = {}
    impossible = []

    def align(part: list[Cut]) -> list[tuple[str, str, Alignment | None]]:
        return list(_align_batch(acoustic, plain_batch(part), tokenizer, extension))

    for aligned in in_processes(align, evaluation_parts(cuts, max_duration), workers, named):
        for cut_id, text, pieces in aligned:
            if pieces is None:
                impossible.append(Finding(cut_id, "alignment", "no CTC path of finite probability fits its text"))
                continue
            by_word: list[Alignment] = []
            for piece in pieces:
                if piece.symbol.startswith(WORD_START) or not by_word:
                    by_word.append([])
                by_word[-1].append(piece)
            words = [_joined(word, parts) for word, parts in zip(text.split(), by_word, strict=True)]
            alignments[cut_id] = {WORD: words, "bpe": pieces}
    return alignments, impossible


def _align_batch(
    acoustic: TorchAcousticModel, batch: Batch, tokenizer: Tokenizer, extension: int
) -> Iterator[tuple[str, str, Alignment | None]]:
    """Id, text and pieces of each cut; None where no path fits."""
    tokens = [tokenizer.encode(text) for text in batch.texts]
    encoded = acoustic.encode(batch.features, batch.feature_lens, batch.languages)
    log_probs = encoded.ctc_log_probs
    assert log_probs is not None
    symbols = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in tokens], batch_first=True)
    symbols = symbols.to(log_probs.device)
    symbol_lens = torch.tensor([len(ids) for ids in tokens], device=log_probs.device)
    paths, scores = ctc_align(log_probs, encoded.lens, symbols, symbol_lens)
    best = log_probs.gather(2, symbols.gather(1, paths.clamp(min=0)).unsqueeze(2)).squeeze(2)
    paths, probs, lens = paths.cpu(), best.exp().cpu(), encoded.lens.tolist()
    for row, (cut_id, text, ids) in enumerate(zip(batch.cut_ids, batch.texts, tokens, strict=True)):
        if not scores[row].isfinite():
            yield cut_id, text, None
            continue
        emits = paths[row] >= 0
        count = torch.bincount(paths[row][emits], minlength=len(ids))
        confidence = torch.bincount(paths[row][emits], probs[row][emits], minlength=len(ids)) / count
        spans = spans_of(paths[row], len(ids), lens[row], extension).tolist()
        pieces = [
            AlignmentItem(
                tokenizer.id_to_piece(token),
                round(encoder_start(first), 4),
                round((last - first) * ENCODER_SHIFT, 4),
                round(float(score), 4),
            )
            for token, (first, last), score in zip(ids, spans, confidence, strict=True)
        ]
        yield cut_id, text, pieces


def _joined(text: str, pieces: Sequence[AlignmentItem]) -> AlignmentItem:
    """A word from its pieces."""
    score = round(float(np.mean([piece.score for piece in pieces])), 4)
    return AlignmentItem(text, pieces[0].start, round(pieces[-1].end - pieces[0].start, 4), score)


def shared_evenly(words: Sequence[AlignmentItem], parts: Sequence[Sequence[str]]) -> Alignment:
    """The phones or pieces of each word, which share its time evenly."""
    return [item for word, symbols in zip(words, parts, strict=True) for item in even_parts(word, symbols)]


def align_phones(
    cuts: Sequence[Cut], alignments: Alignments, phones: Mapping[str, list[list[str]]], passes: int
) -> None:
    """Add ``phone`` to each cut's alignments, where the phones' Gaussians put them within the words.

    Args:
        phones: by cut id, those of each word. passes: how often the Gaussians are fitted to the alignment before; the first one
            is even, and with 0 it stays so.
    """
    for cut in cuts:
        alignments[cut.id]["phone"] = shared_evenly(alignments[cut.id][WORD], phones[cut.id])
    if passes == 0:
        return
    # Every phone must be in the sample, so cuts with one that is not there yet come first.
    known: set[str] = set()
    needed, others = [], []  # type: tuple[list[Cut], list[Cut]]
    for cut in cuts:
        phones_of_cut = {phone for word in phones[cut.id] for phone in word}
        (others if phones_of_cut <= known else needed).append(cut)
        known |= phones_of_cut
    sample = [*needed, *others][: max(SAMPLE, len(needed))]
    features = {cut.id: log_mel_of(cut) for cut in sample}

    def realign(cut: Cut, gaussians: Gaussians, log_mel: np.ndarray) -> Alignment:
        return forced_parts(alignments[cut.id][WORD], phones[cut.id], log_mel, gaussians)

    guess = {cut.id: alignments[cut.id]["phone"] for cut in sample}
    for _ in range(passes - 1):
        gaussians = fit_gaussians((guess[cut.id], features[cut.id]) for cut in sample)
        guess = {cut.id: realign(cut, gaussians, features[cut.id]) for cut in sample}
    gaussians = fit_gaussians((guess[cut.id], features[cut.id]) for cut in sample)
    for cut in cuts:
        log_mel = features[cut.id] if cut.id in features else log_mel_of(cut)
        alignments[cut.id]["phone"] = realign(cut, gaussians, log_mel)


def log_mel_of(cut: Cut) -> np.ndarray:
    """(T, 80) of a cut."""
    return cut_features(cut).numpy()


def with_alignment(cut: Cut, items: Mapping[str, Alignment]) -> Cut:
    """The cut with these alignments in its supervisions, each unit in that of its word.

    Lhotse counts an alignment's times from the beginning of the recording, ``items`` count them from that of the cut.
    """
    supervisions = sorted(cut.supervisions, key=lambda s: s.start)
    counts = [len((s.text or "").split()) for s in supervisions]
    ends = [items[WORD][last - 1].end for last in np.cumsum(counts)]
    parts: list[dict[str, Alignment]] = [{} for _ in supervisions]
    for unit, alignment in items.items():
        owners = np.searchsorted(np.array(ends[:-1]), [item.start + 1e-6 for item in alignment])
        for number, part in enumerate(parts):
            part[unit] = [
                item.with_offset(cut.start) for item, owner in zip(alignment, owners, strict=True) if owner == number
            ]
    whole = [
        fastcopy(supervision, alignment={**(supervision.alignment or {}), **part})
        for supervision, part in zip(supervisions, parts, strict=True)
    ]
    return fastcopy(cut, supervisions=whole)
