"""One entry to every search: ``decode``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from asrkit.decoding.acoustic import AcousticModel, EncoderOutput
from asrkit.decoding.ctc import CtcFusion, ctc_beam_search, ctc_greedy_search
from asrkit.decoding.fusion import Fusion, NeuralScorer, weighted_scores
from asrkit.decoding.hypothesis import Hypothesis, rescored
from asrkit.decoding.transducer import beam_hypotheses, beam_search, greedy_search
from asrkit.errors import UserError

Method = Literal["greedy", "beam", "ctc", "ctc-beam"]
METHODS: tuple[Method, ...] = ("greedy", "beam", "ctc")  # those that every client has, which `--method all` runs
BEAMS: tuple[Method, ...] = ("beam", "ctc-beam")
NBestSearch = Callable[[EncoderOutput], list[list[Hypothesis]]]  # each utterance's hypotheses, the best one first
CTC_GRAPH = "ctc-graph"  # the search of decoding/graph_search.py, as results name it


def cannot_fuse(method: str) -> str:
    """The line for a greedy method with a language model or the like."""
    return f"--method {method}: uses no language model, hotwords or penalties; decode with --method beam or ctc-beam"


def uses_ctc(method: str) -> bool:
    """Whether a method reads the CTC head and nothing of the transducer."""
    return method.startswith("ctc")


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
        fusion: language models and the like, which the beam searches use.

    Raises:
        UserError: ``ctc`` is asked of a model without a CTC head, or there is a fusion that the method cannot use.
    """
    if fusion is not None and method not in BEAMS:
        raise UserError(cannot_fuse(method))
    if method == "greedy":
        return greedy_search(model, encoded.joiner_in, encoded.lens, special_ids=special_ids)
    if method == "beam":
        return beam_search(model, encoded.joiner_in, encoded.lens, beam, special_ids, fusion)
    if method == "ctc":
        if encoded.ctc_log_probs is None:
            raise UserError("this model has no CTC head; decode with --method greedy or --method beam")
        return ctc_greedy_search(encoded.ctc_log_probs, encoded.lens, model.blank, special_ids)
    if method == "ctc-beam":
        return [hypotheses[0] for hypotheses in search_n_best(model, encoded, method, beam, special_ids, fusion)]
    raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")


def search_n_best(
    model: AcousticModel,
    encoded: EncoderOutput,
    method: Method = "beam",
    beam: int = 4,
    special_ids: Collection[int] = (),
    fusion: Fusion | None = None,
) -> list[list[Hypothesis]]:
    """The same with all hypotheses that a search ends with, in the order of its choice; greedy searches have one.

    Raises:
        UserError: as ``search``.
    """
    if method == "beam":
        return beam_hypotheses(model, encoded.joiner_in, encoded.lens, beam, special_ids, fusion)
    if method != "ctc-beam":
        return [[hypothesis] for hypothesis in search(model, encoded, method, beam, special_ids, fusion)]
    if encoded.ctc_log_probs is None:
        raise UserError("this model has no CTC head; decode with --method greedy or --method beam")
    log_probs = encoded.ctc_log_probs
    if fusion is None:
        return ctc_beam_search(log_probs, encoded.lens, beam, model.blank, special_ids)
    within = [(part, weight) for part, weight in fusion.in_search if not isinstance(part, NeuralScorer)]
    beside = CtcFusion(within, fusion.settings.length_bonus)
    log_probs = fusion.log_probs(log_probs, model.blank)
    n_best = ctc_beam_search(log_probs, encoded.lens, beam, model.blank, special_ids, beside)
    # A network is too slow for every candidate of every frame.
    after = [pair for pair in fusion.language_models if pair not in within and pair[1] != 0]
    return rescored(n_best, partial(weighted_scores, after)) if after else n_best


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
