"""A model that is trained until its CTC head knows the words, for tests of alignments and of what is learned from them."""

from __future__ import annotations

from pathlib import Path

from helpers.commands import asrkit, quick
from helpers.tones import make_corpus

SHAPE = [
    "model.size=tiny", "model.num_layers=2", "model.dim=32", "model.feedforward_dim=48", "model.kernel_size=9",
    "tokenizer.vocab_size=18", "model.predictor_dim=16", "model.joiner_dim=16", "model.dropout=0",
]  # fmt: skip


def make_aligned_corpus(folder: Path) -> Path:
    """train and dev manifests, and a run directory ``parent`` whose CTC head knows the words; returns that."""
    for seed, (name, count) in enumerate((("train", 24), ("dev", 6))):
        make_corpus(folder, count, seed, name, language="en")  # words that espeak-ng can pronounce
    parent = folder / "parent"
    asrkit(
        "train-backbone", "--manifest", folder / "train.jsonl.gz", "--out", parent, "--max-duration", 30,
        *quick(*SHAPE, "training.steps=150", "training.save_every=150", "loss.transducer_scale=0", "loss.ctc_scale=1",
               "training.optimizer.name=adamw", "training.optimizer.learning_rate=0.005",
               "training.optimizer.warm_up_steps=10", "training.average_decay=0.9", "training.log_every=50"),
    )  # fmt: skip
    return parent
