"""Adds verbs to the command, each with its access to the home; names entries of registries in their help."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from enum import Enum
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption
from typer.main import get_command_from_info
from typer.models import CommandInfo

_PLACEHOLDER = re.compile(r"\{([\w.]+):(\w+)\}")


class Access(Enum):
    """Access of a verb to the home: none, read, write, or delete, which must work on a full disk."""

    NONE = "none"
    READ = "read"
    WRITE = "write"
    DELETE = "delete"


_running: ContextVar[Access] = ContextVar("running", default=Access.NONE)


def add_verb(app: typer.Typer, access: Access, *verbs: Callable[..., None], name: str | None = None) -> None:
    """Adds verbs to the command.

    Args:
        app: The command.
        access: Access to the home; `flows.cli.output.open_home` opens it so.
        verbs: Functions that define the verbs.
        name: Name of the verb; None means that of the function.
    """
    for verb in verbs:
        settings = {"obj": access}
        named = name or verb.__name__.replace("_", "-")
        app.command(named, cls=Verb, context_settings=settings, help=inspect.getdoc(verb))(_undefined(verb))


def _undefined(verb: Callable[..., None]) -> Callable[[], None]:
    """Returns a function without parameters that names the function of a verb."""

    def undefined() -> None:
        raise NotImplementedError(verb.__name__)

    undefined.verb = verb  # type: ignore[attr-defined]
    return undefined


def access_of_running() -> Access:
    """Returns the access of the verb that runs."""
    return _running.get()


class Verb(TyperCommand):
    """A verb in whose help `{module:registry}`, or a function that returns one, becomes the names of the entries.

    Plug-ins add entries, so the names are looked up when the help is shown. The parser is made when the verb is used:
    evaluating the annotations of all verbs takes a quarter of a second.
    """

    def __init__(self, name: str, *, callback: Any, **settings: Any) -> None:
        super().__init__(name, callback=callback, **settings)
        self._function: Callable[..., None] = callback.verb
        del self.params, self.callback

    def __getattr__(self, name: str) -> Any:
        """Makes the parser when its parameters or its function are first read."""
        if name not in {"params", "callback"}:
            raise AttributeError(name)
        info = CommandInfo(self.name, callback=self._function)
        made = get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=None)
        self.params, self.callback = made.params, made.callback
        return getattr(self, name)

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb."""
        token = _running.set(ctx.obj)
        try:
            if ctx.obj in {Access.NONE, Access.READ} or not os.environ.get("PREFECT_API_URL"):
                return super().invoke(ctx)
            from flows.cli.output import home_path
            from flows.events import sending_events

            with sending_events(home_path()):
                return super().invoke(ctx)
        finally:
            _running.reset(token)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help."""
        for parameter in self.params:
            if isinstance(parameter, TyperOption) and parameter.help:
                parameter.help = _PLACEHOLDER.sub(_names, parameter.help)
        super().format_help(ctx, formatter)


def _names(match: re.Match[str]) -> str:
    entries = getattr(import_module(match[1]), match[2])
    return ", ".join(entries() if callable(entries) else entries)
