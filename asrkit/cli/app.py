"""How typer is used here: --help in the last panel, and the stages that other packages bring among the commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from asrkit.cli import plugins


class Command(TyperCommand):
    """A command whose own options come before --help, and that says so where Ctrl-C ends it."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = "Help"  # type: ignore[attr-defined, unused-ignore]
        return option

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, RuntimeError) as error:
            # pybind11 makes a RuntimeError of a Ctrl-C that comes while a module of C++ is imported.
            if isinstance(error, RuntimeError) and not str(error).startswith("KeyboardInterrupt"):
                raise
            typer.echo("stopped; run the same command again to finish", err=True)
            raise typer.Exit(130) from None


class App(typer.Typer):
    """A group of such commands."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=Command, **options)


class Commands(TyperGroup):
    """The built-in commands, and the stages of installed packages, which are imported only when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *plugins.names(self.commands)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or plugins.command(cmd_name, App)
