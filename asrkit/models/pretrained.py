"""An encoder by itself, and what it is pretrained with.

Source: wav2vec 2.0 (arXiv 2006.11477), sections 2 and 3.
"""

from __future__ import annotations

import torch
from torch import nn

from asrkit.models.encoder import Encoder
from asrkit.models.spec import ContrastiveSpec, PretrainedEncoderSpec
from asrkit.nn.compression import compress, switch_compression
from asrkit.nn.quantizer import GumbelQuantizer

OBJECTIVE = "objective."  # how the tensors' names begin that only pretraining needs


class ContrastiveObjective(nn.Module):
    """What takes the place of hidden frames, the quantizer that makes targets of the frames before the blocks, and the projections
    in which contexts and targets are compared. The mask vector begins uniform in [0, 1), as in the reference code."""

    def __init__(self, dim: int, spec: ContrastiveSpec) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.rand(dim))
        self.quantizer = GumbelQuantizer(dim, spec.groups, spec.entries, spec.code_dim)
        self.project_target = nn.Linear(spec.code_dim, spec.final_dim)
        self.project_context = nn.Linear(dim, spec.final_dim)


class PretrainedEncoder(nn.Module):
    """An encoder pretrained without text; its tensors have the names they have in a recognizer."""

    def __init__(self, spec: PretrainedEncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec.encoder, spec.features, spec.submodels)
        compress(self, spec.compression)
        self.objective = None if spec.objective is None else ContrastiveObjective(spec.encoder.dim, spec.objective)

    def select(self, variant: str | None = None) -> tuple[str, ...]:
        """Run as a variant from here on, None being the default: its masks are on or off; returns its active sub-models."""
        name = self.spec.variant if variant is None else variant
        switch_compression(self, masks=self.spec.variants[name].masks, integers=True)
        return self.submodels_of(name)

    def submodels_of(self, variant: str | None = None) -> tuple[str, ...]:
        """The active sub-models of a variant, None being the default one."""
        return tuple(self.spec.variants[self.spec.variant if variant is None else variant].submodels)
