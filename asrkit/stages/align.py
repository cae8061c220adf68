"""align: when each word, word piece, phone or senone of a manifest is said, by the CTC head of a trained model.

The paper this serves takes the alignments of a GMM-HMM (arXiv 2110.10429); CTC in its place is ours, and so is all that a CTC path
leaves open: who owns the frames that say nothing, and where a word's phones meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from lhotse.cut import Cut, MonoCut
from lhotse.supervision import AlignmentItem
from lhotse.utils import fastcopy
from pydantic import Field

from asrkit.config import config
from asrkit.data.batch import Batch, evaluation_batches
from asrkit.data.checks import Finding, find_bad_cuts
from asrkit.data.corpora.espeak import load_espeak
from asrkit.data.cut_audio import cut_features
from asrkit.data.manifests import language_of, open_cuts, text_of, write_cuts
from asrkit.data.senones import SenoneConfig, grow_tree, load_tree, save_tree
from asrkit.data.text.phones import phones_of
from asrkit.data.text.tokenizer import WORD_START, Tokenizer
from asrkit.data.text.units import Unit
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.alignment import Gaussians, ctc_align, even_parts, fit_gaussians, forced_parts, spans_of
from asrkit.devices import choose_device
from asrkit.errors import UserError
from asrkit.frames import ENCODER_SHIFT, encoder_start
from asrkit.models import AsrModel, load_model
from asrkit.nn.context import parse_context
from asrkit.run_dir import open_run

WORD = "word"
SAMPLE = 2000  # cuts the phones' Gaussians are fitted on
Alignments = dict[str, dict[str, list[AlignmentItem]]]  # by cut id, then unit


@config
class AlignConfig:
    """Settings of align."""

    units: list[Unit] = field(default_factory=lambda: ["bpe"])  # type: ignore[arg-type, unused-ignore]
    """Units to align besides words: bpe, phone, senone."""
    variant: str | None = None
    """Variant whose CTC head aligns, in the first context it was trained in; null is the model's default."""
    bad_cuts: Literal["refuse", "skip"] = "refuse"
    """What to do with cuts that cannot be aligned: refuse to start, or skip and list them."""
    max_duration: Annotated[float, Field(gt=0)] = 120.0
    """Seconds of audio aligned at once."""
    extension: Annotated[int, Field(ge=0)] = 5
    """Encoder frames of 40 ms by which a unit may grow at each end into frames where the CTC head says only blank."""
    phones: Literal["even", "gaussian"] = "even"
    """How phones share the time of their word: even, or gaussian, a second forced pass in frames of 10 ms."""
    passes: Annotated[int, Field(ge=1)] = 3
    """How often the Gaussians of `phones=gaussian` are fitted to the alignment before."""
    language: str = ""
    """Language of supervisions that name none, for their phones."""
    senones: SenoneConfig = field(default_factory=SenoneConfig)
    """The tree of senones grown on the manifest when none is given."""


@dataclass(frozen=True)
class Aligned:
    """How many cuts were written, the mean score of their words, the cuts left out and why, and where the tree of senones is, if one
    was grown."""

    cuts: int
    score: float
    left_out: list[Finding]
    tree: Path | None


def align(
    parent: Path,
    manifest: Path,
    out: Path,
    settings: AlignConfig,
    *,
    tokenizer: Path | None = None,
    senones: Path | None = None,
    device: str = "auto",
) -> Aligned:
    """Write the manifest's cuts to ``out``, with alignments in their supervisions.

    Args:
        tokenizer: of the bpe units; a word's time is shared evenly among its pieces. None takes the model's own, which the CTC
            path times itself.
        senones: the tree to use; None grows one on these cuts and writes it beside ``out``, as OUT.senones.yaml.

    Raises:
        UserError: an unusable run, manifest or option, or cuts that cannot be aligned, listed by id; nothing is written.
    """
    torch_device = choose_device(device)
    run = open_run(parent)
    model = load_model(run)
    _check_options(out, settings, tokenizer, senones)
    tree = None if senones is None else load_tree(senones)
    pieces = Tokenizer(run.tokenizer_path)
    other = None if tokenizer is None else Tokenizer(tokenizer)
    cuts = list(open_cuts(manifest))
    findings = find_bad_cuts(cuts, pieces, read_audio=True, languages=model.spec.languages)
    findings += [Finding(cut.id, "words", said) for cut in cuts for said in _unusual(cut, pieces, other)]
    phones: dict[str, list[list[str]]] = {}
    if {"phone", "senone"} & {*settings.units}:
        load_espeak()  # refuses once for all cuts, where it is not installed
        for cut in cuts:
            try:
                phones[cut.id] = phones_of(text_of(cut), language_of(cut) or settings.language)
                if tree is not None:
                    tree.senones_of(list(chain.from_iterable(phones[cut.id])))
            except UserError as error:
                findings.append(Finding(cut.id, "phones", str(error)))
    good = _without(cuts, findings, settings.bad_cuts)
    alignments, lost = _words_and_pieces(model.to(torch_device), good, pieces, settings)
    findings += lost
    good = _without(good, lost, settings.bad_cuts)
    if other is not None:
        for cut in good:
            split = _pieces_of_words(text_of(cut), other)
            words = zip(alignments[cut.id][WORD], split, strict=True)
            alignments[cut.id]["bpe"] = [item for word, mine in words for item in even_parts(word, mine)]
    if phones:
        _add_phones(good, alignments, phones, settings)
    grown = None
    if "senone" in settings.units:
        if tree is None:
            grown = _beside(out)
            tree = grow_tree(((alignments[cut.id]["phone"], _log_mel(cut)) for cut in good), settings.senones)
            save_tree(tree, grown)
        for cut in good:
            alignments[cut.id]["senone"] = tree.align(alignments[cut.id]["phone"])
    wanted = (WORD, *settings.units)
    write_cuts(out, (_with_alignment(cut, {unit: alignments[cut.id][unit] for unit in wanted}) for cut in good))
    score = np.mean([word.score for cut in good for word in alignments[cut.id][WORD]])
    return Aligned(len(good), float(score), findings, grown)


