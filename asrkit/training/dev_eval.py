"""Dev error rates of a model in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lhotse.cut import Cut
from torch import nn

from asrkit.data.batch import evaluation_batches
from asrkit.data.cut_table import CutTable
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.evaluation import measure_wer
from asrkit.decoding.search import Method
from asrkit.models.asr import AsrModel
from asrkit.nn.context import Context


def even_subset(cuts: Iterable[Cut], most: int) -> list[Cut]:
    """``most`` of the cuts, evenly spread, or all if there are no more; always the same ones."""
    every = cuts if isinstance(cuts, Sequence) else list(cuts)
    if len(every) <= most:
        return list(every)
    return [every[index * len(every) // most] for index in range(most)]


def dev_measure(
    cuts: CutTable,
    tokenizer: Tokenizer,
    max_duration: float,
    max_cuts: int,
    method: Method,
    variant: str,
    context: Context,
) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a model to its dev WER and CER in one variant and context, on at most ``max_cuts`` cuts, evenly
    spread and always the same ones."""
    subset = even_subset(cuts, max_cuts)

    def measure(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, AsrModel)
        words, characters, _ = measure_wer(
            TorchAcousticModel(model, variant, context),
            evaluation_batches(subset, max_duration),
            tokenizer,
            method=method,
        )
        return {"wer": words.rate, "cer": characters.rate}

    return measure
