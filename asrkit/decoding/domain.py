"""Searches with what is known of the domain: a decoding graph or a language model beside the CTC head."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

from asrkit.decoding.acoustic import AcousticModel, EncoderOutput
from asrkit.decoding.ctc import NgramFusion
from asrkit.decoding.graph_search import GraphOptions, GraphSearch
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.language_models import open_language_model, scorer_of
from asrkit.decoding.nbest import Scorer, rescored
from asrkit.decoding.recognizer import Recognizer
from asrkit.decoding.search import BEAMS, CTC_GRAPH, Method, search_n_best
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.models.ctc_graph import load_graph, size_of
from asrkit.models.ngram.automaton import Ngram
from asrkit.reporting.results import GraphUse, LmUse

PATHS = 100  # drawn from a lattice where n-best texts are needed and no number was given

NBestSearch = Callable[[EncoderOutput], list[list[Hypothesis]]]


@dataclass(frozen=True)
class Domain:
    """What a search has beside the model; ``graph`` and ``lm`` are directories.

    lm_scale: weight of the language model. bonus: added to the score for each token beside an n-gram model, which would else
    make texts short.
    """

    graph: Path | None = None
    graph_options: GraphOptions = field(default_factory=GraphOptions)
    lm: Path | None = None
    lm_scale: float = 0.3
    bonus: float = 0.0

    def findings(self, methods: Collection[str]) -> list[str]:
        """What contradicts itself, whatever the model."""
        findings = []
        if self.graph is None and self.lm is not None and set(methods) != {"ctc-beam"}:
            findings.append("--lm works with --method ctc-beam, or with --graph; give one of them")
        if self.graph is not None and self.bonus:
            findings.append("--bonus works with --method ctc-beam; a graph takes none")
        return findings


@dataclass(frozen=True)
class Search:
    """A search, called with the encoder's output of a batch, and what results say of it; ``n_best``: whether it has alternatives."""

    run: NBestSearch
    n_best: bool
    graph: GraphUse | None = None
    lm: LmUse | None = None


def make_search(recognizer: Recognizer, method: str, beam: int, domain: Domain, alternatives: bool = False) -> Search:
    """The search by a method, with the graph or the language model of ``domain``, if any.

    Args:
        alternatives: n-best texts are needed, also of a graph.

    Raises:
        UserError: graph or language model cannot be used, or are about another tokenizer.
    """
    special_ids, options = recognizer.tokenizer.special_ids, domain.graph_options
    lm_use = scorer = fusion = None
    if domain.lm is not None:
        model, run = open_language_model(domain.lm, recognizer.tokenizer, recognizer.device)
        if isinstance(model, Ngram) and method == "ctc-beam":
            fusion = NgramFusion(model, domain.lm_scale, domain.bonus)
        else:
            scorer = scorer_of(model)
        digest = sha256_of(run.weights_path)
        lm_use = LmUse(path=str(domain.lm), sha256=digest, scale=domain.lm_scale, bonus=domain.bonus)
    if method != CTC_GRAPH:
        run_search: NBestSearch = partial(
            _search, recognizer.model, method=cast(Method, method), beam=beam, special_ids=special_ids, fusion=fusion
        )
        run_search = run_search if scorer is None else partial(_rescored, run_search, scorer, domain.lm_scale)
        return Search(run_search, method in BEAMS, lm=lm_use)
    if domain.graph is None:
        raise UserError("ctc-graph: give the directory of a decoding graph with --graph")
    graph, record = load_graph(domain.graph, recognizer.tokenizer)
    if options.paths == 0 and (alternatives or scorer is not None):
        options = GraphOptions(**{**vars(options), "paths": PATHS})
    graph_search = GraphSearch(graph, options)
    use = GraphUse(
        path=str(domain.graph), sha256=record.sha256, bytes=size_of(domain.graph),
        **{name: getattr(options, name) for name in ("scale", "search_beam", "output_beam", "max_active", "paths")},
    )  # fmt: skip
    run_search = graph_search if scorer is None else partial(_rescored, graph_search, scorer, domain.lm_scale)
    return Search(run_search, options.paths > 0, use, lm_use)


def _search(model: AcousticModel, encoded: EncoderOutput, **how: object) -> list[list[Hypothesis]]:
    return search_n_best(model, encoded, **how)  # type: ignore[arg-type]


def _rescored(search: NBestSearch, scorer: Scorer, scale: float, encoded: EncoderOutput) -> list[list[Hypothesis]]:
    return rescored(search(encoded), scorer, scale)
