"""From a directory on disk to something that recognizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.choice import ContextChoice, listed, was_trained
from asrkit.decoding.exported import ExportedAcousticModel
from asrkit.decoding.search import METHODS, uses_ctc
from asrkit.decoding.streaming import StreamingModel
from asrkit.devices import choose_device
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.export.directory import CTC, FILES, is_exported, open_exported
from asrkit.export.runtime import ExportedModel
from asrkit.frames import ENCODER_SHIFT_MS
from asrkit.models import AsrModel, load_model
from asrkit.models.surgery import in_language
from asrkit.nn.context import Context, parse_context
from asrkit.run_dir import EXPORT, TOKENIZER, RunDir, open_run


@dataclass(frozen=True)
class Recognizer:
    """A model ready to decode with its tokenizer, and the digest that says which weights these are.

    ``run_weights_sha256``: of the weights of the run directory; of an exported model, of the one it was exported from.
    ``variant`` and ``context`` are those it runs in; ``warnings`` say where that is not what it was trained for.
    ``languages``: those ``encode`` takes as an input, if any. ``language``: the one it recognizes, where it is for one alone.
    """

    model: StreamingModel
    tokenizer: Tokenizer
    weights_sha256: str
    device: torch.device
    variant: str
    context: Context
    run_weights_sha256: str
    warnings: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    language: str | None = None


def load_recognizer(
    path: Path,
    device: str = "auto",
    variant: str | None = None,
    context: Context | ContextChoice | None = None,
    methods: Sequence[str] = METHODS,
    language: str | None = None,
) -> Recognizer:
    """Load the model and tokenizer of a run directory, or of an exported one.

    Args:
        variant: None is the one the last stage trained.
        context: itself, or the user's choice; None is the first the variant was trained in.
        methods: the searches there will be; an exported model computes nothing for others.
        language: of everything that will be decoded; None: ``encode`` takes it, if the model has a language input.

    Raises:
        UserError: the directory is incomplete or damaged, its parts do not fit each other, or it has no such
            variant, context or language.
    """
    if is_exported(path):
        return _load_exported(path, device, variant, context, methods, language)
    torch_device = choose_device(device)
    run, model, weights = _whole(path)
    if language is not None:
        model = in_language(model, language)
    tokenizer = _load_tokenizer(run.tokenizer_path, model.vocab_size)
    name = variant or model.spec.variant
    if name not in model.spec.variants:
        raise UserError(f"{path}: no variant {name}; there are {', '.join(model.spec.variants)}")
    trained = [parse_context(text) for text in model.spec.variants[name].contexts]
    attends = any(model.spec.submodels[part].kind == "attention" for part in model.submodels_of(name))
    if not isinstance(context, Context):
        context = (context or ContextChoice()).among(trained, attends, f"{path}: variant {name}")
    warnings = [*run.unfinished]
    if not was_trained(context, trained, attends):
        warnings.append(
            f"{path}: variant {name} was never trained in context {context}, only in {listed(trained)} "
            f"(frames of {ENCODER_SHIFT_MS:.0f} ms); expect more errors"
        )
    acoustic = TorchAcousticModel(model.to(torch_device), name, context)
    return Recognizer(
        acoustic, tokenizer, weights, torch_device, name, context, weights, warnings, model.spec.languages, language
    )


def _whole(path: Path) -> tuple[RunDir, AsrModel, str]:
    """A run, its model, and the digest of just these weights, also while a training replaces them."""
    while True:
        run = open_run(path)
        digest = sha256_of(run.weights_path)
        model = load_model(run)
        if sha256_of(run.weights_path) == digest:
            return run, model, digest


def _load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size} pieces but the model has {vocab_size}; "
            "restore the tokenizer this model was trained with"
        )
    return tokenizer


def _load_exported(
    path: Path,
    device: str,
    variant: str | None,
    context: Context | ContextChoice | None,
    methods: Sequence[str],
    language: str | None,
) -> Recognizer:
    """An exported directory, which is one variant in one context, on the CPU."""
    if device not in ("auto", "cpu"):
        raise UserError(f"--device {device}: exported models run on the CPU here; use auto or cpu")
    exported = open_exported(path)
    only, again = exported.parsed_context, "export the run again for another"
    if variant not in (None, exported.variant):
        raise UserError(f"{path}: has variant {exported.variant} only, not {variant}; {again}")
    if language not in (None, exported.language):
        takes = "has no language input" if exported.language is None else f"recognizes {exported.language} only"
        raise UserError(f"--language {language}: {path} {takes}; drop --language, or {again}")
    if not isinstance(context, Context):
        choice = context or ContextChoice()
        if choice.streaming and not only.streaming:
            raise UserError(f"{path}: is for whole recordings; drop --stream, or export the run with --streaming")
        context = choice.among([only], False, f"{path}: the exported model")
    if context != only:
        raise UserError(f"{path}: was exported in context {only}, not {context}; {again}")
    ctc = [uses_ctc(method) for method in methods]
    files = [file for file in FILES if (any(ctc) if file == CTC else not all(ctc))]
    loaded = ExportedModel(path, exported.state_size, exported.format, files)
    model = ExportedAcousticModel(loaded, only, exported.vocab_size, exported.context_size)
    tokenizer = _load_tokenizer(path / TOKENIZER, exported.vocab_size)
    cpu, digest = torch.device("cpu"), sha256_of(path / EXPORT)  # export.yaml has the digests of every file
    origin = exported.run.weights_sha256
    return Recognizer(model, tokenizer, digest, cpu, exported.variant, only, origin, language=exported.language)
