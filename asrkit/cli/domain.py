"""graph, and the options of searches with a graph or a language model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asrkit.cli.fusion import FusionOptions, fusion_request
from asrkit.cli.options import given, io

if TYPE_CHECKING:
    from asrkit.decoding.domain import Domain

domain = partial(typer.Option, rich_help_panel="Decoding graphs, for CTC")

Graph = Annotated[
    Path | None, domain(help="Decode CTC over this graph, made by `asrkit graph`, instead of by --method.")
]
GraphScale = Annotated[
    float | None, domain(min=0.0, help="Weight of the language model in the graph; tune it on dev. [default: 1]")
]
SearchBeam = Annotated[
    float | None,
    domain(help="--graph: log-probability by which a path may fall behind the best one in the search. [default: 20]"),
]
OutputBeam = Annotated[
    float | None,
    domain(help="--graph: log-probability by which a path of the lattice may be worse than the best. [default: 8]"),
]
MaxActive = Annotated[int | None, domain(min=1, help="--graph: largest number of states in a frame. [default: 10000]")]
Paths = Annotated[
    int | None,
    domain(
        min=0,
        help="--graph: paths to draw from the lattice for n-best texts. [default: 0; 100 for --nbest, --lm and --length-bonus]",
    ),
]


@dataclass
class GraphChoice:
    """The options of a search over a graph."""

    graph: Graph = None
    graph_scale: GraphScale = None
    search_beam: SearchBeam = None
    output_beam: OutputBeam = None
    max_active: MaxActive = None
    paths: Paths = None

    @property
    def settings(self) -> dict[str, Any]:
        """Those that were given, by the field of GraphOptions."""
        names = ("search_beam", "output_beam", "max_active", "paths")
        return given({"scale": self.graph_scale} | {name: getattr(self, name) for name in names})


def register(app: typer.Typer) -> None:
    """Add the command ``graph``."""
    app.command("graph")(graph)


def domain_options(
    tuned: Path | None, beam: int | None, fusion: FusionOptions, choice: GraphChoice, method: bool
) -> tuple[int, Domain]:
    """The beam, and what a search uses in addition to the model: what is given overrides --decoding.

    Args:
        method: whether a method was chosen, which a graph takes the place of.

    Raises:
        UserError: options of a graph without one or beside a method, or values out of range.
    """
    from asrkit.config import from_dict, to_dict
    from asrkit.decoding.domain import Domain
    from asrkit.decoding.graph_search import GraphOptions
    from asrkit.decoding.tuned import read_tuned
    from asrkit.errors import UserError

    decoding = None if tuned is None else read_tuned(tuned)
    base = Domain() if decoding is None else decoding.domain
    path = choice.graph or base.graph
    if path is None and choice.settings:
        options = ["--graph-scale" if name == "scale" else f"--{name.replace('_', '-')}" for name in choice.settings]
        raise UserError(f"{', '.join(options)}: has no effect without --graph; give one, or drop it")
    if path is not None and method:
        origin = "--graph" if choice.graph is not None else f"--decoding {tuned}, tuned for a graph,"
        raise UserError(f"{origin} and --method: a graph has its own search; drop --method")
    if path is not None and beam is not None:
        raise UserError("--beam: has no effect with a graph, whose beams are --search-beam and --output-beam; drop it")
    request = fusion_request(fusion, base.fusion, choice.graph)
    settings = from_dict(GraphOptions, {**to_dict(base.graph_options), **choice.settings}, "--graph")
    return beam or (4 if decoding is None else decoding.beam), Domain(path, settings, request)


def graph(
    run: Annotated[Path, io("--from", help="Run directory or exported model whose tokenizer the graph is for.")],
    out: Annotated[Path, io(help="Directory to write the graph to.")],
    lm: Annotated[
        Path | None, io(help="n-gram model of words or word pieces, made by `asrkit train-lm --kind ngram`.")
    ] = None,
    text: Annotated[
        Path | None, io(help="UTF-8 text whose lines are the only sentences to recognize, such as a device's commands.")
    ] = None,
) -> None:
    """Make a decoding graph for CTC from a language model or a list of sentences; needs k2.

    Examples:

        asrkit graph --from exp/backbone --lm exp/lm4 --out exp/hlg

        asrkit graph --from exp/backbone --text commands.txt --out exp/commands

        asrkit graph --from exp/mmi --out exp/mmi-graph

    Without --lm and --text, the graph is the denominator that sequence-train wrote to the run directory, so that a model trained by MMI
    with an n-gram is decoded with the same one.

    Use the graph with: asrkit evaluate --from exp/backbone --graph exp/hlg --manifest test.jsonl.gz
    """
    from asrkit.stages.graph import make_graph

    record = make_graph(run, out, lm=lm, text=text)
    for word in record.not_spelled:
        typer.echo(f"left out: the tokenizer cannot spell {word}", err=True)
    words = f", {record.words:,} words" if record.words else ""
    typer.echo(f"{out}: {record.states:,} states, {record.arcs:,} arcs{words}")
