"""What the tests of language models and alignments share: the command line, a corpus, and a model trained until it hears it."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from asrkit.cli import app
from asrkit.errors import UserError
from helpers.tones import make_corpus

QUICK = [
    "data.num_workers=0", "data.num_buckets=1", "training.log_every=2", "training.evaluate_every=2",
    "training.tensorboard=false", "training.precision=float32", "training.save_every=2", "loss.backend=torch",
    "training.steps=4",
]  # fmt: skip
SHAPE = [
    "model.size=tiny", "model.num_layers=2", "model.dim=32", "model.feedforward_dim=48", "model.kernel_size=9",
    "tokenizer.vocab_size=18", "model.predictor_dim=16", "model.joiner_dim=16", "model.dropout=0",
]  # fmt: skip


def asrkit(*words: object, code: int = 0) -> str:
    """Run a command in this process; returns what it says, a user's mistake as ``main`` prints it."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    said, found = result.output, result.exit_code
    if isinstance(result.exception, UserError):
        said, found = said + "".join(f"error: {line}\n" for line in result.exception.lines), 1
    elif result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert found == code, said
    return said


def quick(*settings: str) -> list[str]:
    return [word for setting in (*QUICK, *settings) for word in ("--set", setting)]


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


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
