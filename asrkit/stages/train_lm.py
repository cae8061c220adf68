"""train-lm: a causal language model over word pieces, phones or senones, to decode with or to teach a recognizer
(arXiv 2110.10429), or an n-gram model of word pieces or words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from asrkit.config import Positive, Seed, config, differences, to_dict
from asrkit.data.bucketing import BucketPlan
from asrkit.data.senones import load_tree
from asrkit.data.sequences import (
    SequenceBatch,
    SequenceBatches,
    SequenceTable,
    is_manifest,
    read_sentences,
    spelled_sentences,
    speller,
)
from asrkit.data.text.phones import check_language
from asrkit.data.text.tokenizer import Tokenizer, train_tokenizer
from asrkit.data.text.units import Inventory, LmUnit, write_inventory
from asrkit.disk import occupied
from asrkit.errors import UserError
from asrkit.losses.language_model import sequence_nll
from asrkit.models.lm import LanguageModel
from asrkit.models.registry import build
from asrkit.models.spec import LmShape, LmSpec
from asrkit.run_dir import TOKENIZER
from asrkit.training.config import TrainingConfig
from asrkit.training.distributed import broadcast_object
from asrkit.training.loop import train
from asrkit.training.ngram import NgramConfig, train_ngram
from asrkit.training.optim import OptimizerConfig
from asrkit.training.session import open_training, slices_of
from asrkit.training.step import LossOutput, TrainTask


@config
class TrainLmConfig:
    """Settings of train-lm. config.yaml of the run holds them all."""

    unit: LmUnit = "bpe"
    """Unit the model predicts: bpe, phone or senone; of an n-gram model bpe or word."""
    language: str = ""
    """Language whose pronunciations the phones of a text are, such as en."""
    seed: Seed = 1
    """Seed of everything random: start, batches, dropout."""
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
    ngram: NgramConfig | None = None
    """An n-gram model instead; then only the settings of units and lines count beside these."""
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
    note: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train a language model on a text or manifest, or resume an interrupted run; returns ``out``. An n-gram model is estimated at
    once: its directory is whole or not there.

    Args:
        source: a text with one sentence per line, or a manifest, whose texts are used for bpe and whose alignments for other units.
        dev: the same, to measure perplexity on; None holds out a share of the sentences.
        tokenizer: for bpe, such as the recognizer's; None trains one.
        senones: the tree that ``align`` wrote; needed for the senones of a text.
        note: is called with each line about an n-gram model.

    Raises:
        UserError: files or options that do not fit together, lines that cannot be written in the units, an unusable out.
        Interrupted: stopped by a signal, state saved.
    """
    unit = settings.unit
    _check_options(settings, source, dev, tokenizer, senones)
    kind = "manifest" if is_manifest(source) else "text"
    inputs = {kind: source, "dev": dev, "tokenizer": tokenizer, "senones": senones}
    if settings.ngram is not None:
        return _train_ngram(source, out, settings, dev, tokenizer, inputs, command, note)
    assert unit != "word"
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
        tables = SequenceTable(str(source)), SequenceTable(str(dev or source))
        limits = (settings.held_out, settings.bad_lines, spell, run.note, settings.max_symbols)
        sentences = spelled_sentences(source, dev, unit, settings.language, *limits)
        for sentence, symbols, measured in sentences:
            tables[measured].append(sentence.number, symbols)
        if unit != "bpe":
            if world.is_main and not path.is_file():
                units = chain.from_iterable(table.symbols for table in tables) if tree is None else tree.senones
                write_inventory(units, path)
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
        task = TrainTask(build(spec), lm_loss, SequenceBatches(table, plan, slices), measure=measure)
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
    settings: TrainLmConfig, source: Path, dev: Path | None, tokenizer: Path | None, senones: Path | None
) -> None:
    unit, language = settings.unit, settings.language
    texts = [path for path in (source, dev) if path is not None and not is_manifest(path)]
    findings = []
    if (settings.ngram is not None) > (unit in ("bpe", "word")):
        findings.append(f"--unit {unit}: an n-gram model is of bpe or word units")
    if settings.ngram is not None:
        plain, network = to_dict(TrainLmConfig()), ("model", "training", "max_symbols", "num_buckets")
        chosen = differences({key: plain[key] for key in network}, {key: to_dict(settings)[key] for key in network})
        findings += [f"{line.partition(':')[0]}: has no effect on an n-gram model; leave it out" for line in chosen]
    if (unit == "word") > (settings.ngram is not None):
        findings.append("--unit word: works with --kind ngram only; a network predicts bpe, phone or senone units")
    if dev is not None and settings.held_out != TrainLmConfig().held_out:
        findings.append("held_out: with --dev no sentence is held out; leave one of them out")
    if tokenizer is not None and unit != "bpe":
        findings.append(f"--tokenizer: works with --unit bpe only; {unit} units come from the alignments or the text")
    if senones is not None and unit != "senone":
        findings.append("--senones: works with --unit senone only; leave it out")
    if unit == "senone" and senones is None and texts:
        findings.append(f"{texts[0]}: the senones of a text need the tree that align wrote; pass it with --senones")
    pronounced = unit in ("phone", "senone")
    if pronounced and texts and not language:
        findings.append(f"{texts[0]}: say in which language it is pronounced, as in --language en")
    if language and not (pronounced and texts):
        findings.append("--language: works with the phones or senones of a text only; leave it out")
    if findings:
        raise UserError.of(findings)
    if pronounced and texts:
        check_language(language)


def _train_ngram(
    source: Path,
    out: Path,
    settings: TrainLmConfig,
    dev: Path | None,
    tokenizer: Path | None,
    inputs: dict[str, Path | None],
    command: str,
    note: Callable[[str], None],
) -> Path:
    assert settings.ngram is not None
    if findings := occupied(out):
        raise UserError.of(findings)
    with TemporaryDirectory() as folder:
        pieces = None
        if settings.unit == "bpe":
            path = tokenizer or Path(folder) / TOKENIZER
            if tokenizer is None:
                texts = (sentence.text for sentence in read_sentences(source, "bpe"))
                train_tokenizer(texts, "bpe", settings.vocab_size, path)
            pieces = Tokenizer(path)
        sentences = spelled_sentences(
            source, dev, settings.unit, "", settings.held_out, settings.bad_lines, speller(settings.unit, pieces), note
        )
        train_ngram(sentences, out, settings.ngram, pieces, to_dict(settings), inputs, command, note)
    return out
