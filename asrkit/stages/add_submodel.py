"""add-submodel: train new modules on a frozen model, so that one backbone serves several operating points.

Stage B of modular training (US20240185839A1): every existing parameter and buffer stays as it is, and the optimizer has only
those of the sub-model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from asrkit.config import Advanced, Positive, Probability, config, from_dict, to_dict
from asrkit.data.train_batches import TrainBatches
from asrkit.errors import UserError
from asrkit.models import AsrModel, ModelSpec, load_model
from asrkit.models.digests import backbone_digest
from asrkit.models.encoder import SubModel
from asrkit.models.registry import spec_of
from asrkit.models.spec import ContextText
from asrkit.models.surgery import is_mask, rebuild
from asrkit.nn.context import FULL, parse_context
from asrkit.run_dir import open_run
from asrkit.training.asr_loss import asr_loss
from asrkit.training.config import TrainingConfig
from asrkit.training.optim import OptimizerConfig
from asrkit.training.session import FineTuneConfig, fine_tune
from asrkit.training.step import TrainTask

NOOP, RANDOM = "noop", "random"
PARTS = {"decoder": ("predictor", "joiner", "simple_encoder", "simple_predictor"), "ctc_head": ("ctc_head",)}


@config
class SubModelConfig:
    """The modules to add. The patent leaves position, size and start open, so the defaults are our choice."""

    kind: Literal["attention", "adapter"] = "attention"
    """What to add: attention or adapter."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Encoder blocks to add it to, from 0; null is all of them."""
    position: Literal["serial", "parallel"] = "serial"
    """Where it attaches: serial (before the convolution) or parallel (beside it)."""
    dim: Positive | None = None
    """Width of the queries, keys and values, or of the adapter's bottleneck; null is the encoder's width for attention,
    a quarter of it for an adapter."""
    heads: Positive = 4
    """Attention heads."""
    context: ContextText = "full"
    """Limit on what the attention sees in every mode: full, or chunk=16,left=64 in encoder frames of 40 ms. Also what
    it is trained in, unless contexts.train is set."""
    dropout: Probability = 0.1
    """Dropout in the sub-model."""
    init: str = NOOP
    """Start: noop zeroes the output projections, so that training starts from the frozen model's results; random leaves
    them as drawn; any other word is the sub-model of the same shape to copy, such as joint."""


@config
class AddSubModelConfig(FineTuneConfig):
    """Settings of add-submodel (US20240185839A1). config.yaml of the run holds them all.

    The optimizer is AdamW: ScaledAdam's steps are proportional to the size of a tensor, and a zeroed output projection has size 0.
    """

    submodel: SubModelConfig = field(default_factory=SubModelConfig)
    """The sub-model to add."""
    active: list[str] = field(default_factory=list)
    """Sub-models that are active, frozen, while the new one trains and runs."""
    also_train: list[Literal["decoder", "ctc_head"]] = field(default_factory=list)
    """Parts to train too: decoder (predictor and joiners) or ctc_head. This changes the other variants."""
    frozen_dropout: Advanced[bool] = False
    """Let the frozen parts drop out as in their own training, instead of running as they will in use."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(optimizer=OptimizerConfig(name="adamw")))
    """Length of the run, logging, precision and optimizer."""


def extended_spec(spec: ModelSpec, name: str, settings: AddSubModelConfig, where: str = "model") -> ModelSpec:
    """``spec`` with the sub-model and a variant of the same name, which becomes the default.

    Raises:
        UserError: a name that is taken, layers out of range, unknown sub-models, ...; all findings at once.
    """
    wanted, width = settings.submodel, spec.encoder.dim
    findings = []
    if name in spec.submodels or name in spec.variants:
        findings.append(
            f"--name {name}: {where} already has it; choose another, or remove it with `asrkit submodel remove`"
        )
    if wanted.init not in (NOOP, RANDOM, *spec.submodels):
        choices = ", ".join((NOOP, RANDOM, *spec.submodels))
        findings.append(f"--init {wanted.init}: {where} has no such sub-model; choose from {choices}")
    if missing := [other for other in settings.active if other not in spec.submodels]:
        findings.append(
            f"--active {', '.join(missing)}: {where} has no such sub-model; it has {', '.join(spec.submodels) or 'none'}"
        )
    layers = list(range(spec.encoder.num_layers)) if wanted.layers is None else wanted.layers
    if beyond := [layer for layer in layers if layer >= spec.encoder.num_layers]:
        findings.append(
            f"--layers: layer {beyond[0]} is out of range; {where} has layers 0 to {spec.encoder.num_layers - 1}"
        )
    if wanted.kind == "adapter" and wanted.context != str(FULL):
        findings.append(f"--context {wanted.context}: an adapter sees one frame; only attention has a context")
    if findings:
        raise UserError.of(findings)
    added = {
        "kind": wanted.kind,
        "layers": layers,
        "position": wanted.position,
        "dim": wanted.dim or (width if wanted.kind == "attention" else max(1, width // 4)),
        "heads": wanted.heads,
        "context": wanted.context,
        "dropout": wanted.dropout,
    }
    before = to_dict(spec)
    # Its masks and integers are on as in the variant it is trained on.
    own = {"submodels": [*settings.active, name], "contexts": trained_contexts(settings)}
    variant = before["variants"][spec.variant] | own
    return from_dict(
        ModelSpec,
        {
            **before,
            "submodels": {**before["submodels"], name: added},
            "variants": {**before["variants"], name: variant},
            "variant": name,
        },
        f"sub-model {name}",
    )


def trained_contexts(settings: AddSubModelConfig) -> list[str]:
    """The contexts to train in: those given, else the sub-model's own."""
    return settings.contexts.train or [settings.submodel.context]


