"""CTC over a decoding graph, by k2: the best path, and n-best texts from the lattice.

Shapes: B utterances, T frames, V tokens, P paths, N texts of all utterances together, U tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from asrkit.config import NonNegative, Positive, config
from asrkit.decoding.acoustic import EncoderOutput
from asrkit.decoding.hypothesis import Hypothesis, without_blanks
from asrkit.decoding.lattices import Lattice, graph_lattice
from asrkit.errors import UserError
from asrkit.extras import require
from asrkit.losses.ctc import ctc_log_probs_of
from asrkit.models.ctc_graph import CtcGraph

SCORED_AT_ONCE = 64  # texts whose frames are in memory together

Beam = Annotated[float, Field(gt=0.0)]


@config
class GraphOptions:
    """How a graph is searched. The beams' defaults are those of icefall."""

    scale: NonNegative = 1.0
    """Weight of the graph's language model."""
    search_beam: Beam = 20.0
    """Log-probability by which a path may fall behind the best one while it is searched."""
    output_beam: Beam = 8.0
    """Log-probability by which a path of the lattice may be worse than its best one."""
    min_active: Positive = 30
    """States that are kept in each frame, whatever the beam."""
    max_active: Positive = 10_000
    """States that are kept in each frame at most. Fewer take less time."""
    paths: Annotated[int, Field(ge=0)] = 0
    """Paths drawn from the lattice for n-best texts, confidences and rescoring; 0 finds the best path alone."""


