"""Derives the JSON Schema of pipeline files from the specs of the steps, for editors and other tools."""

from __future__ import annotations

import re
from typing import Any

from pydantic.json_schema import models_json_schema

from flows.spec import INHERITED, Head
from flows.spec.head import EXPANDED
from flows.spec.parameters import Parameter
from tasks.spec import STEP_NAME
from tasks.step import STEPS, StepKind

_REFERENCE = "Reference"


def pipeline_schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of a pipeline file, with the entries of installed plug-ins.

    It checks keys, types and ranges; `loraline plan` also checks references, files and rules between settings. Where a
    file extends another, any key may be missing. A value may be a reference such as `${rank}`.
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
        "additionalProperties": {"type": ["object", "null"], "allOf": [names, *(step for step, _ in steps)]},
    }
    whole = {"type": "object", "required": ["uses"], "allOf": [required for _, required in steps]}
    rules = {
        "if": {"required": ["extends"]},
        "else": {"required": head.pop("required"), "properties": {"steps": {"additionalProperties": whole}}},
    }
    own = head.pop("$defs", {})
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **head, "$defs": own | definitions["$defs"]}
    described: dict[str, Any] = _described(schema)
    _add_references(described)
    return {**described, **rules}


def _step(kind: StepKind, ref: str, definitions: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the conditions that a step with this `uses` has this spec, and that it has the keys without defaults."""
    definition = definitions[ref.rpartition("/")[2]]
    for base in kind.spec.__mro__:
        _describe_fields(definition["properties"], base.__doc__ or "")
    definition["properties"]["uses"].pop("default", None)
    # The pipeline's own base, seed and name are the defaults of its steps.
    required = [field for field in definition.pop("required", ()) if field not in INHERITED]
    condition = {"type": "object", "properties": {"uses": {"const": kind.name}}, "required": ["uses"]}
    return {"if": condition, "then": {"$ref": ref}}, {"if": condition, "then": {"required": required}}


def _add_references(schema: dict[str, Any]) -> None:
    """Allows a reference, or null in a file that extends another, for each value that is more than plain text."""
    properties = schema["properties"]
    for name in properties.keys() - {"steps", *EXPANDED}:
        properties[name] = _or_reference(properties[name])
    for name, definition in schema["$defs"].items():
        if name != Parameter.__name__ and "properties" in definition:
            fields = definition["properties"].items()
            definition["properties"] = {field: _or_reference(value) for field, value in fields}
    schema["$defs"][_REFERENCE] = {
        "description": "A reference such as ${rank} or ${env:NAME}; null removes the value of the extended file.",
        "type": ["string", "null"],
        "pattern": r"\$\{[^{}]+\}",
    }


def _or_reference(value: dict[str, Any]) -> dict[str, Any]:
    reference = {"$ref": f"#/$defs/{_REFERENCE}"}
    inner = {key: _or_reference(part) if key == "items" and part else part for key, part in value.items()}
    if "additionalProperties" in inner and isinstance(inner["additionalProperties"], dict):
        inner["additionalProperties"] = _or_reference(inner["additionalProperties"])
    if "anyOf" in inner:
        return {**inner, "anyOf": [*map(_with_item_references, inner["anyOf"]), reference]}
    if "const" in inner or "type" not in inner or (inner["type"] == "string" and not inner.keys() & _LIMITS):
        return inner
    outer: dict[str, Any] = {key: inner.pop(key) for key in ("description", "default", "title") if key in inner}
    return {**outer, "anyOf": [inner, reference]}


def _with_item_references(member: dict[str, Any]) -> dict[str, Any]:
    """Returns a member of a union whose items may be references; the union itself has the reference."""
    return {key: _or_reference(part) if key == "items" and part else part for key, part in member.items()}


_LIMITS = {"enum", "pattern", "format", "minLength", "maxLength"}


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
