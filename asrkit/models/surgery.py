"""A model made from another: the same weights in another shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, overload

from torch import Tensor, nn

from asrkit.errors import UserError
from asrkit.models.asr import AsrModel
from asrkit.models.compression import compressed_layers
from asrkit.models.pretrained import OBJECTIVE, PretrainedEncoder
from asrkit.models.registry import build
from asrkit.models.spec import ModelSpec, PredictorSpec, PretrainedEncoderSpec
from asrkit.nn.compression_config import Compression
from asrkit.nn.conformer import LayerNorm

# Which tensors are meant: those whose names begin so, or those a function says yes to.
Names = Sequence[str] | Callable[[str], bool]
Origin = nn.Module | Mapping[str, Tensor]
WithVariants = TypeVar("WithVariants", ModelSpec, PretrainedEncoderSpec)


@overload
def rebuild(spec: ModelSpec, origin: Origin, *, new: Names = (), drop: Names = ()) -> AsrModel: ...
@overload
def rebuild(spec: PretrainedEncoderSpec, origin: Origin, *, new: Names = (), drop: Names = ()) -> PretrainedEncoder: ...
def rebuild(spec: ModelSpec | PretrainedEncoderSpec, origin: Origin, *, new: Names = (), drop: Names = ()) -> nn.Module:
    """A model of ``spec``, in evaluation mode, with the weights of ``origin``, a model or its tensors by name.

    Args:
        new: tensors that begin as the spec builds them where ``origin`` does not have them.
        drop: tensors of ``origin`` that are not taken over.

    Raises:
        RuntimeError: any other tensor is missing, left over, or of another shape.
    """
    tensors = origin.state_dict() if isinstance(origin, nn.Module) else origin
    tensors = {name: tensor for name, tensor in tensors.items() if not _named(name, drop)}
    model: nn.Module = build(spec)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or (missing := [name for name in missing if not _named(name, new)]):
        raise RuntimeError(f"the weights do not fit the rebuilt model: missing {missing}, left over {unexpected}")
    return model.eval()


def with_norms_per_mode(origin: AsrModel) -> AsrModel:
    """A model that computes the same, whose norms have a second gain and bias for streaming (arXiv 2010.06030, section 3), which begin as
    copies of the first; a model that has them stays as it is."""
    if origin.spec.encoder.norms == "per_mode":
        return origin
    encoder = replace(origin.spec.encoder, norms="per_mode")
    model = rebuild(replace(origin.spec, encoder=encoder), origin, new=lambda name: ".streaming." in name)
    for norm in (module for module in model.modules() if isinstance(module, LayerNorm)):
        if norm.streaming is not None:
            norm.streaming.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    return model


def is_mask(name: str) -> bool:
    """Whether a tensor is a layer's mask, or the masks of its levels, which are built as all True."""
    return name.endswith((".mask", ".reach")) and not name.startswith(OBJECTIVE)  # whose mask is a vector


def _named(name: str, names: Names) -> bool:
    return names(name) if callable(names) else name.startswith(tuple(names))


def recognizer_spec(
    encoder: PretrainedEncoderSpec,
    vocab_size: int,
    predictor: PredictorSpec,
    joiner_dim: int,
    languages: Sequence[str] = (),
) -> ModelSpec:
    """The spec of a recognizer on top of an encoder, whose sub-models and variants become its own."""
    return ModelSpec(
        vocab_size=vocab_size,
        encoder=encoder.encoder,
        predictor=predictor,
        joiner_dim=joiner_dim,
        features=encoder.features,
        languages=list(languages),
        submodels=encoder.submodels,
        variants=encoder.variants,
        variant=encoder.variant,
        compression=encoder.compression,
    )


def recognizer_of(encoder: PretrainedEncoder, spec: ModelSpec) -> AsrModel:
    """A recognizer of ``spec`` with the weights of a pretrained encoder; predictor, joiner, heads and vectors of languages begin as
    the spec builds them. What only served pretraining (mask vector, quantizer, projections) is left behind.

    Raises:
        RuntimeError: the encoder has another shape than that of the spec.
    """

    def fresh(name: str) -> bool:
        return not name.startswith("encoder.") or name.startswith("encoder.languages.")

    return rebuild(spec, encoder, new=fresh, drop=(OBJECTIVE,))