def _check_options(out: Path, settings: AlignConfig, tokenizer: Path | None, senones: Path | None) -> None:
    findings = []
    if not out.name.endswith(".jsonl.gz"):
        findings.append(f"--out {out}: is a manifest; give it a name that ends in .jsonl.gz")
    if tokenizer is not None and "bpe" not in settings.units:
        findings.append("--tokenizer: is for --unit bpe")
    if senones is not None and "senone" not in settings.units:
        findings.append("--senones: is for --unit senone")
    if findings:
        raise UserError.of(findings)


def _without(cuts: Sequence[Cut], findings: Sequence[Finding], policy: str) -> list[Cut]:
    """The cuts that nothing was found of; under ``refuse`` there must be no other."""
    if findings and policy == "refuse":
        raise UserError.of(
            [f"cut {f.cut_id}: {f.kind}: {f.detail}" for f in findings]
            + [f"{len(findings)} findings: mend the manifest, or leave these cuts out with --set bad_cuts=skip"]
        )
    bad = {finding.cut_id for finding in findings}
    good = [cut for cut in cuts if cut.id not in bad]
    if not good:
        raise UserError("no cut is left that can be aligned")
    return good


def _unusual(cut: Cut, own: Tokenizer, other: Tokenizer | None) -> Iterator[str]:
    """Why a cut's alignment could not be written, or its pieces not be told apart by word."""
    if not isinstance(cut, MonoCut):
        yield "is a mix of several; align what it was mixed from"
    if other is not None and (missing := other.missing_characters(text_of(cut))):
        yield f"{other.path} has no {' '.join(sorted(missing))!r} (text: {text_of(cut)!r})"
    for tokenizer in filter(None, (own, other)):
        if len(_pieces_of_words(text_of(cut), tokenizer)) != len(text_of(cut).split()):
            yield f"{tokenizer.path} does not part {text_of(cut)!r} into its words"


def _pieces_of_words(text: str, tokenizer: Tokenizer) -> list[list[str]]:
    words: list[list[str]] = []
    for number in tokenizer.encode(text):
        piece = tokenizer.id_to_piece(number)
        if piece.startswith(WORD_START) or not words:
            words.append([])
        words[-1].append(piece)
    return words


def _words_and_pieces(
    model: AsrModel, cuts: Sequence[Cut], tokenizer: Tokenizer, settings: AlignConfig
) -> tuple[Alignments, list[Finding]]:
    """The model's own pieces and the words they make, of each cut; and the cuts no path fits."""
    name = model.spec.variant if settings.variant is None else settings.variant
    model.submodels_of(name)  # refuses a name that is none
    context = parse_context(model.spec.variants[name].contexts[0])
    acoustic = TorchAcousticModel(model, name, context)
    alignments: Alignments = {}
    lost = []
    for batch in evaluation_batches(cuts, settings.max_duration):
        for cut_id, items in _align_batch(acoustic, batch, tokenizer, settings.extension):
            if items is None:
                lost.append(Finding(cut_id, "alignment", "no CTC path of finite probability fits its text"))
                continue
            by_word: list[list[AlignmentItem]] = []
            for item in items:
                if item.symbol.startswith(WORD_START) or not by_word:
                    by_word.append([])
                by_word[-1].append(item)
            texts = batch.texts[batch.cut_ids.index(cut_id)].split()
            words = [_joined(text, parts) for text, parts in zip(texts, by_word, strict=True)]
            alignments[cut_id] = {WORD: words, "bpe": items}
    return alignments, lost


