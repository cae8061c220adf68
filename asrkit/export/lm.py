"""Language models for sherpa-onnx's transducers: lm.onnx for a network, lodr.fst for the low-order n-gram that is subtracted.

The client takes a network in one of two forms: streaming recognizers add it up token by token, in the search (``NextToken``); those of
whole recordings score the hypotheses at the end of the search (``WholeSequence``).

Shapes: N sequences, L symbols, V vocabulary, H width and K layers of the LSTM.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from asrkit.errors import UserError
from asrkit.export.directory import LmRecord
from asrkit.export.graphs import Graph
from asrkit.export.onnx_file import write_onnx
from asrkit.export.openfst import write_openfst
from asrkit.export.runtime import OnnxFile
from asrkit.models.lm import END, LanguageModel
from asrkit.models.ngram.automaton import Ngram

LM, LODR = "lm", "lodr.fst"
MAX_ARCS = 1 << 22  # of lodr.fst, 16 bytes each
TOLERANCE = 1e-3  # of log-probabilities


class NextToken(nn.Module):
    """x (N, 1), h and c (K, N, H) -> log-probabilities (N, 1, V) of what follows, the next h and c."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layers = self.model.layers
        assert isinstance(layers, nn.LSTM)
        out, (next_h, next_c) = layers(self.model.embedding(x), (h, c))
        return self.model.out(out).log_softmax(dim=-1), next_h, next_c


