"""Reads gates from a file, such as one that several pipelines share. Torch-free."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_engine.documents import read_document
from lora_engine.errors import SettingsError
from lora_engine.evaluation.spec import Gates


class GateFile(BaseModel):
    """A file with gates: `gates: {clip_t: {min: 0}}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gates: Gates


def read_gates(path: Path) -> Gates:
    """Returns the gates of a YAML or JSON file.

    Raises:
        SettingsError: The file cannot be read, or a gate is not valid; names the line.
    """
    document = read_document(path, SettingsError, allowed="a mapping with the key gates")
    try:
        return GateFile.model_validate(document.data).gates
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = tuple(part for part in first["loc"] if isinstance(part, str | int))
        key = ".".join(map(str, where))
        raise SettingsError(f"{key}: {first['msg']}", where=document.where(where)) from None


def combine_gates(first: Gates, second: Gates) -> Gates:
    """Returns the gates of both; a metric in both has all of its gates."""
    names = dict.fromkeys((*first, *second))
    return {name: tuple(dict.fromkeys((*first.get(name, ()), *second.get(name, ())))) for name in names}
