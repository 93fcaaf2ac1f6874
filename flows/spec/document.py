"""Defines a pipeline file as data that may come from several files: overlays, overrides and references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_engine.documents import Document, Where
from registry.store.redaction import has_secret, is_secret_key
from tasks.errors import SpecError


@dataclass(frozen=True)
class PipelineDocument(Document):
    """The data of a pipeline file, merged with those that it extends.

    Args:
        files: Location in the data -> the file in which it is written, if that is not `path`.
        written: Location -> (value, text that is recorded for it): a reference to a secret, or an escaped `$`.
        cell: The values of the matrix that the data are for; None without a matrix.
    """

    files: dict[Where, Path] = field(default_factory=dict)
    written: Mapping[Where, tuple[Any, str]] = field(default_factory=dict)
    cell: Mapping[str, Any] | None = None

    def where(self, location: Where) -> str:
        """Returns `file:line:column` of a location, or of its nearest known parent."""
        known = self._known(location)
        return ":".join(map(str, (self.file_of(known), *self.lines.get(known, (1, 1)))))

    def file_of(self, location: Where) -> Path:
        """Returns the file in which the value at a location is written."""
        return self.files.get(self._known(location), self.path)

    def _known(self, location: Where) -> Where:
        while location and location not in self.lines:
            location = location[:-1]
        return location

    def to_record(self) -> Mapping[str, Any]:
        """Returns the data as a pipeline file that gives the same pipeline: secrets are references."""
        recorded: Mapping[str, Any] = self.data
        for location, (value, text) in self.written.items():
            recorded = _replaced(recorded, location, value, text)
        return recorded


def _replaced(data: Any, location: Where, value: Any, text: str) -> Any:
    """Returns data with another value at a location; the same data if the value there is not `value`."""
    if not location:
        return text if data == value else data
    key = location[0]
    if isinstance(data, list) and isinstance(key, int) and key < len(data):
        return [*data[:key], _replaced(data[key], location[1:], value, text), *data[key + 1 :]]
    if isinstance(data, Mapping) and key in data:
        return {**data, key: _replaced(data[key], location[1:], value, text)}
    return data


def texts_of(value: Any, location: Where = ()) -> Iterator[tuple[Where, str]]:
    """Yields (location, text) for each text in the data."""
    if isinstance(value, str):
        yield location, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from texts_of(entry, (*location, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from texts_of(entry, (*location, index))


def setting_of(location: Where) -> str:
    """Returns the name of the setting that a value is for: a key, or the parameter that a default is for."""
    if location[:1] == ("parameters",) and len(location) > 1:
        return str(location[1])
    return next((key for key in reversed(location) if isinstance(key, str)), "")


def refuse_secrets(document: Document) -> None:
    """Refuses passwords and tokens in plain text.

    Raises:
        SpecError: A value has the form of a secret, or its key the name of one. Names the key, never the value.
    """
    for location, text in texts_of(document.data):
        named = is_secret_key(setting_of(location)) and text and "${" not in text
        if named or has_secret(text):
            raise secret_error(".".join(map(str, location)), document.where(location))


def secret_error(name: str, where: str) -> SpecError:
    """Returns the refusal of a secret in plain text, without the secret."""
    return SpecError(
        f"{name} is a secret in plain text",
        where=where,
        remedy="put the secret into an environment variable, and write ${env:NAME} here",
    )
