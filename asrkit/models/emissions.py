"""Pieces that stand for no text, such as ``<sos/eos>``, kept out of what a model emits."""

from __future__ import annotations

from collections.abc import Collection

import torch

from asrkit.models.asr import AsrModel

# Added to a logit: no piece wins from there, and log-probabilities stay of a size that exports can be compared in.
NEVER = -50.0


@torch.no_grad()
def never_emit(model: AsrModel, special_ids: Collection[int], unk_id: int) -> AsrModel:
    """Bar the special pieces from both outputs of ``model``, in place, for decoding and for exports alike.

    The blank stays, and so does ``<unk>``: the transducer's searches take it for a blank, and a CTC head is never trained to emit it.
    A client of an exported model does the same with these two and knows of no others, so what is barred here is barred there too.
    """
    barred = sorted({*special_ids} - {model.blank, unk_id})
    for layer in (model.ctc_head, model.joiner.out):
        layer.bias[barred] += NEVER
    return model
