"""What a run directory can hold: its kinds, and the way from model.yaml to a spec and from there to a module.

torch is imported only to build a module.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from asrkit.config import from_dict, to_dict
from asrkit.errors import UserError
from asrkit.migration import FORMAT
from asrkit.models.spec import LmSpec, ModelSpec, NgramSpec, PretrainedEncoderSpec
from asrkit.run_dir import MODEL, WEIGHTS, RunDir, write_yaml

if TYPE_CHECKING:
    from torch import nn

    from asrkit.models.asr import AsrModel
    from asrkit.models.lm import LanguageModel
    from asrkit.models.pretrained import PretrainedEncoder

ASR, LM, NGRAM, ENCODER = "asr", "lm", "ngram", "encoder"
NetworkSpec = ModelSpec | LmSpec | PretrainedEncoderSpec
Spec = NetworkSpec | NgramSpec


@dataclass(frozen=True)
class Kind:
    """One kind of run directory.

    ``title``: what it is, in a sentence. ``spec`` and ``build``: the spec's class, and from a spec to an untrained module; None
    where there is no module, only n-grams.
    ``tokenizer``: whether the run has one. ``made_by``: the command that makes one, for whoever gave something else.
    ``next``: what to do with one, for whoever gave it where a recognizer is needed; ``{path}`` is the run.
    """

    title: str
    spec: type
    build: Callable[[Any], nn.Module] | None
    tokenizer: bool
    made_by: str
    next: str


def _recognizer(spec: ModelSpec) -> AsrModel:
    from asrkit.models.asr import AsrModel

    return AsrModel(spec)


def _language_model(spec: LmSpec) -> LanguageModel:
    from asrkit.models.lm import LanguageModel

    return LanguageModel(spec)


def _pretrained_encoder(spec: PretrainedEncoderSpec) -> PretrainedEncoder:
    from asrkit.models.pretrained import PretrainedEncoder

    return PretrainedEncoder(spec)


KINDS = {
    ASR: Kind(
        "a recognizer",
        ModelSpec,
        _recognizer,
        True,
        "asrkit train-backbone",
        "evaluate it with `asrkit evaluate --from {path}`",
    ),
    LM: Kind(
        "a language model",
        LmSpec,
        _language_model,
        True,
        "asrkit train-lm",
        "let it teach a recognizer with `asrkit distill-lm --lm NAME={path}`",
    ),
    NGRAM: Kind(
        "an n-gram model",
        NgramSpec,
        None,
        False,  # one of words has none
        "asrkit train-lm --kind ngram",
        "decode with it by `asrkit evaluate --from RUN --lm {path} --method beam`",
    ),
    ENCODER: Kind(
        "a pretrained encoder",
        PretrainedEncoderSpec,
        _pretrained_encoder,
        False,
        "asrkit pretrain",
        "make a recognizer of it first with `asrkit train-backbone --from {path}`",
    ),
}


def kind_of(run: RunDir) -> Kind:
    """The kind of a run directory.

    Raises:
        UserError: this version knows no such kind, or the run lacks the tokenizer of its kind.
    """
    if run.kind not in KINDS:
        raise UserError(
            f"{run.path}: holds a model of kind {run.kind}, and this version of asrkit knows {', '.join(KINDS)}; "
            "use the version that made it, or a newer one"
        )
    kind = KINDS[run.kind]
    if kind.tokenizer and not run.tokenizer_path.is_file():
        raise UserError(f"{run.tokenizer_path}: is missing; restore it or train again")
    return kind


def require(run: RunDir, wanted: str) -> None:
    """Refuse a run directory that is not of the ``wanted`` kind.

    Raises:
        UserError: in one line: what it is, and what to do with it or instead.
    """
    kind = kind_of(run)
    if run.kind == wanted:
        return
    advice = kind.next.format(path=run.path) if wanted == ASR else f"train one with `{KINDS[wanted].made_by}`"
    raise UserError(f"{run.path}: is {kind.title}, not {KINDS[wanted].title}; {advice}")


def spec_of(run: RunDir) -> ModelSpec:
    """The spec of a run directory that must hold a recognizer.

    Raises:
        UserError: the run is of another kind, or of another version of asrkit.
    """
    spec: ModelSpec = spec_of_kind(run, ASR)
    return spec


def spec_of_kind(run: RunDir, kind: str) -> Any:
    """The spec of a run directory that must be of ``kind``.

    Raises:
        UserError: the run is of another kind, or of another version of asrkit.
    """
    require(run, kind)
    return _parsed(run.path, kind, run.model_spec)


def _parsed(path: Path, kind: str, content: dict[str, Any]) -> Any:
    try:
        return from_dict(KINDS[kind].spec, content, MODEL)
    except UserError as error:  # its digest is right, so it was written like this
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: another version of asrkit made it ({reason}); train again, or use that version"
        ) from None


@overload
def build(spec: ModelSpec) -> AsrModel: ...
@overload
def build(spec: LmSpec) -> LanguageModel: ...
@overload
def build(spec: PretrainedEncoderSpec) -> PretrainedEncoder: ...
def build(spec: NetworkSpec) -> nn.Module:
    """An untrained module of a spec of any kind that has one.

    Raises:
        UserError: its weights alone are more than this machine has memory for; asked before anything is allocated.
    """
    needed, memory = 4 * least_parameters(spec), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UserError(
            f"the model has at least {needed // 4:,} parameters, {needed / 1e9:,.0f} GB, and this machine {memory / 1e9:.0f} GB of memory; "
            "lower its dimensions, its number of layers or its vocabulary"
        )
    make = KINDS[_kind_of_spec(spec)].build
    assert make is not None
    return make(spec)


def write_model(path: Path, spec: Spec) -> None:
    """Write model.yaml of the run directory ``path`` for a spec of any kind."""
    write_yaml(path / MODEL, {"format": FORMAT, "kind": _kind_of_spec(spec), "spec": to_dict(spec)})


def _kind_of_spec(spec: Spec) -> str:
    return next(name for name, kind in KINDS.items() if type(spec) is kind.spec)


def least_parameters(spec: NetworkSpec) -> int:
    """A number of parameters that a model of ``spec`` has at least, by its largest matrices and every size it names."""
    if isinstance(spec, LmSpec):
        shape = spec.shape
        return 2 * spec.vocab_size * shape.dim + shape.num_layers * 4 * shape.dim**2
    encoder = spec.encoder
    block = 4 * encoder.dim * encoder.feedforward_dim + encoder.kernel_size * encoder.dim
    attached = sum(2 * len(part.layers) * part.dim * encoder.dim for part in spec.submodels.values())
    total = encoder.num_layers * block + math.prod(encoder.subsampling_channels) + attached
    if isinstance(spec, PretrainedEncoderSpec):
        objective = spec.objective
        if objective is None:
            return total
        return total + objective.entries * objective.code_dim + objective.code_dim * objective.final_dim
    decoder = spec.predictor.dim * (spec.vocab_size + spec.predictor.context_size)
    return total + decoder + spec.joiner_dim * spec.vocab_size + len(spec.languages) * encoder.dim


def load(run: RunDir, kind: str) -> Any:
    """Rebuild the module of a run directory, strictly: on the CPU, float32, evaluation mode. Heads that only served a
    recognizer's training are left out, so that no later stage and no export knows of them.

    Raises:
        UserError: the run is of another kind, or its weights do not fit the spec.
    """
    import torch

    spec = spec_of_kind(run, kind)
    needed, stored = least_parameters(spec), sum(numbers for numbers, _ in run.tensor_sizes().values())
    if needed > stored:  # asked before anything is built: the file may be a stranger's
        raise UserError(
            f"{run.path}: {MODEL} describes at least {needed:,} parameters, but {WEIGHTS} holds {stored:,}; "
            "the files do not belong together"
        )
    weights = run.weights()
    if kind == ASR:
        spec = replace(spec, heads={})
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("heads.")}
    with torch.random.fork_rng(devices=[]):  # reading a model draws nothing from the generator
        module: nn.Module = build(spec)
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{run.path}: weights and model.yaml disagree ({' '.join(str(error).split())[:300]}); restore the run or train again"
        ) from error
    return module.eval()


def load_model(run: RunDir) -> AsrModel:
    """The recognizer of a run directory; see ``load``."""
    model: AsrModel = load(run, ASR)
    return model


def load_encoder(run: RunDir) -> PretrainedEncoder:
    """The pretrained encoder of a run directory, with what it was pretrained with; see ``load``."""
    model: PretrainedEncoder = load(run, ENCODER)
    return model


def load_lm(run: RunDir) -> LanguageModel:
    """The language model of a run directory; see ``load``."""
    model: LanguageModel = load(run, LM)
    return model
