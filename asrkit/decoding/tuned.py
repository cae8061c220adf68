"""decoding.yaml: how to search, as ``asrkit tune`` found it, and what it was tuned on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from asrkit.config import Positive, config, from_dict, to_dict
from asrkit.decoding.domain import Domain
from asrkit.decoding.fusion import FusedMethod, FusionConfig, FusionRequest
from asrkit.decoding.graph_search import GraphOptions
from asrkit.decoding.search import CTC_GRAPH
from asrkit.errors import UserError
from asrkit.run_dir import read_yaml, write_yaml

PARTS = ("lm", "lodr", "hotwords")


@config
class Source:
    """A file or directory, and the SHA-256 of what it held."""

    path: str
    sha256: str


@config
class Trial:
    """One of the settings that were tried, by the names of the options, and its word error rate."""

    settings: dict[str, float]
    wer: float


@config
class TunedDecoding:
    """The content of decoding.yaml: a beam search with language models and the like, or a search over a graph.

    method: of the transducer, of CTC, or over a graph. recognizer: the run directory it was tuned with, or its export, and the digest
    of the run's weights. tuned_on: the manifest. wer, words: word error rate and words there. trials: everything that was tried.
    """

    beam: Positive
    settings: FusionConfig
    lm: Source | None = None
    lodr: Source | None = None
    hotwords: Source | None = None
    graph: Source | None = None
    graph_options: GraphOptions = field(default_factory=GraphOptions)
    recognizer: Source
    tuned_on: Source
    wer: float
    words: int
    trials: list[Trial] = field(default_factory=list)
    method: FusedMethod = "beam"

    @property
    def domain(self) -> Domain:
        """What it asks of a search."""
        sources = {name: source for name in (*PARTS, "graph") if (source := getattr(self, name)) is not None}
        request = FusionRequest(
            self.settings,
            **{name: Path(source.path) for name, source in sources.items() if name in PARTS},
            expected={name: source.sha256 for name, source in sources.items()},
            tuned_on=to_dict(self.tuned_on),
            tuned_with=to_dict(self.recognizer),
            method=self.method,
        )
        return Domain(None if self.graph is None else Path(self.graph.path), self.graph_options, request)


def write_tuned(path: Path, tuned: TunedDecoding) -> None:
    """Write decoding.yaml, whole or not at all."""
    write_yaml(path, to_dict(tuned))


def read_tuned(path: Path) -> TunedDecoding:
    """Read decoding.yaml.

    Raises:
        UserError: it is missing, or not such a file; a line for each wrong value.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `asrkit tune` writes one")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a file that `asrkit tune` wrote; give its --out")
    tuned = from_dict(TunedDecoding, content, str(path))
    if (tuned.method == CTC_GRAPH) != (tuned.graph is not None):
        raise UserError(f"{path}: method {tuned.method} and graph do not fit each other; run `asrkit tune` again")
    return tuned


def overridden(request: FusionRequest, settings: FusionConfig, parts: Mapping[str, Path | None]) -> FusionRequest:
    """The request with other settings, and other parts where they are given; a part that is given, or a graph, need not be the one
    tuned with."""
    given = {name: path for name, path in parts.items() if path is not None}
    expected = {name: digest for name, digest in request.expected.items() if name not in given}
    replaced: dict[str, Any] = {name: path for name, path in given.items() if name in PARTS}
    return replace(request, settings=settings, expected=expected, **replaced)
