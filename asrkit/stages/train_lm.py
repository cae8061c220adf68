"""train-lm: a causal language model over word pieces, phones or senones, to teach a recognizer (arXiv 2110.10429)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from asrkit.config import Positive, Seed, config, to_dict
from asrkit.data.bucketing import BucketPlan
from asrkit.data.senones import load_tree
from asrkit.data.sequences import (
    Sentence,
    SequenceBatch,
    SequenceBatches,
    SequenceTable,
    is_manifest,
    read_sentences,
    speller,
)
from asrkit.data.text.normalization import split_of
from asrkit.data.text.phones import check_language
from asrkit.data.text.tokenizer import Tokenizer, train_tokenizer
from asrkit.data.text.units import Inventory, Unit, write_inventory
from asrkit.errors import UserError
from asrkit.losses.language_model import sequence_nll
from asrkit.models.lm import LanguageModel
from asrkit.models.spec import LmShape, LmSpec
from asrkit.run_dir import TOKENIZER
from asrkit.training.config import TrainingConfig
from asrkit.training.distributed import broadcast_object
from asrkit.training.loop import train
from asrkit.training.optim import OptimizerConfig
from asrkit.training.session import open_training, slices_of
from asrkit.training.step import LossOutput, TrainTask

MAX_FINDINGS = 20  # unusable lines that an error names


@config
class TrainLmConfig:
    """Settings of train-lm. config.yaml of the run holds them all."""

    unit: Unit = "bpe"
    """Unit the model predicts: bpe, phone or senone."""
    language: str = ""
    """Language whose pronunciations the phones of a text are, such as en."""
    seed: Seed = 1
    """Seed of everything random: start, held-out sentences, batches, dropout."""
    bad_lines: Literal["refuse", "skip"] = "refuse"
    """What to do with lines that cannot be used: refuse to start, or skip and list them."""
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the sentences held out to measure perplexity on, when there is no --dev."""
    vocab_size: Annotated[int, Field(ge=4)] = 500
    """Number of tokens of the bpe tokenizer that is trained when none is given."""
    max_symbols: Positive = 4000
    """Symbols in a step, for each process."""
    num_buckets: Positive = 20
    """Number of length buckets; a batch holds sentences of one. More buckets mean less padding."""
    model: LmShape = field(default_factory=LmShape)
    """Shape of the language model."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3))
    )
    """Length of the run, logging, precision and optimizer."""


def train_lm(
    source: Path,
    out: Path,
    settings: TrainLmConfig,
    *,
    dev: Path | None = None,
    tokenizer: Path | None = None,
    senones: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Train a language model on a text or manifest, or resume an interrupted run; returns ``out``.

    Args:
        source: a text with one sentence per line, or a manifest, whose texts are used for bpe and whose alignments for other units.
        dev: the same, to measure perplexity on; None holds out a share of the sentences.
        tokenizer: for bpe, such as the recognizer's; None trains one.
        senones: the tree that ``align`` wrote; needed for the senones of a text.

    Raises:
        UserError: files or options that do not fit together, lines that cannot be written in the units, an unusable out.
        Interrupted: stopped by a signal, state saved.
    """
    unit = settings.unit
    _check_options(unit, settings.language, source, dev, tokenizer, senones)
    kind = "manifest" if is_manifest(source) else "text"
    inputs = {kind: source, "dev": dev, "tokenizer": tokenizer, "senones": senones}
    with open_training("train-lm", out, to_dict(settings), inputs, device=device, command=command) as run:
        if run.finished:
            return out
        world = run.world
        path = out / TOKENIZER
        if unit == "bpe":
            if world.is_main and not path.is_file():
                if tokenizer is not None:
                    Tokenizer(tokenizer).copy_to(path)
                else:
                    texts = (sentence.text for sentence in read_sentences(source, unit))
                    train_tokenizer(texts, "bpe", settings.vocab_size, path)
            broadcast_object(world, None)  # the others read it only once it is there
        tree = None if senones is None else load_tree(senones)
        spell = speller(unit, Tokenizer(path) if unit == "bpe" else None, tree)
        tables = _read(source, dev, settings, spell, run.note)
        if unit != "bpe":
            if world.is_main and not path.is_file():
                symbols = chain.from_iterable(table.symbols for table in tables) if tree is None else tree.senones
                write_inventory(symbols, path)
            broadcast_object(world, None)
        inventory = Inventory.of(Tokenizer(path), unit)
        for table in tables:
            table.number_by(inventory)
        table, held_out = tables
        slices = slices_of(out, settings.training, world)
        plan = BucketPlan(table.lens + 1, settings.max_symbols * slices, settings.num_buckets, slices, settings.seed)
        torch.manual_seed(settings.seed)
        spec = LmSpec(unit=unit, vocab_size=inventory.size, shape=settings.model)
        run.describe(spec, f"{len(table)} sentences, {table.lens.sum()} {unit} units")
        if not len(held_out):
            run.note(f"{out}: no sentence is held out, so perplexity is not measured; pass --dev or raise held_out")
        measure = perplexity_of(held_out, settings.max_symbols) if len(held_out) else None
        task = TrainTask(LanguageModel(spec), lm_loss, SequenceBatches(table, plan, slices), measure=measure)
        train(task, out, settings.training, 0, settings.seed, world, run.publish)
        run.finish()
    return out


