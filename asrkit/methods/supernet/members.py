"""The two variants of a supernet's spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from asrkit.errors import UserError
from asrkit.methods.supernet.config import SelfPruningConfig, SupernetConfig
from asrkit.models import AsrModel, ModelSpec
from asrkit.models.compression import masked_choice, pruned_spec
from asrkit.models.pretrained import PretrainedEncoder
from asrkit.models.spec import PretrainedEncoderSpec, VariantSpec
from asrkit.nn.compression_config import Mask

DENSE, SPARSE = "dense", "sparse"  # the variants
RANDOM = "random"  # a member between them, which is no variant


def supernet_spec(origin: AsrModel, settings: SupernetConfig, where: str = "the model") -> ModelSpec:
    """The spec with two variants, ``dense`` and ``sparse``, of one variant of ``origin``; its idle sub-models are left out.

    Raises:
        UserError: the model is quantized or pruned already, or is no supernet although its masks are to be kept; blocks that do
            not divide a layer.
    """
    spec = origin.spec
    active = origin.submodels_of(settings.variant)
    masked = [path for path, how in spec.compression.items() if how.mask is not None]
    _refuse(spec, where, "keep its masks with --freeze-masks, or start" if not settings.freeze_masks else None)
    if settings.freeze_masks and not masked:
        raise UserError(f"{where}: has no masks to keep; leave out --freeze-masks")
    if not settings.freeze_masks:
        mask = Mask(sparsity=settings.sparsity, block=settings.block)
        spec = pruned_spec(origin, mask, settings.layers, active)
    gone = idle(origin, active)
    compression = {path: how for path, how in spec.compression.items() if not path.startswith(gone)}
    if not settings.freeze_masks:
        compression = {path: replace(how, levels=settings.members.sparsities) for path, how in compression.items()}
    return replace(
        spec,
        submodels={name: spec.submodels[name] for name in active},
        variants={
            DENSE: VariantSpec(submodels=list(active), contexts=[settings.dense], masks=False),
            SPARSE: VariantSpec(submodels=list(active), contexts=[settings.sparse]),
        },
        variant=settings.default,
        compression=compression,
    )


def idle(origin: AsrModel | PretrainedEncoder, active: Sequence[str]) -> tuple[str, ...]:
    """How the names of the sub-models' tensors begin that are not ``active``."""
    return tuple(f"encoder.submodels.{name}." for name in origin.spec.submodels if name not in active)


def encoder_supernet_spec(
    encoder: PretrainedEncoder, settings: SelfPruningConfig, variant: str | None = None, where: str = "the encoder"
) -> PretrainedEncoderSpec:
    """The spec of a pretrained encoder with two variants, ``dense``, the default, and ``sparse``, of one of its variants, both in that
    one's contexts (arXiv 2207.11906: both see everything); its idle sub-models are left out.

    Raises:
        UserError: the encoder has masks already; blocks that do not divide a layer.
    """
    spec = encoder.spec
    _refuse(spec, where, "leave out --supernet to train with them off, or start")
    base = spec.variants[spec.variant if variant is None else variant]
    mask = Mask(sparsity=settings.sparsity, block=settings.block)
    return replace(
        spec,
        submodels={name: spec.submodels[name] for name in base.submodels},
        variants={DENSE: replace(base, masks=False), SPARSE: replace(base, masks=True)},
        variant=DENSE,
        compression=masked_choice(encoder, spec.compression, mask, settings.layers, base.submodels),
    )


def _refuse(spec: ModelSpec | PretrainedEncoderSpec, where: str, advice: str | None) -> None:
    """Refuse a model that is pruned or quantized already, and, if there is ``advice`` for whoever has one, a supernet.

    Raises:
        UserError: it is.
    """
    masked = [path for path, how in spec.compression.items() if how.mask is not None]
    latent = not all(variant.masks for variant in spec.variants.values())  # weights under masks are trained, not zeros
    if masked and not latent:
        raise UserError(
            f"{where}: is pruned already ({len(masked)} layers, such as {masked[0]}), so its dense member would begin with zeros; "
            "start from the run that was pruned"
        )
    if masked and advice is not None:
        raise UserError(
            f"{where}: is a supernet already ({len(masked)} layers with masks); {advice} from the run it was made of"
        )
    if quantized := [path for path, how in spec.compression.items() if how.weights is not None]:
        raise UserError(
            f"{where}: is quantized already ({len(quantized)} layers, such as {quantized[0]}); make the supernet first, then "
            "quantize one of its variants"
        )


def others_of_a_supernet(spec: ModelSpec | PretrainedEncoderSpec, trained: str) -> list[str]:
    """A line on the variants that share the weights of the ``trained`` one with other masks, and change with it; [] if there are none."""
    masks = spec.variants[trained].masks
    others = [name for name, one in spec.variants.items() if one.masks != masks] if spec.compression else []
    if not others:
        return []
    return [
        f"variant {trained} alone is trained: {', '.join(others)} shares its weights, not its masks, and changes with it; to train "
        "both, use `asrkit supernet --freeze-masks`"
    ]
