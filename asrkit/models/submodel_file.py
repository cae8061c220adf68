"""A sub-model by itself in one safetensors file: its weights, and in the header all that is needed to put it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asrkit.config import digest, from_dict, to_dict
from asrkit.disk import atomic_write
from asrkit.errors import UserError
from asrkit.models.asr import AsrModel
from asrkit.models.digests import ENCODER, SUBMODELS, backbone_digest, tensors_digest
from asrkit.models.spec import SubModelSpec, VariantSpec
from asrkit.run_dir import check_lineage

# What the header says the file is; another layout has another number.
KIND = "asrkit sub-model 2"


@dataclass(frozen=True)
class Extracted:
    """A sub-model on its own. ``variants`` are those it was alone in; ``decoder_sha256`` is of all that is not encoder.

    ``tensors`` are named from the sub-model on: ``layers.0.query.weight``.
    """

    name: str
    spec: SubModelSpec
    variants: dict[str, VariantSpec]
    backbone_sha256: str
    decoder_sha256: str
    lineage: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def prefix(name: str) -> str:
    """What the tensors of a sub-model begin with."""
    return f"{SUBMODELS}{name}."


def take_out(model: AsrModel, name: str, lineage: list[dict[str, Any]]) -> Extracted:
    """One sub-model of a model whose run has this ``lineage``."""
    tensors = model.state_dict()
    return Extracted(
        name,
        model.spec.submodels[name],
        {key: variant for key, variant in model.spec.variants.items() if variant.submodels == [name]},
        backbone_digest(tensors),
        decoder_digest(tensors),
        lineage,
        {key.removeprefix(prefix(name)): tensor for key, tensor in tensors.items() if key.startswith(prefix(name))},
    )


def left_behind(name: str, lineage: list[dict[str, Any]]) -> str | None:
    """The stage that trained the backbone without the sub-model since the two were last trained together, if there is one."""
    stage = None
    for entry in lineage:
        if name in entry.get("idle_submodels", []):
            stage = entry["stage"]
        elif name in entry.get("trained_submodels", []):
            stage = None
    return stage


def decoder_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of everything outside the encoder: what the sub-model's frames are read with."""
    return tensors_digest((name, tensor) for name, tensor in tensors.items() if not name.startswith(ENCODER))


def write_submodel(file: Path, submodel: Extracted) -> None:
    """Write the file atomically.

    Raises:
        UserError: it cannot be written.
    """
    content = {
        "name": submodel.name,
        "spec": to_dict(submodel.spec),
        "variants": {name: to_dict(variant) for name, variant in submodel.variants.items()},
        "backbone_sha256": submodel.backbone_sha256,
        "decoder_sha256": submodel.decoder_sha256,
        "tensors_sha256": tensors_digest(submodel.tensors.items()),
        "lineage": submodel.lineage,
    }
    header = {"kind": KIND, "content": json.dumps(content), "sha256": digest(content)}
    with atomic_write(file) as temporary:
        try:
            save_file({key: tensor.contiguous() for key, tensor in submodel.tensors.items()}, temporary, header)
        except SafetensorError as error:  # it wraps the operating system's error in its own
            raise OSError(None, str(error)) from error


def read_submodel(file: Path) -> Extracted:
    """Read what ``write_submodel`` wrote.

    Raises:
        UserError: there is no such file, it is something else, or it is damaged.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; --file takes what `asrkit submodel extract` writes")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no iteration)
        if header.get("kind") != KIND:
            raise UserError(
                f"{file}: is no sub-model that this version reads ({header.get('kind', 'of unknown kind')}, not {KIND}); "
                "extract it again with `asrkit submodel extract`"
            )
        content = json.loads(header["content"])
        if digest(content) != header["sha256"] or tensors_digest(tensors.items()) != content["tensors_sha256"]:
            raise ValueError("its digests differ from its content")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: is damaged or no sub-model ({reason}); extract it again") from error
    return Extracted(
        content["name"],
        from_dict(SubModelSpec, content["spec"], str(file)),
        {key: from_dict(VariantSpec, used, str(file)) for key, used in content["variants"].items()},
        content["backbone_sha256"],
        content["decoder_sha256"],
        check_lineage(content["lineage"], file),
        tensors,
    )