def add_submodel(
    parent: Path,
    name: str,
    manifest: Path,
    out: Path,
    settings: AddSubModelConfig,
    *,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Train a sub-model on the frozen model of ``parent``, or resume an interrupted run; returns ``out``.

    Raises:
        UserError: an unusable parent, name, shape, manifest or output directory, found before any training.
        Interrupted: stopped by a signal, state saved.
    """
    source = open_run(parent)
    extended_spec(spec_of(source), name, settings, str(parent))  # refuses settings that do not fit the model
    return fine_tune(
        "add-submodel",
        source,
        manifest,
        out,
        settings,
        partial(build_task, settings, parent, name),
        entry={"name": name},
        dev=dev,
        device=device,
        command=command,
    )


def build_task(settings: AddSubModelConfig, parent: Path, name: str, batches: TrainBatches) -> TrainTask:
    """The parent's model, frozen, with the new sub-model, and its loss; see ``TaskRecipe``."""
    origin = load_model(open_run(parent))
    spec = extended_spec(origin.spec, name, settings, str(parent))
    contexts = replace(settings.contexts, train=trained_contexts(settings))
    digest = backbone_digest(origin.state_dict())
    model = rebuild(spec, origin, new=(f"encoder.submodels.{name}.",))
    _start(model, name, settings.submodel.init)
    frozen = _freeze(model, [model.encoder.submodels[name], *_parts(model, settings.also_train)])

    def check(weights: Mapping[str, Tensor]) -> None:
        if (now := backbone_digest(weights)) != digest:
            raise RuntimeError(f"the frozen backbone has changed: {digest} became {now}")

    return TrainTask(
        model,
        lambda model, batch, step: asr_loss(model, batch, step, settings.loss, contexts, name),
        batches,
        frozen=() if settings.frozen_dropout else frozen,
        facts={"submodel": name, "backbone_sha256": digest},
        notes=_notes(model, name, origin.spec),
        check=check,
    )


def _start(model: AsrModel, name: str, init: str) -> None:
    """Set the new sub-model's initial weights."""
    added = model.encoder.submodels[name]
    assert isinstance(added, SubModel)
    if init == NOOP:
        added.silence()
    elif init != RANDOM:
        weights = {key: t for key, t in model.encoder.submodels[init].state_dict().items() if not is_mask(key)}
        try:
            added.load_state_dict(weights)
        except RuntimeError:
            raise UserError(
                f"--init {init}: has another shape; {name} is {added.spec.kind} of dim {added.spec.dim} in layers "
                f"{added.spec.layers}, {init} is {model.spec.submodels[init].kind} of dim {model.spec.submodels[init].dim} "
                f"in layers {model.spec.submodels[init].layers}"
            ) from None


def _parts(model: AsrModel, names: list[Any]) -> list[nn.Module]:
    return [getattr(model, part) for name in names for part in PARTS[name]]


def _freeze(model: AsrModel, learning: list[nn.Module]) -> list[nn.Module]:
    """Freeze everything except ``learning``; returns the largest modules that are frozen as a whole."""
    model.requires_grad_(False)
    for part in learning:
        part.requires_grad_(True)

    def frozen(module: nn.Module) -> list[nn.Module]:
        if any(module is part for part in learning):
            return []
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return [module]
        return [part for child in module.children() for part in frozen(child)]

    return frozen(model)


def _notes(model: AsrModel, name: str, before: ModelSpec) -> list[str]:
    """How many parameters are trained, and a warning if the frozen part was never trained for streaming but will stream."""
    new = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    notes = [f"sub-model {name}: {new} of {every} parameters are trained, the rest is frozen"]
    known = {text for variant in before.variants.values() for text in variant.contexts}
    wanted = model.spec.variants[name].contexts
    if any(parse_context(text).streaming for text in wanted) and not any(parse_context(x).streaming for x in known):
        notes.append(
            "warning: the frozen model was never trained for streaming, so its convolutions have never run causally; "
            "expect poor results, or first train it with --set 'contexts.train=[full,\"chunk=16,left=64\"]'"
        )
    return notes