def with_variant(spec: WithVariants, name: str | None, contexts: Sequence[str] | None = None) -> WithVariants:
    """The spec with ``name`` as its default variant, trained in ``contexts``; None leaves either as it is.

    Raises:
        UserError: there is no such variant.
    """
    name = spec.variant if name is None else name
    if name not in spec.variants:
        raise UserError(f"no variant {name}; there are {', '.join(spec.variants)}")
    variant = spec.variants[name]
    if contexts is not None:
        variant = replace(variant, contexts=list(contexts))
    return replace(spec, variant=name, variants={**spec.variants, name: variant})


def reinitialized(model: AsrModel, active: Sequence[str]) -> AsrModel:
    """The model with new weights; its buffers, and its sub-models that are not ``active``, stay."""
    learned = {name for name, _ in model.named_parameters()}
    idle = tuple(f"encoder.submodels.{name}." for name in model.spec.submodels if name not in active)

    def fresh(name: str) -> bool:
        return name in learned and not name.startswith(idle)

    return rebuild(model.spec, model, new=fresh, drop=fresh)


def recompressed(model: AsrModel, how: Mapping[str, Compression]) -> AsrModel:
    """The model with ``how`` in place of its own compression; the other layers have their latent float weights."""
    masked = {f"{path}.mask" for path, one in how.items() if one.mask is not None}
    masked |= {f"{path}.reach" for path, one in how.items() if one.levels}
    spec = replace(model.spec, compression=dict(how))
    return rebuild(spec, model, drop=lambda name: is_mask(name) and name not in masked)


def in_variant(model: AsrModel, variant: str) -> AsrModel:
    """The same model for one variant, the only one it has left, with no more compression than is on in it. A model that is
    compressed alike in all its variants is given back.

    Raises:
        UserError: there is no such variant.
    """
    spec = with_variant(model.spec, variant)
    wanted = spec.variants[variant]
    if not spec.compression or all(each.masks and each.integers for each in spec.variants.values()):
        return model
    left = {path: how.restricted(wanted.masks, wanted.integers) for path, how in spec.compression.items()}
    left = {path: replace(how, levels=[]) for path, how in left.items()}  # those are of members that are no variants
    model = recompressed(model, {path: how for path, how in left.items() if how.mask or how.weights})
    variants = {variant: replace(wanted, masks=True, integers=True)}
    return rebuild(replace(model.spec, variant=variant, variants=variants), model)


def dequantized_model(model: AsrModel) -> AsrModel:
    """An ordinary model whose float weights are what the masks and integers that are on in ``model`` stand for; its inputs stay
    float."""
    plain = recompressed(model, {})
    for path, layer in compressed_layers(model).items():
        weight = layer.masked_weight() if layer.active.weights is None else layer.codes().weights()
        plain.get_submodule(path).weight.data.copy_(weight.detach())  # type: ignore[union-attr, operator]
    return plain


def in_language(model: AsrModel, language: str | None) -> AsrModel:
    """The same model for one of its languages, without a language input: the vector, which was added to what the subsampling's
    last norm gives, becomes a part of that norm's bias. A model without languages, for None, is given back.

    Raises:
        UserError: the language is missing, or not one of the model's.
    """
    known = ", ".join(model.spec.languages)
    if language is None and not known:
        return model
    if not known:
        raise UserError(f"--language {language}: this model has no language input; drop --language")
    if language is None:
        raise UserError(f"this model takes the language as an input; give --language, one of {known}")
    if language not in model.spec.languages:
        raise UserError(f"--language {language}: this model knows {known}")
    weights = model.state_dict()
    vector = weights.pop("encoder.languages.weight")[model.spec.languages.index(language)]
    for name in ("encoder.subsampling.norm.bias", "encoder.subsampling.norm.streaming.bias"):
        if name in weights:  # a norm for streaming only where there is one per mode
            weights[name] = weights[name] + vector
    return rebuild(replace(model.spec, languages=[]), weights)