def lm_loss(model: LanguageModel, batch: SequenceBatch, step: int) -> LossOutput:
    """-log P of each sequence; the count is of symbols and ends."""
    loss = sequence_nll(model(batch.symbols), batch.symbols, batch.symbol_lens)
    return LossOutput(loss, float(batch.num_symbols))


def perplexity_of(held_out: SequenceTable, max_symbols: int) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a model to its perplexity on the held-out sequences, ends included."""

    @torch.no_grad()
    def measure(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, LanguageModel)
        device = model.out.weight.device
        total, count = 0.0, 0.0
        for batch in held_out.batches(max_symbols):
            output = lm_loss(model, batch.to(device), 0)
            total, count = total + float(output.losses.double().sum()), count + output.count
        return {"perplexity": math.exp(min(total / count, 700.0))}

    return measure


def _check_options(
    unit: Unit, language: str, source: Path, dev: Path | None, tokenizer: Path | None, senones: Path | None
) -> None:
    texts = [path for path in (source, dev) if path is not None and not is_manifest(path)]
    findings = []
    if tokenizer is not None and unit != "bpe":
        findings.append(f"--tokenizer: works with --unit bpe only; {unit} units come from the alignments or the text")
    if senones is not None and unit != "senone":
        findings.append("--senones: works with --unit senone only; leave it out")
    if unit == "senone" and senones is None and texts:
        findings.append(f"{texts[0]}: the senones of a text need the tree that align wrote; pass it with --senones")
    if unit != "bpe" and texts and not language:
        findings.append(f"{texts[0]}: say in which language it is pronounced, as in --language en")
    if findings:
        raise UserError.of(findings)
    if unit != "bpe" and texts:
        check_language(language)


def _read(
    source: Path,
    dev: Path | None,
    settings: TrainLmConfig,
    spell: Callable[[Sentence], Any],
    note: Callable[[str], None],
) -> tuple[SequenceTable, SequenceTable]:
    """The sequences to train on and those to measure on; lines that cannot be written in the units are refused or left out."""
    table, held_out = SequenceTable(str(source)), SequenceTable(str(dev or source))
    findings: list[str] = []
    for path, whole in ((source, table), *([] if dev is None else [(dev, held_out)])):
        for sentence in read_sentences(path, settings.unit, settings.language):
            try:
                symbols = spell(sentence)
            except UserError as error:
                findings.append(f"{sentence.where}: {error}")
                continue
            if len(symbols) >= settings.max_symbols:  # its end is one more
                findings.append(
                    f"{sentence.where}: has {len(symbols)} symbols, more than a step takes; split it, or raise max_symbols"
                )
                continue
            is_held_out = dev is None and split_of(sentence.text, dev=settings.held_out, test=0.0) == "dev"
            (held_out if is_held_out else whole).append(sentence.number, symbols)
    if findings and settings.bad_lines == "refuse":
        more = f"{len(findings)} unusable lines: fix them, or leave them out with --set bad_lines=skip"
        raise UserError.of([*findings[:MAX_FINDINGS], more])
    for finding in findings:
        note(f"left out: {finding}")
    if not len(table):
        raise UserError(f"{source}: no sentence is left to train on")
    if dev is not None and not len(held_out):
        raise UserError(f"{dev}: no sentence is left to measure perplexity on; give another --dev, or leave it out")
    return table, held_out
