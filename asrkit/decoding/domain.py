"""Searches with what is known of the domain: a decoding graph for CTC, language models, hotwords."""

from __future__ import annotations

from collections.abc import Collection
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
from asrkit.decoding.search import BEAMS, CTC_GRAPH, Method, NBestSearch, cannot_fuse, search_n_best
from asrkit.errors import UserError
from asrkit.models.ctc_graph import CtcGraph, load_graph, size_of
from asrkit.reporting.results import GraphUse

GRAPH_OPTIONS = ("scale", "search_beam", "output_beam", "max_active", "paths")  # those that a result records
PATHS = 100  # drawn from a lattice where n-best texts are needed and no number was given


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
    """A search, called with the encoder's output of a batch, and what results say of it.

    confident: whether it tells confidences of words. unfinished: the search of an utterance that goes on, where that is another one.
    """

    run: NBestSearch
    confident: bool
    fusion: Fusion | None = None
    graph: GraphUse | None = None
    unfinished: NBestSearch | None = None


@dataclass(frozen=True)
class LoadedDomain:
    """What is known of the domain, read and checked, from which searches with any settings are made."""

    recognizer: Recognizer
    fusion: Fusion | None
    graph: CtcGraph | None
    use: GraphUse | None  # the graph in a result, with the options of the request

    def search(
        self, method: str, beam: int, options: GraphOptions, alternatives: bool = False, stream: bool = False
    ) -> Search:
        """The search by a method, or over the graph with ``options``.

        Args:
            alternatives: n-best texts are needed, also of a graph. stream: utterances are searched before they end.
        """
        fusion, special_ids = self.fusion, self.recognizer.tokenizer.special_ids
        if self.graph is None or self.use is None:
            how = {"beam": beam, "special_ids": special_ids, "fusion": fusion}
            run = partial(search_n_best, self.recognizer.model, method=cast(Method, method), **how)  # type: ignore[arg-type]
            return Search(run, method in BEAMS, fusion)
        ranks = fusion is not None and fusion.counts_at_end
        if options.paths == 0 and (alternatives or ranks):
            options = replace(options, paths=PATHS)
        search: NBestSearch = GraphSearch(self.graph, options)
        use = replace(self.use, **{name: getattr(options, name) for name in GRAPH_OPTIONS})
        running = replace(options, paths=0)
        unfinished: NBestSearch | None = (
            GraphSearch(self.graph.prefixes(), running, posteriors=False) if stream else None
        )
        if fusion is not None:
            search = partial(_with_log_probs, search, fusion, self.recognizer.model.blank)
            if ranks:
                search = partial(_ranked, search, fusion)
            if unfinished is not None:
                unfinished = partial(_with_log_probs, unfinished, fusion, self.recognizer.model.blank)
        return Search(search, True, fusion, use, unfinished)


def load_domain(recognizer: Recognizer, domain: Domain) -> LoadedDomain:
    """Read what ``domain`` names.

    Raises:
        UserError: graph, language model or hotwords cannot be used, are about another tokenizer, or not what was tuned with.
    """
    tokenizer, request = recognizer.tokenizer, domain.fusion or FusionRequest()
    if findings := request.other_recognizer(recognizer.run_weights_sha256):
        raise UserError.of(findings)
    fusion = None if domain.fusion is None else load_fusion(request, tokenizer, recognizer.device)
    if domain.graph is None:
        return LoadedDomain(recognizer, fusion, None, None)
    graph, record = load_graph(domain.graph, tokenizer)
    if findings := request.other_part("graph", domain.graph, record.sha256):
        raise UserError.of(findings)
    asked = {name: getattr(domain.graph_options, name) for name in GRAPH_OPTIONS}
    use = GraphUse(path=str(domain.graph), sha256=record.sha256, bytes=size_of(domain.graph), **asked)
    return LoadedDomain(recognizer, fusion, graph, use)


def make_search(
    recognizer: Recognizer, method: str, beam: int, domain: Domain, alternatives: bool = False, stream: bool = False
) -> Search:
    """The search by a method, with what ``domain`` has; see ``load_domain`` and ``LoadedDomain.search``."""
    return load_domain(recognizer, domain).search(method, beam, domain.graph_options, alternatives, stream)


def _with_log_probs(search: NBestSearch, fusion: Fusion, blank: int, encoded: EncoderOutput) -> list[list[Hypothesis]]:
    """The texts of a graph by the temperature and the blank penalty of ``fusion``."""
    if encoded.ctc_log_probs is not None:
        encoded = encoded._replace(ctc_log_probs=fusion.log_probs(encoded.ctc_log_probs, blank))
    return search(encoded)


def _ranked(search: NBestSearch, fusion: Fusion, encoded: EncoderOutput) -> list[list[Hypothesis]]:
    """The texts of a graph, ordered with the language models and the bonus for each token."""

    def scores(tokens: Tensor, lens: Tensor) -> Tensor:
        return weighted_scores(fusion.language_models, tokens, lens) + fusion.settings.length_bonus * lens

    return rescored(search(encoded), scores)