def _align_batch(
    acoustic: TorchAcousticModel, batch: Batch, tokenizer: Tokenizer, extension: int
) -> Iterator[tuple[str, list[AlignmentItem] | None]]:
    tokens = [tokenizer.encode(text) for text in batch.texts]
    encoded = acoustic.encode(batch.features, batch.feature_lens, batch.languages)
    log_probs = encoded.ctc_log_probs
    assert log_probs is not None
    symbols = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in tokens], batch_first=True)
    symbol_lens = torch.tensor([len(ids) for ids in tokens])
    paths, scores = ctc_align(log_probs, encoded.lens, symbols.to(log_probs.device), symbol_lens.to(log_probs.device))
    best = log_probs.gather(2, symbols.to(log_probs.device).gather(1, paths.clamp(min=0)).unsqueeze(2)).squeeze(2)
    paths, probs, lens = paths.cpu(), best.exp().cpu(), encoded.lens.tolist()
    for row, (cut_id, ids) in enumerate(zip(batch.cut_ids, tokens, strict=True)):
        if not scores[row].isfinite():
            yield cut_id, None
            continue
        said = paths[row] >= 0
        count = torch.bincount(paths[row][said], minlength=len(ids))
        confidence = torch.bincount(paths[row][said], probs[row][said], minlength=len(ids)) / count
        spans = spans_of(paths[row], len(ids), lens[row], extension).tolist()
        yield (
            cut_id,
            [
                AlignmentItem(
                    tokenizer.id_to_piece(number),
                    round(encoder_start(first), 4),
                    round((last - first) * ENCODER_SHIFT, 4),
                    round(float(score), 4),
                )
                for number, (first, last), score in zip(ids, spans, confidence, strict=True)
            ],
        )


def _joined(text: str, parts: Sequence[AlignmentItem]) -> AlignmentItem:
    """A word from its pieces."""
    score = round(float(np.mean([part.score for part in parts])), 4)
    return AlignmentItem(text, parts[0].start, round(parts[-1].end - parts[0].start, 4), score)


def _log_mel(cut: Cut) -> np.ndarray:
    return cut_features(cut).numpy()


def _add_phones(
    cuts: Sequence[Cut], alignments: Alignments, phones: Mapping[str, list[list[str]]], settings: AlignConfig
) -> None:
    """Add ``phone`` to each cut's alignments."""
    for cut in cuts:
        words = zip(alignments[cut.id][WORD], phones[cut.id], strict=True)
        alignments[cut.id]["phone"] = [item for word, mine in words for item in even_parts(word, mine)]
    if settings.phones == "even":
        return
    # Every phone must be in the sample, so cuts with one that is not there yet come first.
    known: set[str] = set()
    needed, others = [], []  # type: tuple[list[Cut], list[Cut]]
    for cut in cuts:
        mine = {phone for word in phones[cut.id] for phone in word}
        (others if mine <= known else needed).append(cut)
        known |= mine
    sample = [*needed, *others][: max(SAMPLE, len(needed))]
    heard = {cut.id: _log_mel(cut) for cut in sample}

    def again(cut: Cut, gaussians: Gaussians, log_mel: np.ndarray) -> list[AlignmentItem]:
        return forced_parts(alignments[cut.id][WORD], phones[cut.id], log_mel, gaussians)

    guess = {cut.id: alignments[cut.id]["phone"] for cut in sample}
    for _ in range(settings.passes - 1):
        gaussians = fit_gaussians((guess[cut.id], heard[cut.id]) for cut in sample)
        guess = {cut.id: again(cut, gaussians, heard[cut.id]) for cut in sample}
    gaussians = fit_gaussians((guess[cut.id], heard[cut.id]) for cut in sample)
    for cut in cuts:
        log_mel = heard[cut.id] if cut.id in heard else _log_mel(cut)
        alignments[cut.id]["phone"] = again(cut, gaussians, log_mel)


def _beside(out: Path) -> Path:
    return out.with_name(out.name.removesuffix(".jsonl.gz") + ".senones.yaml")


def _with_alignment(cut: Cut, items: Mapping[str, list[AlignmentItem]]) -> Cut:
    """The cut with these alignments in its supervisions, each unit in that of its word.

    Lhotse counts an alignment's times from the beginning of the recording, ``items`` count them from that of the cut.
    """
    supervisions = sorted(cut.supervisions, key=lambda s: s.start)
    counts = [len((s.text or "").split()) for s in supervisions]
    ends = [items[WORD][last - 1].end for last in np.cumsum(counts)]
    parts: list[dict[str, list[AlignmentItem]]] = [{} for _ in supervisions]
    for unit, mine in items.items():
        owners = np.searchsorted(np.array(ends[:-1]), [item.start + 1e-6 for item in mine])
        for number, part in enumerate(parts):
            part[unit] = [
                item.with_offset(cut.start) for item, owner in zip(mine, owners, strict=True) if owner == number
            ]
    whole = [
        fastcopy(supervision, alignment={**(supervision.alignment or {}), **part})
        for supervision, part in zip(supervisions, parts, strict=True)
    ]
    return fastcopy(cut, supervisions=whole)
