"""One entry to every search: ``decode``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, get_args

from torch import Tensor

from asrkit.decoding.acoustic import AcousticModel, EncoderOutput
from asrkit.decoding.ctc import NgramFusion, ctc_beam_search, ctc_greedy_search
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.transducer import beam_hypotheses, beam_search, greedy_search
from asrkit.errors import UserError

Method = Literal["greedy", "beam", "ctc", "ctc-beam"]
METHODS: tuple[Method, ...] = (
    "greedy",
    "beam",
    "ctc",
)  # those that every client has, and that need nothing beside the model
BEAMS: tuple[Method, ...] = ("beam", "ctc-beam")
CTC_GRAPH = "ctc-graph"  # the search of decoding/graph_search.py, as results name it


def search(
    model: AcousticModel,
    encoded: EncoderOutput,
    method: Method = "greedy",
    beam: int = 4,
    special_ids: Collection[int] = (),
) -> list[Hypothesis]:
    """Hypotheses of already encoded utterances, in their order.

    Args:
        special_ids: tokens that stand for no text, as the tokenizer lists them; none of them is emitted.

    Raises:
        UserError: ``ctc`` is asked of a model without a CTC head.
    """
    if method == "greedy":
        return greedy_search(model, encoded.joiner_in, encoded.lens, special_ids=special_ids)
    if method == "beam":
        return beam_search(model, encoded.joiner_in, encoded.lens, beam, special_ids)
    if method == "ctc":
        if encoded.ctc_log_probs is None:
            raise UserError("this model has no CTC head; decode with --method greedy or --method beam")
        return ctc_greedy_search(encoded.ctc_log_probs, encoded.lens, model.blank, special_ids)
    if method == "ctc-beam":
        return [hypotheses[0] for hypotheses in search_n_best(model, encoded, method, beam, special_ids)]
    raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")


def uses_ctc(method: str) -> bool:
    """Whether a method reads the CTC head and nothing of the transducer."""
    return method.startswith("ctc")


def search_n_best(
    model: AcousticModel,
    encoded: EncoderOutput,
    method: Method = "beam",
    beam: int = 4,
    special_ids: Collection[int] = (),
    fusion: NgramFusion | None = None,
) -> list[list[Hypothesis]]:
    """The same with all hypotheses that a search ends with, in the order of its choice; greedy searches have one.

    Args:
        fusion: an n-gram model beside ``ctc-beam``.

    Raises:
        UserError: the CTC head is asked of a model without one.
    """
    if method == "beam":
        return beam_hypotheses(model, encoded.joiner_in, encoded.lens, beam, special_ids)
    if method == "ctc-beam":
        if encoded.ctc_log_probs is None:
            raise UserError("this model has no CTC head; decode with --method greedy or --method beam")
        return ctc_beam_search(encoded.ctc_log_probs, encoded.lens, beam, model.blank, special_ids, fusion)
    return [[hypothesis] for hypothesis in search(model, encoded, method, beam, special_ids)]


def decode(
    model: AcousticModel,
    features: Tensor,
    feature_lens: Tensor,
    method: Method = "greedy",
    beam: int = 4,
    languages: Sequence[str] | None = None,
    special_ids: Collection[int] = (),
) -> list[Hypothesis]:
    """Recognize a batch: features (B, T, 80), padded, with lengths (B,) and, for a model with a language input, languages."""
    return search(model, model.encode(features, feature_lens, languages), method, beam, special_ids)
