"""Stages of other packages: entry points of the group ``asrkit.stages``.

An entry point's name is the command; it leads to a stage function, such as

    def my_method(manifest: Manifest, out: Out, settings: MyConfig, *, dev: Dev = None, device: Device = "auto") -> None:
        "What the help says."

Its parameters are the command's options, typed as typer has them (``asrkit.cli.options`` has the usual ones). In place of the parameter
that is a settings class (``asrkit.config.config``) stand --config and --set, and --seed and --max-duration where there are such settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_type_hints

import typer

from asrkit.errors import UserError, clip

GROUP = "asrkit.stages"
SHORT = {"seed": "seed", "max_duration": "data.max_duration"}  # options of every stage that has such a setting


def names(built_in: Collection[str]) -> list[str]:
    """The commands that installed packages add."""
    return sorted({entry.name for entry in entry_points(group=GROUP)} - set(built_in))


def shadowed(built_in: Collection[str]) -> Iterator[str]:
    """A line for each entry point that will not run, because a built-in command has its name."""
    for entry in entry_points(group=GROUP):
        if entry.name in built_in:
            yield f"{_where(entry)}: {entry.name} is a built-in command, which runs instead; rename the entry point"


@cache
def load(name: str) -> tuple[Callable[..., Any], str, type]:
    """The stage function of an entry point, its parameter for the settings, and their class.

    Raises:
        UserError: it does not import, or something is missing.
    """
    from asrkit.config import hint_of, is_config
    from asrkit.reporting.settings import undocumented

    entries = list(entry_points(group=GROUP, name=name))
    if len(entries) > 1:
        raise UserError(f"{name}: is a stage of {' and of '.join(_where(entry) for entry in entries)}; uninstall one")
    (entry,) = entries
    where = _where(entry)
    try:
        stage = entry.load()
    except (Exception, SystemExit) as error:  # whatever a module may do as it is imported
        raise UserError(
            f"{where}: does not import ({type(error).__name__}: {' '.join(str(error).split())}); fix or uninstall it"
        ) from error
    if not inspect.isfunction(stage):
        raise UserError(f"{where}: is not a function; an entry point of {GROUP} names a stage function")
    if not (stage.__doc__ or "").strip():
        raise UserError(f"{where}: has no docstring, which is the command's help; write one")
    try:
        hints = get_type_hints(stage, include_extras=True)
    except Exception as error:
        raise UserError(f"{where}: its types cannot be read ({error}); import what they name at the top") from error
    given = inspect.signature(stage).parameters
    if bare := [key for key in given if key not in hints]:
        raise UserError(f"{where}: has no type for {', '.join(bare)}; annotate every parameter")
    if "out" not in given:
        raise UserError(f"{where}: must have a parameter out, the run directory to write")
    settings = [key for key in given if is_config(hints.get(key))]
    if len(settings) != 1:
        raise UserError(f"{where}: must have one parameter of a settings class (`@config` of asrkit.config)")
    added = {"config", "overrides"} | {
        name for name, field in SHORT.items() if hint_of(hints[settings[0]], field) is not Any
    }
    if taken := sorted(added & {*given}):
        raise UserError(f"{where}: {', '.join(taken)}: asrkit adds an option of this name; rename the parameter")
    if missing := undocumented(hints[settings[0]]):
        raise UserError(f"{where}: settings without a docstring under the field: {', '.join(missing)}")
    return stage, settings[0], hints[settings[0]]


def command(name: str, app: type[typer.Typer]) -> Any:
    """The command of an entry point; None where there is none. One that cannot be used says so when it runs."""
    if name not in {entry.name for entry in entry_points(group=GROUP)}:
        return None
    single = app(add_completion=False, rich_markup_mode="markdown")
    try:
        single.command(name)(_function(*load(name)))
    except Exception as error:  # a package of somebody else's breaks its own command only
        message = str(error) if isinstance(error, UserError) else f"{name}: cannot be a command ({clip(error)})"

        def unusable() -> None:
            raise UserError(message)

        anything = {"ignore_unknown_options": True, "allow_extra_args": True}
        single.command(name, help=f"error: {message}", context_settings=anything, add_help_option=False)(unusable)
    return typer.main.get_command(single)


def _function(stage: Callable[..., Any], key: str, cls: type) -> Callable[..., None]:
    """The stage as a function of its options, for typer."""
    from asrkit.cli.options import Config, MaxDuration, Overrides, Seed, given, train_or_stop
    from asrkit.config import hint_of, resolve

    hints = get_type_hints(stage, include_extras=True)
    typed = {"seed": Seed, "max_duration": MaxDuration}
    short = {name: (field, typed[name]) for name, field in SHORT.items() if hint_of(cls, field) is not Any}
    added = {**{name: hint for name, (_, hint) in short.items()}, "config": Config, "overrides": Overrides}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        parameter.replace(annotation=hints[name], kind=keyword)
        for name, parameter in inspect.signature(stage).parameters.items()
        if name != key
    ]
    parameters += [inspect.Parameter(name, keyword, default=None, annotation=hint) for name, hint in added.items()]

    def run(**values: Any) -> None:
        options = given({setting: values.pop(name) for name, (setting, _) in short.items()})
        settings: Any = resolve(cls, values.pop("config"), values.pop("overrides") or (), options=options)
        train_or_stop(values["out"], lambda: stage(**values, **{key: settings}))

    run.__doc__ = stage.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _where(entry: EntryPoint) -> str:
    return f"{entry.dist.name if entry.dist else 'a package'}, entry point {entry.name} = {entry.value}"
