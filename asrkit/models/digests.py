"""Digests of a model's parts: which backbone a sub-model was trained on, and whether a stage left it alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from asrkit.models.asr import AsrModel

ENCODER, SUBMODELS = "encoder.", "encoder.submodels."


def backbone_digest(tensors: Mapping[str, Tensor]) -> str:
    """The hexadecimal SHA-256 of the encoder without its sub-models, from a model's or a file's tensors by name.

    Parameters and buffers count: names in order, types, shapes and bytes.
    """
    return tensors_digest((name, tensor) for name, tensor in tensors.items() if is_backbone(name))


def submodels_left_behind(model: AsrModel, variant: str | None) -> list[str]:
    """The sub-models that a training of ``variant`` leaves as they are while it moves the backbone beneath them."""
    moves = any(p.requires_grad for name, p in model.named_parameters() if is_backbone(name))
    active = model.submodels_of(variant)
    return [name for name in model.spec.submodels if moves and name not in active]


def is_backbone(name: str) -> bool:
    """Whether a tensor of this name is the encoder's own, and no sub-model's."""
    return name.startswith(ENCODER) and not name.startswith(SUBMODELS)


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """The hexadecimal SHA-256 of named tensors; the order they come in does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        plain = tensor.detach().cpu().contiguous()
        dtype = str(plain.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {list(plain.shape)}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
