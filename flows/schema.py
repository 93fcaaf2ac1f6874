"""Derives the JSON Schema of pipeline files from the specs of the steps, for editors and other tools."""

from __future__ import annotations

import re
from typing import Any

from pydantic.json_schema import models_json_schema

from flows.spec import INHERITED, Head
from tasks.spec import STEP_NAME
from tasks.step import STEPS, StepKind


def pipeline_schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of a pipeline file, with the entries of installed plug-ins.

    It checks keys, types and ranges; `loraline plan` also checks references, files and rules between settings.
    """
    kinds = list(STEPS.values())
    refs, definitions = models_json_schema([(kind.spec, "validation") for kind in kinds])
    head = Head.model_json_schema()
    steps = [_step(kind, refs[kind.spec, "validation"]["$ref"], definitions["$defs"]) for kind in kinds]
    names = {"properties": {"uses": {"enum": list(STEPS)}}}
    head["properties"]["steps"] = {
        "description": "The steps by name; a value that names a step is its output.",
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": f"^{STEP_NAME.pattern}$"},
        "additionalProperties": {"type": "object", "required": ["uses"], "allOf": [names, *steps]},
    }
    own = head.pop("$defs", {})
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **head, "$defs": own | definitions["$defs"]}
    described: dict[str, Any] = _described(schema)
    return described


def _step(kind: StepKind, ref: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Returns the condition that a step with this `uses` has this spec."""
    definition = definitions[ref.rpartition("/")[2]]
    for base in kind.spec.__mro__:
        _describe_fields(definition["properties"], base.__doc__ or "")
    definition["properties"]["uses"].pop("default", None)
    # The pipeline's own base, seed and name are the defaults of its steps.
    definition["required"] = [field for field in definition.get("required", ()) if field not in INHERITED]
    return {"if": {"properties": {"uses": {"const": kind.name}}}, "then": {"$ref": ref}}


def _described(value: Any) -> Any:
    """Returns a schema in which the attributes of a docstring are the descriptions of their fields.

    `oneOf` becomes `anyOf`: options without their discriminator are valid for several members.
    """
    if isinstance(value, list):
        return [_described(item) for item in value]
    if not isinstance(value, dict):
        return value
    described = {"anyOf" if key == "oneOf" else key: _described(item) for key, item in value.items()}
    described.pop("discriminator", None)
    text, fields = described.get("description"), described.get("properties")
    if isinstance(text, str) and isinstance(fields, dict):
        _describe_fields(fields, text)
        described["description"] = text.partition("Attributes:")[0].strip()
    return described


def _describe_fields(fields: dict[str, Any], text: str) -> None:
    attributes = text.partition("Attributes:")[2]
    for name, meaning in re.findall(r"^ *(\w+): (.*(?:\n(?! *\w+: ).+)*)", attributes, re.MULTILINE):
        if name in fields and "description" not in fields[name]:
            fields[name] = {"description": " ".join(meaning.split()), **fields[name]}
