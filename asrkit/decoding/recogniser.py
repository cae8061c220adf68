"""From a directory on disk to something that recognises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from asrkit.data.tokenizer import Tokenizer
from asrkit.decoding.acoustic import AcousticModel, TorchAcousticModel
from asrkit.errors import UserError
from asrkit.models import load_model
from asrkit.run_dir import WEIGHTS, open_run, sha256_of


@dataclass(frozen=True)
class Recogniser:
    """A model ready to decode with its tokenizer, and the digest that says which weights these are."""

    model: AcousticModel
    tokenizer: Tokenizer
    weights_sha256: str
    device: torch.device


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); use auto or cpu") from error
    return device


def load_recogniser(path: Path, device: str = "auto") -> Recogniser:
    """Load the model and tokenizer of a run directory.

    Raises:
        UserError: the directory is incomplete or damaged, or its parts do not fit each other.
    """
    place = choose_device(device)
    run = open_run(path)
    model = load_model(run)
    tokenizer = Tokenizer.load(run.tokenizer_path)
    if tokenizer.vocab_size != model.vocab_size:
        raise UserError(
            f"{run.tokenizer_path}: has {tokenizer.vocab_size} pieces but the model has {model.vocab_size}; "
            "restore the tokenizer this model was trained with"
        )
    return Recogniser(TorchAcousticModel(model.to(place)), tokenizer, sha256_of(run.path / WEIGHTS), place)
