"""Names the entries of registries in the help of verbs, when the help is shown: plug-ins add entries."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from typer.core import TyperCommand, TyperOption

_PLACEHOLDER = re.compile(r"\{([\w.]+):(\w+)\}")


class LateHelp(TyperCommand):
    """A verb in whose help `{module:registry}`, or a function that returns one, becomes the names of the entries."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help."""
        for parameter in self.params:
            if isinstance(parameter, TyperOption) and parameter.help:
                parameter.help = _PLACEHOLDER.sub(_names, parameter.help)
        super().format_help(ctx, formatter)


def _names(match: re.Match[str]) -> str:
    entries = getattr(import_module(match[1]), match[2])
    return ", ".join(entries() if callable(entries) else entries)
