"""Dev word error rate of a model in training."""

from __future__ import annotations

from collections.abc import Callable

from lhotse import CutSet
from torch import nn

from asrkit.data.batch import evaluation_batches
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.evaluation import measure_wer
from asrkit.decoding.search import Method
from asrkit.models.asr import AsrModel
from asrkit.nn.context import Context


def dev_measure(
    cuts: CutSet,
    tokenizer: Tokenizer,
    max_duration: float,
    max_cuts: int,
    method: Method,
    variant: str,
    context: Context,
) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a model to its dev WER and CER in one variant and context, on ``max_cuts`` cuts by a fixed,
    even choice."""
    every = list(cuts)
    chosen = every[:: -(-len(every) // max_cuts)]

    def measure(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, AsrModel)
        words, characters, _ = measure_wer(
            TorchAcousticModel(model, variant, context),
            evaluation_batches(chosen, max_duration),  # type: ignore[arg-type]
            tokenizer,
            method=method,
        )
        return {"wer": words.rate, "cer": characters.rate}

    return measure
