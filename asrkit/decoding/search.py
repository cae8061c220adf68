"""One entry to every search: ``decode``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, get_args

from torch import Tensor

from asrkit.decoding.acoustic import AcousticModel, EncoderOutput
from asrkit.decoding.ctc import ctc_greedy_search
from asrkit.decoding.fusion import Fusion
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.transducer import beam_search, greedy_search
from asrkit.errors import UserError

Method = Literal["greedy", "beam", "ctc"]
METHODS: tuple[Method, ...] = get_args(Method)


def cannot_fuse(method: str) -> str:
    """The line for a method other than beam that is to heed a language model or the like."""
    return f"--method {method}: heeds no language model, hotwords or penalties; decode with --method beam"


def search(
    model: AcousticModel,
    encoded: EncoderOutput,
    method: Method = "greedy",
    beam: int = 4,
    special_ids: Collection[int] = (),
    fusion: Fusion | None = None,
) -> list[Hypothesis]:
    """Hypotheses of already encoded utterances, in their order.

    Args:
        special_ids: tokens that stand for no text, as the tokenizer lists them; none of them is emitted.
        fusion: language models and the like, which method beam heeds.

    Raises:
        UserError: ``ctc`` is asked of a model without a CTC head, or there is a fusion that the method cannot heed.
    """
    if fusion is not None and method != "beam":
        raise UserError(cannot_fuse(method))
    if method == "greedy":
        return greedy_search(model, encoded.joiner_in, encoded.lens, special_ids=special_ids)
    if method == "beam":
        return beam_search(model, encoded.joiner_in, encoded.lens, beam, special_ids, fusion)
    if method == "ctc":
        if encoded.ctc_log_probs is None:
            raise UserError("this model has no CTC head; decode with --method greedy or --method beam")
        return ctc_greedy_search(encoded.ctc_log_probs, encoded.lens, model.blank, special_ids)
    raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")


def decode(
    model: AcousticModel,
    features: Tensor,
    feature_lens: Tensor,
    method: Method = "greedy",
    beam: int = 4,
    languages: Sequence[str] | None = None,
    special_ids: Collection[int] = (),
    fusion: Fusion | None = None,
) -> list[Hypothesis]:
    """Recognize a batch: features (B, T, 80), padded, with lengths (B,) and, for a model with a language input, languages."""
    return search(model, model.encode(features, feature_lens, languages), method, beam, special_ids, fusion)