class WholeSequence(nn.Module):
    """x (N, L) padded with 0, x_lens (N,) -> -log P (N,) of each sequence and its end."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, x_lens: Tensor) -> Tensor:
        log_probs = self.model(x).log_softmax(dim=-1)  # (N, L + 1, V)
        targets = torch.cat([x, torch.full_like(x_lens, END).unsqueeze(1)], dim=1)
        nll = -log_probs.gather(2, targets.unsqueeze(2)).squeeze(2)
        position = torch.ones_like(targets).cumsum(dim=1) - 1
        return nll.masked_fill(position > x_lens.unsqueeze(1), 0.0).sum(dim=1)


def lm_graph(model: LanguageModel, streaming: bool, comment: str) -> Graph:
    """lm.onnx of a network, in streaming an LSTM."""
    about = {"version": "1", "model_author": "asrkit", "comment": comment}
    if not streaming:
        example = (torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([3, 2]))
        dynamic = {"x": {0: "N", 1: "L"}, "x_lens": {0: "N"}, "nll": {0: "N"}}
        return Graph(LM, WholeSequence(model), example, ("x", "x_lens"), ("nll",), dynamic, about)
    shape = model.spec.shape
    zeros = torch.zeros(shape.num_layers, 2, shape.dim)
    axes = {name: {0: "N"} for name in ("x", "log_probs")} | {name: {1: "N"} for name in ("h", "c", "next_h", "next_c")}
    about |= {"num_layers": str(shape.num_layers), "hidden_size": str(shape.dim), "sos_id": str(END)}
    inputs = (torch.tensor([[1], [1]]), zeros, zeros)
    return Graph(LM, NextToken(model), inputs, ("x", "h", "c"), ("log_probs", "next_h", "next_c"), axes, about)


def write_lm(model: LanguageModel, streaming: bool, comment: str, path: Path) -> float:
    """Write lm.onnx and return the largest difference of its log-probabilities from torch's.

    Raises:
        UserError: the file computes something else.
    """
    write_onnx(lm_graph(model, streaming, comment), path, {})
    run = OnnxFile(path)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.spec.vocab_size, (3, 7), generator=generator)
    lens = torch.tensor([7, 4, 0])
    with torch.no_grad():
        log_probs = model(tokens).log_softmax(dim=-1)
        if streaming:
            shape = model.spec.shape
            h = c = torch.zeros(shape.num_layers, len(tokens), shape.dim)
            steps = []
            for position in range(tokens.shape[1] + 1):
                x = tokens[:, position - 1 : position] if position else torch.full_like(tokens[:, :1], END)
                out, h, c = run(x, h, c)
                steps.append(out.squeeze(1))
            difference = float((torch.stack(steps, dim=1) - log_probs).abs().max())
        else:
            expected = WholeSequence(model)(tokens, lens)
            difference = float((run(tokens, lens)[0] - expected).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"{path.name}: onnxruntime differs from torch by {difference:.1e} in log-probabilities; report it"
        )
    return difference


@dataclass(frozen=True)
class LmPlan:
    """The language models to write, and what export.yaml says of them."""

    model: LanguageModel
    lodr: Ngram | None
    record: LmRecord


def write_language_models(plan: LmPlan, streaming: bool, comment: str, directory: Path) -> list[str]:
    """Write lm.onnx and lodr.fst; returns their names.

    Raises:
        UserError: the client cannot take them, or a file computes something else.
    """
    write_lm(plan.model, streaming, comment, directory / f"{LM}.onnx")
    if plan.lodr is None:
        return [f"{LM}.onnx"]
    write_lodr(plan.lodr, directory / LODR)
    return [f"{LM}.onnx", LODR]


def write_lodr(model: Ngram, path: Path) -> None:
    """Write lodr.fst: the n-gram as an FST in OpenFst's binary format (vector, standard arcs), in which state 0 is the first and
    labels are tokens.

    The client follows every back-off arc and takes the best path, which is not the n-gram's probability where backing off is
    likelier than the n-gram. So every state has an arc for every token; the only back-off arc, which it wants to see, leads
    from a state that nothing reaches.

    See ``cannot_take`` for models that would be too large.
    """
    size = len(model.symbols)
    states, tokens = torch.tensor(_reachable(model)), torch.arange(1, size)
    count, every = len(states), states.repeat_interleave(size - 1)
    number = torch.zeros(model.num_states, dtype=torch.int64).scatter(0, states, torch.arange(count))
    source, label = torch.arange(count).repeat_interleave(size - 1), tokens.repeat(count)
    arcs = torch.stack([source, number[model.advance(every, label)], label, label], dim=1)
    rows = -model.score(states).double()  # (count, V)
    back_off = torch.tensor([[count, 0, size, 0]])
    costs = torch.cat([rows[:, 1:].flatten(), rows.new_zeros(1)]).numpy()
    ends = torch.cat([rows[:, END], rows.new_full((1,), torch.inf)]).numpy()
    write_openfst(path, torch.cat([arcs, back_off]).numpy(), costs, ends, "vector")


def cannot_take(model: object, lodr: object, streaming: bool) -> list[str]:
    """Why the client cannot decode with a model of --lm and one of --lodr (None: there is none); [] if it can."""
    findings = []
    if not isinstance(model, LanguageModel):
        findings.append(
            "--lm: sherpa-onnx's transducers take a network, not an n-gram; train one with `asrkit train-lm --kind lstm`, or decode "
            "with the n-gram by asrkit"
        )
    elif streaming and model.spec.shape.architecture != "lstm":
        findings.append(
            f"--lm: sherpa-onnx's streaming recognizers take an LSTM, not a {model.spec.shape.architecture}; train one with "
            "`asrkit train-lm --kind lstm`"
        )
    if lodr is not None and not isinstance(lodr, Ngram):
        findings.append(
            "--lodr: sherpa-onnx subtracts an n-gram, not a network; train one with `train-lm --kind ngram --order 2`"
        )
    elif isinstance(lodr, Ngram) and len(_reachable(lodr)) * len(lodr.symbols) > MAX_ARCS:
        findings.append(
            f"--lodr: the client needs an arc for each of {len(lodr.symbols):,} tokens from every state, and this n-gram has too many; "
            "train one with --order 2"
        )
    return findings


def _reachable(model: Ngram) -> list[int]:
    """The states that token sequences lead to, the first one first."""
    tokens = torch.arange(1, len(model.symbols))
    seen = waiting = [model.start_state]
    while waiting:
        states = torch.tensor(waiting).repeat_interleave(len(tokens))
        after = model.advance(states, tokens.repeat(len(waiting))).unique().tolist()
        waiting = [state for state in after if state not in set(seen)]
        seen = [*seen, *waiting]
        if len(seen) * len(tokens) > MAX_ARCS:
            break
    return seen
