"""Decoding graphs on disk: a directory with an acceptor of CTC frames, and what it was made of.

graph.safetensors   arcs and scores
graph.yaml          what they are, with the digest of the file above and of the tokenizer whose tokens they are about

A graph fits every model of its tokenizer. It may come from a stranger: k2 ends the process on an acceptor it does not like, so
everything is checked before k2 sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from asrkit.config import Positive, config, digest, from_dict, to_dict
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.disk import atomic_directory, sha256_of
from asrkit.errors import UserError
from asrkit.run_dir import read_yaml, write_yaml

TENSORS, RECORD = "graph.safetensors", "graph.yaml"
MAX_ARCS = 20_000_000  # 16 bytes of memory each, and as many on disk
END = -1  # the label of an arc into the final state

Source = Literal["lm", "text", "denominator"]


@config
class GraphRecord:
    """graph.yaml. source: an n-gram model, a list of sentences, or what sequence-train trained against. words: those the graph
    has, of a graph of words or sentences. not_spelled: words of the model that the tokenizer cannot spell, which are not in it.
    sha256: of the tensors' file; own: of everything else in this file, as canonical JSON."""

    format: Literal[1] = 1
    source: Source
    origin: str
    origin_sha256: str
    unit: Literal["bpe", "word"]
    order: Annotated[int, Field(ge=0)]
    words: Annotated[int, Field(ge=0)]
    not_spelled: list[str]
    vocab_size: Positive
    tokenizer_sha256: str
    states: Positive
    arcs: Positive
    sha256: str
    own: str = ""


@dataclass(frozen=True)
class CtcGraph:
    """An acceptor of frames; state 0 is the first, the last one final.

    arcs: (A, 3) int32: from, to, label, sorted by where they come from. The label is the token of a frame, 0 for blank, -1 into the
        final state.
    scores: (A,) float32, natural log-probabilities of the language model.
    """

    arcs: Tensor
    scores: Tensor

    @property
    def num_states(self) -> int:
        return int(self.arcs[:, 1].max()) + 1

    def prefixes(self) -> CtcGraph:
        """The graph that accepts every beginning of what this one accepts, without a score for where it ends."""
        inner, last = self.arcs[:, 2] != END, self.num_states - 1
        states = torch.arange(last, dtype=torch.int32)
        ends = torch.stack([states, torch.full_like(states, last), torch.full_like(states, END)], dim=1)
        arcs = torch.cat([self.arcs[inner], ends])
        scores = torch.cat([self.scores[inner], torch.zeros(last)])
        order = arcs[:, 0].argsort(stable=True)
        return CtcGraph(arcs[order], scores[order])

    def fsa(self, k2: ModuleType, scale: float, device: torch.device) -> Any:
        """As an acceptor of k2; the attribute ``lm`` and the scores are ``scale`` times those here."""
        scores = (scale * self.scores).to(torch.float32)
        fsa = k2.Fsa(torch.cat([self.arcs, scores.view(torch.int32).unsqueeze(1)], dim=1).to(device))
        fsa.lm = scores.to(device)
        return k2.arc_sort(fsa)

    def findings(self, vocab_size: int) -> list[str]:
        """What is wrong with it, for tokens below ``vocab_size``."""
        arcs, scores = self.arcs, self.scores
        if arcs.dtype != torch.int32 or arcs.dim() != 2 or arcs.shape[1:] != (3,) or not 0 < len(arcs) <= MAX_ARCS:
            return [f"arcs are not between 1 and {MAX_ARCS:,} rows of three 32-bit integers"]
        if scores.dtype != torch.float32 or scores.shape != arcs.shape[:1] or not scores.isfinite().all():
            return ["scores are not a finite 32-bit number for each arc"]
        source, target, label = arcs.unbind(dim=1)
        last = int(target.max())
        checks = {
            "arcs are not sorted by where they come from": bool((source[1:] < source[:-1]).any()),
            "a state is negative or has no arcs into it": bool((source < 0).any() or (target < 0).any())
            or int(source.max()) >= last
            or last > len(arcs),
            f"a label is no token below {vocab_size}": bool(((label < END) | (label >= vocab_size)).any()),
            "an arc into the final state has a token, or one elsewhere has none": bool(
                ((target == last) != (label == END)).any()
            ),
        }
        return [finding for finding, wrong in checks.items() if wrong]


def save_graph(out: Path, graph: CtcGraph, facts: dict[str, Any]) -> GraphRecord:
    """Write the graph's directory, whole or not at all; ``facts`` are the fields of the record that the graph does not tell."""
    with atomic_directory(out) as directory:
        tensors = {"arcs": graph.arcs.contiguous(), "scores": graph.scores.contiguous()}
        (directory / TENSORS).write_bytes(save(tensors))  # save_file writes files that only their owner may read
        counted = {"states": graph.num_states, "arcs": len(graph.arcs), "sha256": sha256_of(directory / TENSORS)}
        record = from_dict(GraphRecord, {**facts, **counted}, RECORD)
        write_yaml(directory / RECORD, to_dict(record) | {"own": _own(record)})
    return record


def is_graph(path: Path) -> bool:
    """Whether there is a graph's directory."""
    return (path / RECORD).is_file()


def load_graph(path: Path, tokenizer: Tokenizer) -> tuple[CtcGraph, GraphRecord]:
    """The graph of a directory, for a model with the tokenizer.

    Raises:
        UserError: it is missing, damaged, or about the tokens of another tokenizer.
    """
    if not is_graph(path):
        raise UserError(f"{path}: holds no decoding graph; make one with `asrkit graph --out {path}`")
    content = read_yaml(path / RECORD)
    if not isinstance(content, dict):
        raise UserError(f"{path / RECORD}: holds no keys; make the graph again with `asrkit graph`")
    record = from_dict(GraphRecord, content, str(path / RECORD))
    if record.own != _own(record):
        raise UserError(f"{path / RECORD}: was edited or is damaged; make the graph again with `asrkit graph`")
    if not (path / TENSORS).is_file() or sha256_of(path / TENSORS) != record.sha256:
        raise UserError(f"{path / TENSORS}: missing or not the one that was written; make the graph again")
    if record.tokenizer_sha256 != sha256_of(tokenizer.path):
        raise UserError(
            f"{path}: was made for another tokenizer than {tokenizer.path}; make one for this model with "
            "`asrkit graph --from`"
        )
    try:
        tensors = load_file(path / TENSORS)
        graph = CtcGraph(tensors["arcs"], tensors["scores"])
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path / TENSORS}: holds no graph ({error}); make it again with `asrkit graph`") from error
    if findings := graph.findings(min(record.vocab_size, tokenizer.vocab_size)):
        raise UserError.of([f"{path / TENSORS}: {finding}; make it again with `asrkit graph`" for finding in findings])
    return graph, record


def size_of(path: Path) -> int:
    """The bytes of a graph's tensors."""
    return (path / TENSORS).stat().st_size


def _own(record: GraphRecord) -> str:
    return digest({key: value for key, value in to_dict(record).items() if key != "own"})
