"""A model made from another: the same weights in another shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from asrkit.config import from_dict, to_dict
from asrkit.errors import UserError
from asrkit.models.spec import ModelSpec
from asrkit.nn.compression import (
    Compression,
)

if TYPE_CHECKING:
    from asrkit.models.asr import AsrModel
from asrkit.models.compression import compressed_layers


def with_variant(spec: ModelSpec, name: str | None, contexts: Sequence[str] | None = None) -> ModelSpec:
    """The spec with ``name`` as its default variant, trained in ``contexts``; None leaves either as it is.

    Raises:
        UserError: there is no such variant.
    """
    name = spec.variant if name is None else name
    if name not in spec.variants:
        raise UserError(f"no variant {name}; there are {', '.join(spec.variants)}")
    content = {**to_dict(spec), "variant": name}
    if contexts is not None:
        content["variants"][name]["contexts"] = list(contexts)
    return from_dict(ModelSpec, content, "model")


def rebuilt(spec: ModelSpec, origin: AsrModel) -> AsrModel:
    """A model of ``spec`` with the weights of ``origin``, which has the same tensors but for masks; those begin as all True."""
    model = type(origin)(spec)
    missing, unexpected = model.load_state_dict(origin.state_dict(), strict=False)
    if unexpected or any(not name.endswith(".mask") for name in missing):
        raise RuntimeError(f"the weights do not fit the compressed model: {missing} {unexpected}")
    return model


def reinitialize(model: AsrModel, origin: AsrModel, active: Sequence[str]) -> None:
    """Give a model new weights, in place; buffers and sub-models of ``origin`` that are not ``active`` stay."""
    kept = {name for name, _ in model.named_buffers()}
    idle = tuple(f"encoder.submodels.{name}." for name in origin.spec.submodels if name not in active)
    fresh = type(model)(model.spec).state_dict()
    new = {name: tensor for name, tensor in fresh.items() if name not in kept and not name.startswith(idle)}
    model.load_state_dict(new, strict=False)


def recompressed(model: AsrModel, how: Mapping[str, Compression]) -> AsrModel:
    """The model with ``how`` in place of its own compression; the other layers have their latent float weights."""
    content = {**to_dict(model.spec), "compression": {path: to_dict(one) for path, one in how.items()}}
    made = type(model)(from_dict(ModelSpec, content, "model"))
    wanted = made.state_dict()
    made.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in wanted})
    return made.eval()


def dequantized_model(model: AsrModel) -> AsrModel:
    """An ordinary model whose float weights are what the masks and integers of ``model`` stand for; its inputs stay float."""
    plain = recompressed(model, {})
    for path, layer in compressed_layers(model).items():
        weight = layer.masked_weight() if layer.how.weights is None else layer.codes().weights()
        plain.get_submodule(path).weight.data.copy_(weight.detach())  # type: ignore[union-attr, operator]
    return plain
