"""Masks by schedule: what scores count, and what stays gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from asrkit.config import from_dict
from asrkit.methods.pruning import MaskSchedule, update_masks, watch_inputs
from asrkit.models import AsrModel, ModelSpec
from asrkit.models.compression import compressed_layers
from asrkit.nn.compression import CompressedLinear
from asrkit.nn.compression_config import Compression, Mask
from asrkit.nn.conformer import subsampled_lens
from helpers.encoders import randomize


def masked_model() -> AsrModel:
    """One layer of each kind, masked: what frames go through one by one, a convolution's, attention's, the joiner's."""
    torch.manual_seed(0)
    masked = [
        "encoder.blocks.0.feedforward1.widen",
        "encoder.blocks.1.conv.out",
        "encoder.submodels.joint.layers.0.query",
        "joiner.encoder_projection",
        "joiner.predictor_projection",
    ]
    spec: dict[str, Any] = {
        "vocab_size": 11,
        "encoder": {"dim": 16, "num_layers": 2, "feedforward_dim": 24, "kernel_size": 5},
        "predictor": {"dim": 12},
        "joiner_dim": 14,
        "submodels": {"joint": {"kind": "attention", "layers": [0, 1], "dim": 16, "heads": 2}},
        "variants": {"joint": {"submodels": ["joint"]}},
        "variant": "joint",
        "compression": {path: {"mask": {"keep": 2, "group": 4}} for path in masked},
    }
    model = AsrModel(from_dict(ModelSpec, spec, "test"))
    randomize(model, 5)
    return model.eval()


def test_padding_decides_no_mask() -> None:
    """Inputs of a padded batch are those of its utterances by themselves."""
    model, lens = masked_model(), torch.tensor([203, 60, 61])
    features = torch.randn(3, 203, 80) * 3 - 6
    for row, size in enumerate(lens.tolist()):
        features[row, size:] = -23.0  # silence, as a batch pads

    symbols, symbol_lens = torch.randint(1, 11, (3, 9)), torch.tensor([2, 9, 4])

    def sums(rows: slice, size: int, length: int) -> dict[str, torch.Tensor]:
        with watch_inputs(model, subsampled_lens(lens[rows]), symbol_lens[rows]) as inputs, torch.no_grad():
            model.joiner.project_encoder(model.encode(features[rows, :size], lens[rows])[0])
            model.joiner.project_predictor(model.predictor(model.predictor.contexts_of(symbols[rows, :length])))
        return inputs

    together = sums(slice(3), 203, 9)
    apart = [sums(slice(row, row + 1), int(lens[row]), int(symbol_lens[row])) for row in range(3)]
    assert together.keys() == compressed_layers(model).keys()
    for path, found in together.items():
        torch.testing.assert_close(found, sum(one[path] for one in apart), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [(1, 1), (4, 1)])
def test_nothing_returns_little_by_little(block: tuple[int, int]) -> None:
    """Though what is left is worth as little as what has gone: its inputs have become 0."""
    torch.manual_seed(0)
    layer = CompressedLinear(16, 8, Compression(mask=Mask(sparsity=0.8, block=block)))
    model = nn.ModuleDict({"layer": layer})
    nn.init.normal_(layer.weight)
    schedule = MaskSchedule(kind="iterative", share=0.3, score="activation")
    gone = torch.zeros_like(layer.mask)
    for step in range(5):
        update_masks(model, step, schedule, {"layer": torch.rand(16) if step == 0 else torch.zeros(16)})
        assert not (layer.mask & gone).any()
        gone = ~layer.mask
    assert int(layer.mask.sum()) == round(0.2 * 16 * 8 / (block[0] * block[1])) * block[0] * block[1]