@dataclass
class GraphSearch:
    """A search over a graph: called with a batch's encoder output, it gives each utterance's texts, the best one first.

    The first is the text of the best path, whose tokens have posteriors unless ``posteriors`` is False. With ``options.paths``, every text has the score
    log P(text | speech), over all its alignments, + ``options.scale`` times the graph's score; without, the score is that of the best
    path. An utterance through whose frames the pruned graph has no path has an empty text with the score -inf.
    """

    graph: CtcGraph
    options: GraphOptions
    posteriors: bool = True
    k2: ModuleType = field(init=False)
    _fsas: dict[torch.device, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.k2 = k2_for_graphs()

    @torch.no_grad()
    def __call__(self, encoded: EncoderOutput) -> list[list[Hypothesis]]:
        """See the class.

        Raises:
            UserError: the model has no CTC head.
        """
        if encoded.ctc_log_probs is None:
            raise UserError("this model has no CTC head, which --graph decodes; use --method greedy or beam")
        nonempty = (encoded.lens > 0).nonzero().squeeze(1)
        results = [[Hypothesis([], [], 0.0)] for _ in range(len(encoded.lens))]
        if len(nonempty):
            searched = self._search(encoded.ctc_log_probs[nonempty].float(), encoded.lens[nonempty])
            for row, hypotheses in zip(nonempty.tolist(), searched, strict=True):
                results[row] = hypotheses
        return results

    def _search(self, log_probs: Tensor, lens: Tensor) -> list[list[Hypothesis]]:
        fsa = self._fsas.get(log_probs.device)
        if fsa is None:
            fsa = self._fsas[log_probs.device] = self.graph.fsa(self.k2, self.options.scale, log_probs.device)
        # Padding may hold anything, and k2 computes with all of it.
        valid = torch.arange(log_probs.shape[1], device=lens.device) < lens.unsqueeze(1)
        log_probs = torch.where(valid.unsqueeze(2), log_probs, 0.0)
        lattice = graph_lattice(self.k2, fsa, log_probs, lens, 1.0, self.options)
        scored = lattice.scored(log_probs, 1.0)
        totals = scored.get_tot_scores(use_double_scores=True, log_semiring=False)
        best = best_paths(self.k2, lattice, scored, log_probs.shape[1])
        best = best._replace(graph=best.graph.masked_fill(~totals.isfinite(), -torch.inf))
        posteriors: list[list[float]] = [[]] * len(lens)
        if self.posteriors:
            posteriors = token_posteriors(lattice, scored, best)
        if self.options.paths == 0:
            return _hypotheses(best, totals, posteriors)
        texts = n_best_texts(self.k2, lattice, scored, best, self.options.paths)
        tokens, token_lens = without_blanks(texts.emitted.unsqueeze(0), 0)
        tokens, token_lens = tokens.squeeze(0), token_lens.squeeze(0)
        totals = _acoustic(log_probs, lens, texts.rows, tokens, token_lens) + texts.graph
        return _hypotheses(texts, totals, posteriors)


def k2_for_graphs() -> ModuleType:
    """k2.

    Raises:
        UserError: it cannot be used; says how to get it, and what does without.
    """
    try:
        return require("k2", for_="decoding graphs")
    except UserError as error:
        raise UserError(f"{error}; without k2, use --method ctc-beam --lm with an n-gram of word pieces") from error


class Paths(NamedTuple):
    """Paths through frames: the utterance of each (P,), what it emits in each frame (P, T), 0 for nothing, and its scores of the
    graph (P,)."""

    rows: Tensor
    emitted: Tensor
    graph: Tensor


def best_paths(k2: ModuleType, lattice: Lattice, scored: Any, num_frames: int) -> Paths:
    """The best path of each of B utterances; one without any emits nothing."""
    fsas = scored.clone()
    fsas.arc = torch.arange(len(lattice.rows), dtype=torch.int32, device=lattice.rows.device)
    arcs = k2.shortest_path(fsas, use_double_scores=True).arc.long()
    rows = torch.arange(fsas.shape[0], device=lattice.rows.device)
    return _paths_of(lattice, rows, lattice.rows[arcs], arcs, num_frames)


def token_posteriors(lattice: Lattice, scored: Any, paths: Paths) -> list[list[float]]:
    """The posterior probability of each token of one path for each utterance, by what ``lattice.scored`` returned: the highest in the frames
    from where the token begins to where the next one does.

    Source: Wessel et al. 2001, C_max (equation 9): the sum over all hypotheses of the same word at a time, and of a word's times
    the one with the highest sum; there of words, here of tokens.
    """
    (count, num_frames), device = paths.emitted.shape, paths.emitted.device
    emits = paths.emitted > 0
    frames = torch.arange(num_frames, device=device)
    begins = torch.where(emits, frames, 0).cummax(dim=1).values  # of the token in each frame; 0 before the first
    token = paths.emitted.gather(1, begins)
    values = lattice.posteriors(scored, token).masked_fill(token == 0, 0.0)
    number = emits.cumsum(dim=1)  # 0 before the first
    highest = np.zeros((count, num_frames + 1))
    np.maximum.at(highest, (np.arange(count)[:, None], number.cpu().numpy()), values.cpu().numpy())
    rows = zip(highest[:, 1:].clip(max=1.0).tolist(), number[:, -1].tolist(), strict=True)
    return [row[:size] for row, size in rows]


def n_best_texts(k2: ModuleType, lattice: Lattice, scored: Any, best: Paths, paths: int) -> Paths:
    """The different texts among the ``best`` path of each utterance and ``paths`` more that are drawn from its lattice, those of the
    best first: of each text, the first path with it, and the best score of the graph."""
    # By a deterministic algorithm, in spite of its name; an utterance without paths gets none. icefall halves the scores for more
    # variety; in utterances of 30 s the paths that are drawn so are too bad to be of use.
    ragged = k2.random_paths(scored, True, paths)
    rows, path_of_arc = ragged.shape.row_ids(1).long(), ragged.shape.row_ids(2).long()
    drawn = _paths_of(lattice, rows, path_of_arc, ragged.values.long(), best.emitted.shape[1])
    rows, emitted, graph = (torch.cat(pair) for pair in zip(best, drawn, strict=True))
    tokens, _ = without_blanks(emitted.unsqueeze(0), 0)
    _, text = torch.unique(torch.cat([rows.unsqueeze(1), tokens.squeeze(0)], dim=1), dim=0, return_inverse=True)
    by_place = text.argsort(stable=True)
    by_graph = graph.argsort(descending=True)
    by_graph = by_graph[text[by_graph].argsort(stable=True)]
    begins = text[by_place].diff(prepend=text.new_tensor([-1])) != 0
    first, top = by_place[begins], graph[by_graph][begins]
    order = first.argsort()
    return Paths(rows[first[order]], emitted[first[order]], top[order])


def _paths_of(lattice: Lattice, rows: Tensor, path_of_arc: Tensor, arcs: Tensor, num_frames: int) -> Paths:
    """Paths whose utterances are ``rows`` (P,), made of ``arcs`` of the lattice; ``path_of_arc`` says of which path each is."""
    graph = torch.zeros(len(rows), device=rows.device).index_add(0, path_of_arc, lattice.graph[arcs])
    labels = torch.zeros(len(rows), num_frames, dtype=torch.int64, device=rows.device)
    inside = lattice.labels[arcs] >= 0
    labels[path_of_arc[inside], lattice.frames[arcs[inside]]] = lattice.labels[arcs[inside]]
    return Paths(rows, _begun(labels), graph)


def _begun(labels: Tensor) -> Tensor:
    """The tokens of frames (P, T) where they begin, 0 where they go on or are blank."""
    return labels.masked_fill(labels == pad(labels[:, :-1], (1, 0)), 0)


def _acoustic(log_probs: Tensor, lens: Tensor, rows: Tensor, tokens: Tensor, token_lens: Tensor) -> Tensor:
    """log P(text | speech) by CTC, (N,): the sum over all alignments, not only those in the lattice."""
    scores = []
    for begin in range(0, len(rows), SCORED_AT_ONCE):
        part = slice(begin, begin + SCORED_AT_ONCE)
        row, sizes = rows[part], token_lens[part].unsqueeze(1)
        scores.append(ctc_log_probs_of(log_probs[row], lens[row], tokens[part].unsqueeze(1), sizes).squeeze(1))
    return torch.cat(scores)


def _hypotheses(paths: Paths, scores: Tensor, posteriors: list[list[float]]) -> list[list[Hypothesis]]:
    """The texts of each utterance: the first path's, which has the ``posteriors`` of its tokens, and the others by their scores."""
    texts: list[list[Hypothesis]] = [[] for _ in posteriors]
    for row, emitted, score in zip(paths.rows.tolist(), paths.emitted.cpu(), scores.tolist(), strict=True):
        frames = emitted.nonzero().squeeze(1)
        known = posteriors[row] if not texts[row] else []
        texts[row].append(Hypothesis(emitted[frames].tolist(), frames.tolist(), score, known))
    return [[first, *sorted(others, key=lambda hypothesis: -hypothesis.score)] for first, *others in texts]
