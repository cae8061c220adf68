"""align: when each word, word piece, phone or senone of a manifest is spoken, by the CTC head of a trained model.

The paper this serves (arXiv 2110.10429) takes the alignments of a GMM-HMM. CTC in its place is our choice, and so is all that a CTC
path leaves open: which unit gets the frames where it says blank, and where a word's phones meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from lhotse.cut import Cut, MonoCut
from pydantic import Field

from asrkit.config import config
from asrkit.data.checks import Finding, find_bad_cuts
from asrkit.data.espeak import load_espeak
from asrkit.data.manifests import language_of, open_cuts, text_of, write_cuts
from asrkit.data.parallel import ALONE, Workers
from asrkit.data.senones import SenoneConfig, grow_tree, load_tree, save_tree
from asrkit.data.text.phones import phones_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.text.units import Unit
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.cut_alignment import (
    WORD,
    align_phones,
    align_words,
    log_mel_of,
    pieces_of_words,
    shared_evenly,
    with_alignment,
)
from asrkit.devices import choose_device
from asrkit.disk import check_not_read
from asrkit.errors import UserError
from asrkit.models import AsrModel, load_model
from asrkit.nn.context import parse_context
from asrkit.run_dir import open_run


@config
class AlignConfig:
    """Settings of align."""

    units: list[Unit] = field(default_factory=lambda: ["bpe"])  # type: ignore[arg-type, unused-ignore]
    """Units to align in addition to words: bpe, phone, senone."""
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
    """How many cuts were written, the mean score of their words, the cuts left out and why, and the file of the tree of senones, if
    one was grown."""

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
    workers: Workers = ALONE,
) -> Aligned:
    """Write the manifest's cuts to ``out``, with alignments in their supervisions.

    Args:
        tokenizer: of the bpe units; a word's time is shared evenly among its pieces. None takes the model's own, which the CTC
            path times itself.
        senones: the tree to use; None grows one on these cuts and writes it beside ``out``, as OUT.senones.yaml.
        workers: who reads audio and finds the paths; several processes do on the CPU.

    Raises:
        UserError: an unusable run, manifest or option, or cuts that cannot be aligned, listed by id; nothing is written.
    """
    torch_device = choose_device(device)
    if torch_device.type != "cpu" and workers.several:
        raise UserError(
            f"{workers}: several processes align on the CPU only; add --device cpu, or leave {workers.options} out"
        )
    run = open_run(parent)
    model = load_model(run)
    _check_options(out, settings, tokenizer, senones)
    check_not_read(out, [manifest])
    tree = None if senones is None else load_tree(senones)
    model_tokenizer = Tokenizer(run.tokenizer_path)
    bpe_tokenizer = None if tokenizer is None else Tokenizer(tokenizer)
    table = open_cuts(manifest)
    cuts = list(table)
    findings = find_bad_cuts(table, model_tokenizer, True, model.spec.languages, workers=workers)
    findings += [
        Finding(cut.id, "words", reason) for cut in cuts for reason in _unusual(cut, model_tokenizer, bpe_tokenizer)
    ]
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
    acoustic = _acoustic(model.to(torch_device), settings.variant)
    alignments, impossible = align_words(
        acoustic, good, model_tokenizer, settings.extension, settings.max_duration, workers
    )
    findings += impossible
    good = _without(good, impossible, settings.bad_cuts)
    if bpe_tokenizer is not None:
        for cut in good:
            pieces = pieces_of_words(text_of(cut), bpe_tokenizer)
            alignments[cut.id]["bpe"] = shared_evenly(alignments[cut.id][WORD], pieces)
    if phones:
        align_phones(good, alignments, phones, settings.passes if settings.phones == "gaussian" else 0)
    new_tree = None
    if "senone" in settings.units:
        if tree is None:
            new_tree = _beside(out)
            tree = grow_tree(((alignments[cut.id]["phone"], log_mel_of(cut)) for cut in good), settings.senones)
            save_tree(tree, new_tree)
        for cut in good:
            alignments[cut.id]["senone"] = tree.align(alignments[cut.id]["phone"])
    units = (WORD, *settings.units)
    write_cuts(out, (with_alignment(cut, {unit: alignments[cut.id][unit] for unit in units}) for cut in good))
    score = np.mean([word.score for cut in good for word in alignments[cut.id][WORD]])
    return Aligned(len(good), float(score), findings, new_tree)


def _acoustic(model: AsrModel, variant: str | None) -> TorchAcousticModel:
    """The model in ``variant``, None for its default, and the first context that was trained in."""
    name = model.spec.variant if variant is None else variant
    model.submodels_of(name)  # refuses a name that is none
    return TorchAcousticModel(model, name, parse_context(model.spec.variants[name].contexts[0]))


def _check_options(out: Path, settings: AlignConfig, tokenizer: Path | None, senones: Path | None) -> None:
    findings = []
    if not out.name.endswith(".jsonl.gz"):
        findings.append(f"--out {out}: will be a manifest; give it a name that ends in .jsonl.gz")
    if tokenizer is not None and "bpe" not in settings.units:
        findings.append("--tokenizer: is only used with --unit bpe; add that, or drop --tokenizer")
    if senones is not None and "senone" not in settings.units:
        findings.append("--senones: is only used with --unit senone; add that, or drop --senones")
    if settings.passes != AlignConfig().passes and settings.phones != "gaussian":
        findings.append("passes: only with --phones gaussian; add that, or leave passes out")
    if settings.senones != AlignConfig().senones and "senone" not in settings.units:
        findings.append("senones: says how a tree is grown, for --unit senone; add that, or leave senones.* out")
    if findings:
        raise UserError.of(findings)


def _without(cuts: Sequence[Cut], findings: Sequence[Finding], policy: str) -> list[Cut]:
    """The cuts without findings; under ``refuse`` all must be."""
    if findings and policy == "refuse":
        raise UserError.of(
            [f"cut {f.cut_id}: {f.kind}: {f.detail}" for f in findings]
            + [f"{len(findings)} findings: fix the manifest, or leave these cuts out with --set bad_cuts=skip"]
        )
    bad = {finding.cut_id for finding in findings}
    good = [cut for cut in cuts if cut.id not in bad]
    if not good:
        raise UserError("no cut can be aligned; give a model of their language, and see `asrkit data check`")
    return good


def _unusual(cut: Cut, own: Tokenizer, other: Tokenizer | None) -> Iterator[str]:
    """Why a cut's alignment could not be written, or its pieces not be grouped into words."""
    if not isinstance(cut, MonoCut):
        yield "is a mix of several cuts; align the cuts it was mixed from"
    if other is not None and (missing := other.missing_characters(text_of(cut))):
        yield f"{other.path} has no {' '.join(sorted(missing))!r} (text: {text_of(cut)!r})"
    for tokenizer in filter(None, (own, other)):
        if len(pieces_of_words(text_of(cut), tokenizer)) != len(text_of(cut).split()):
            yield f"{tokenizer.path} does not split {text_of(cut)!r} at its spaces"


def _beside(out: Path) -> Path:
    return out.with_name(out.name.removesuffix(".jsonl.gz") + ".senones.yaml")
