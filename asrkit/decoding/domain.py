"""Searches with what is known of the domain: a decoding graph for CTC, language models, hotwords."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor

from asrkit.decoding.acoustic import EncoderOutput
from asrkit.decoding.fusion import Fusion, FusionRequest, load_fusion, weighted_scores
from asrkit.decoding.graph_search import GraphOptions, GraphSearch
from asrkit.decoding.hypothesis import Hypothesis, rescored
from asrkit.decoding.recognizer import Recognizer
from asrkit.decoding.search import BEAMS, CTC_GRAPH, Method, cannot_fuse, search_n_best
from asrkit.models.ctc_graph import load_graph, size_of
from asrkit.reporting.results import GraphUse

PATHS = 100  # drawn from a lattice where n-best texts are needed and no number was given

NBestSearch = Callable[[EncoderOutput], list[list[Hypothesis]]]


@dataclass(frozen=True)
class Domain:
    """What a search has beside the model; ``graph`` is the directory of a decoding graph, which takes the place of the method."""

    graph: Path | None = None
    graph_options: GraphOptions = field(default_factory=GraphOptions)
    fusion: FusionRequest | None = None

    def findings(self, methods: Collection[str]) -> list[str]:
        """What contradicts itself, whatever the model."""
        if self.fusion is None:
            return []
        if self.graph is not None and self.fusion.hotwords is not None:
            return ["--hotwords works with --method beam or ctc-beam; a graph takes none"]
        return [cannot_fuse(method) for method in methods if method not in (*BEAMS, CTC_GRAPH)]


@dataclass(frozen=True)
class Search:
    """A search, called with the encoder's output of a batch, and what results say of it; ``n_best``: whether it has alternatives."""

    run: NBestSearch
    n_best: bool
    fusion: Fusion | None = None
    graph: GraphUse | None = None


def make_search(recognizer: Recognizer, method: str, beam: int, domain: Domain, alternatives: bool = False) -> Search:
    """The search by a method, with what ``domain`` has.

    Args:
        alternatives: n-best texts are needed, also of a graph.

    Raises:
        UserError: graph, language model or hotwords cannot be used, or are about another tokenizer.
    """
    tokenizer, fusion = recognizer.tokenizer, None
    if domain.fusion is not None:
        fusion = load_fusion(domain.fusion, tokenizer, recognizer.device)
    if domain.graph is None:
        how = {"beam": beam, "special_ids": tokenizer.special_ids, "fusion": fusion}
        run = partial(search_n_best, recognizer.model, method=cast(Method, method), **how)  # type: ignore[arg-type]
        return Search(run, method in BEAMS, fusion)
    graph, record = load_graph(domain.graph, tokenizer)
    options = domain.graph_options
    if options.paths == 0 and (alternatives or fusion is not None):
        options = replace(options, paths=PATHS)
    search: NBestSearch = GraphSearch(graph, options)
    use = GraphUse(
        path=str(domain.graph), sha256=record.sha256, bytes=size_of(domain.graph),
        **{name: getattr(options, name) for name in ("scale", "search_beam", "output_beam", "max_active", "paths")},
    )  # fmt: skip
    if fusion is not None:
        search = partial(_over_the_graph, search, fusion, recognizer.model.blank)
    return Search(search, options.paths > 0, fusion, use)


def _over_the_graph(search: NBestSearch, fusion: Fusion, blank: int, encoded: EncoderOutput) -> list[list[Hypothesis]]:
    """The texts of a graph, ordered with the language models and the bonus for each token."""
    if encoded.ctc_log_probs is not None:
        encoded = encoded._replace(ctc_log_probs=fusion.log_probs(encoded.ctc_log_probs, blank))

    def scores(tokens: Tensor, lens: Tensor) -> Tensor:
        return weighted_scores(fusion.language_models, tokens, lens) + fusion.settings.length_bonus * lens

    return rescored(search(encoded), scores)
