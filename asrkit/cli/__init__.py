"""The command line: parse, call a stage, print. No logic lives here.

Stages (and with them torch and lhotse) are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Annotated, Any

import typer
import typer.main

from asrkit import __version__
from asrkit.cli import (
    compress,
    data,
    distill,
    domain,
    evaluate,
    export,
    failures,
    inspect,
    label,
    lm,
    plugins,
    sequence,
    settings,
    submodel,
    supernet,
    train,
)
from asrkit.cli.app import App, Commands

app = App(
    cls=Commands,
    name="asrkit",
    help="Turn real speech into small, fast, streaming speech recognizers.",
    epilog="Start with `asrkit data import` or `asrkit data prompts`, then train-backbone, evaluate, export. Every command has --help with examples.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn real speech into small, fast, streaming speech recognizers."""


# What the commands of each module are listed under.
PANELS = {
    "Data": (data, label),
    "Training": (train, submodel, distill, sequence, supernet),
    "Compression": (compress,),
    "Alignments, language models, graphs": (lm, domain),
    "Recognition and export": (evaluate, export),
    "Inspection": (inspect, settings),
}

for _panel, _modules in PANELS.items():
    _commands, _groups = len(app.registered_commands), len(app.registered_groups)
    for _module in _modules:
        _module.register(app)
    for _command in app.registered_commands[_commands:]:
        _command.rich_help_panel = _panel
    for _group in app.registered_groups[_groups:]:
        _group.rich_help_panel = _panel


def built_in() -> set[str]:
    """The names of asrkit's own commands."""
    return {str(info.name) for infos in (app.registered_commands, app.registered_groups) for info in infos}


@cache
def _parser() -> Any:
    """All commands, which typer would make anew at each call."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line; a user's mistake is printed line by line and ends with exit code 1, as does any other failure."""
    for line in plugins.shadowed(built_in()):
        print(f"error: {line}", file=sys.stderr)
    words = sys.argv[1:]
    for number, word in enumerate(words):
        if word == "" or (
            word.startswith("--") and word.find("=") == len(word) - 1
        ):  # as where a shell's variable is not set
            after = word or (f"word {number + 1}, after {words[number - 1]}," if number else "the first word")
            print(f"error: {after} is empty; give a value", file=sys.stderr)
            sys.exit(2)
    try:
        try:
            _parser()()
        finally:
            failures.flush_output()
    except Exception as error:
        failures.show(error)
        sys.exit(1)
