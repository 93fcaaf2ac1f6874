"""Resolves `${parameter}` and `${env:NAME}` in the texts of a pipeline file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flows.refusals import nearest
from lora_engine.documents import parse_value
from registry.store.redaction import has_secret, is_secret_variable
from tasks.errors import SpecError

PARAMETER_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
"""Name of a parameter and of a matrix axis."""
MAX_PIPELINES = 1000
"""Largest number of pipelines of a file."""
_PART = re.compile(r"\$\$|\$\{(?P<inner>[^{}]*)\}|\$\{")
_ENVIRONMENT = re.compile(r"env:(?P<name>[A-Za-z_][A-Za-z0-9_]{0,254})(?P<default>:-.*)?", re.DOTALL)
_PLAIN = re.compile(r"true|false|[-+.0-9][-+.0-9eE]{0,40}")
_SHOWN = 60
_FORMS = "${parameter}, ${env:NAME}, ${env:NAME:-default}, and $$ for a dollar sign"


@dataclass(frozen=True)
class Resolved:
    """A value of a text with references.

    Attributes:
        value: The value.
        secret: The text to record instead, because the value has a secret; None if it has none.
    """

    value: Any
    secret: str | None = None


@dataclass(frozen=True)
class References:
    """What the references of a file mean.

    Args:
        values: Parameter or axis -> its value.
        unset: Parameters without a value -> where they are declared.
        environment: The environment variables.
    """

    values: Mapping[str, Resolved]
    unset: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def with_values(self, cell: Mapping[str, Any]) -> References:
        """Returns these references with the values of a cell of the matrix."""
        values = {**self.values, **{name: Resolved(value) for name, value in cell.items()}}
        unset = {name: where for name, where in self.unset.items() if name not in cell}
        return References(values, unset, self.environment)

    def resolve(self, text: str, where: Callable[[], str]) -> Resolved:
        """Returns the value of a text; a text that is one reference has the type of its value.

        Args:
            text: The text.
            where: Gives the place of the text, for errors.

        Raises:
            SpecError: A reference has another form, or no value.
        """
        whole = _PART.fullmatch(text)
        if whole is not None and whole["inner"] is not None:
            return self._look_up(whole["inner"], where, typed=True)
        parts: list[tuple[str, str]] = []
        secret, end = False, 0
        for match in _PART.finditer(text):
            parts.append((text[end : match.start()],) * 2)
            end = match.end()
            if match[0] == "$$":
                parts.append(("$", "$$"))
                continue
            if match["inner"] is None:
                raise SpecError(f"'${{' without '}}' in {text[:_SHOWN]!r}", where=where(), allowed=_FORMS)
            resolved = self._look_up(match["inner"], where, typed=False)
            secret = secret or resolved.secret is not None
            inserted = _to_text(resolved.value, match["inner"], where)
            parts.append((inserted, resolved.secret or escape(inserted)))
        parts.append((text[end:],) * 2)
        return Resolved("".join(value for value, _ in parts), "".join(text for _, text in parts) if secret else None)

    def _look_up(self, inner: str, where: Callable[[], str], *, typed: bool) -> Resolved:
        if match := _ENVIRONMENT.fullmatch(inner):
            return self._look_up_variable(match["name"], match["default"], where, typed=typed)
        if inner in self.values:
            return self.values[inner]
        if inner in self.unset:
            raise SpecError(
                f"parameter {inner!r} has no value", where=where(), remedy=f"give --param {inner}=..., or a default"
            )
        if not PARAMETER_NAME.fullmatch(inner):
            raise SpecError(f"'${{{inner[:_SHOWN]}}}' is no reference", where=where(), allowed=_FORMS)
        raise SpecError(
            f"'${{{inner}}}' names no parameter", where=where(), **nearest(inner, {*self.values, *self.unset})
        )

    def _look_up_variable(self, name: str, default: str | None, where: Callable[[], str], *, typed: bool) -> Resolved:
        value = self.environment.get(name) or (None if default is None else default[2:])
        if value is None:
            raise SpecError(
                f"environment variable {name!r} is not set",
                where=where(),
                remedy=f"set it, or write ${{env:{name}:-default}}",
            )
        if is_secret_variable(name) and default not in (None, ":-"):
            raise SpecError(
                f"the default of {name!r} is a secret in plain text",
                where=where(),
                remedy=f"write ${{env:{name}}}, and set the variable",
            )
        if is_secret_variable(name) or has_secret(value):
            return Resolved(value, f"${{env:{name}}}")
        return Resolved(typed_value(value, where()) if typed else value)


def typed_value(text: str, where: str) -> Any:
    """Returns a number, True or False for a text that is one in YAML; other texts as they are."""
    if not _PLAIN.fullmatch(text):
        return text
    value = parse_value(text, where, SpecError)
    return value if isinstance(value, bool | int | float) else text


def escape(text: str) -> str:
    """Returns a text that resolves to the given one."""
    return re.sub(r"\$(?=[${])", "$$", text)


def _to_text(value: Any, inner: str, where: Callable[[], str]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    kind = "a list" if isinstance(value, list) else "no value"
    raise SpecError(
        f"'${{{inner}}}' is {kind}, which cannot be a part of a text",
        where=where(),
        remedy=f"make '${{{inner}}}' the whole value",
    )
