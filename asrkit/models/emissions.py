"""Pieces that stand for no text, such as ``<sos/eos>``, kept out of what a model emits."""

from __future__ import annotations

from collections.abc import Collection

import torch

from asrkit.models.asr import AsrModel

# Added to a logit: no piece wins from there, and log-probabilities stay of a size that exports can be compared in.
NEVER = -50.0


@torch.no_grad()
def never_emit(model: AsrModel, special_ids: Collection[int], unk_id: int) -> AsrModel:
    """Bar the special pieces but the blank from both outputs of ``model``, in place, for decoding and for exports alike.

    A client of an exported model knows of no special pieces but the blank and, in the transducer, ``<unk>``, which it takes for a
    blank. So what is barred here is barred there too.
    """
    for layer, barred in (
        (model.ctc_head, {*special_ids} - {model.blank}),
        (model.joiner.out, {*special_ids} - {model.blank, unk_id}),
    ):
        layer.bias[sorted(barred)] += NEVER
    return model
