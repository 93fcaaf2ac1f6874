"""Events conform to OpenLineage 2-0-2, as far as this file states its rules."""

import json
from datetime import datetime
from pathlib import PurePosixPath
from urllib.parse import urlsplit
from uuid import UUID

import jsonschema
import pytest

from registry.entities import Execution, now
from registry.lineage.openlineage import run_uuid, to_lines, to_openlineage

FACETS = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "required": ["_producer", "_schemaURL"],
        "properties": {"_producer": {"format": "uri"}, "_schemaURL": {"format": "uri"}},
    },
}
NAMED = {"required": ["namespace", "name"], "properties": {"namespace": {"type": "string"}, "name": {"type": "string"}}}


def with_facets(**properties):
    return {"type": "object", **NAMED, "properties": NAMED["properties"] | {"facets": FACETS} | properties}


RUN_ID = {"type": "object", "required": ["runId"], "properties": {"runId": {"type": "string", "format": "uuid"}}}
EVENT = {
    "type": "object",
    "required": ["eventType", "eventTime", "producer", "schemaURL", "run", "job"],
    "properties": {
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        "eventTime": {"type": "string", "format": "date-time"},
        "producer": {"type": "string", "format": "uri"},
        "schemaURL": {"const": "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"},
        "run": RUN_ID | {"properties": RUN_ID["properties"] | {"facets": FACETS}},
        "job": with_facets(),
        "inputs": {"type": "array", "items": with_facets(inputFacets=FACETS)},
        "outputs": {"type": "array", "items": with_facets(outputFacets=FACETS)},
    },
    "additionalProperties": False,
}
"""The envelope, after https://openlineage.io/spec/2-0-2/OpenLineage.json."""
REQUIRED = {
    "parent": {"run": RUN_ID, "job": {"type": "object", **NAMED}},
    "processing_engine": {"version": {"type": "string"}},
    "errorMessage": {"message": {"type": "string"}, "programmingLanguage": {"type": "string"}},
    "jobType": {"processingType": {"enum": ["BATCH"]}, "integration": {"type": "string"}},
    "version": {"datasetVersion": {"type": "string", "pattern": "^[0-9a-f]{64}$"}},
    "datasetType": {"datasetType": {"enum": ["FILE", "MODEL"]}},
    "outputStatistics": {"size": {"type": "integer", "minimum": 0}},
}
"""Standard facet -> its required fields."""

FORMATS = jsonschema.FormatChecker(())
FORMATS.checks("uuid", raises=ValueError)(lambda value: UUID(value).version is not None)
FORMATS.checks("date-time", raises=ValueError)(lambda value: datetime.fromisoformat(value).tzinfo is not None)
FORMATS.checks("uri")(lambda value: bool(urlsplit(value).scheme and urlsplit(value).path))


def check(event):
    jsonschema.Draft202012Validator(EVENT, format_checker=FORMATS).validate(event)
    for facets in facets_of(event):
        for name, facet in facets.items():
            schema, pointer = facet["_schemaURL"].split("#")
            definition = name if name.startswith("loraline_") else PurePosixPath(urlsplit(schema).path).stem
            assert pointer == f"/$defs/{definition}"
            if name not in REQUIRED:
                assert name.startswith("loraline_")
                assert facet["_schemaURL"].startswith("urn:loraline:facet:")
                continue
            rules = {"type": "object", "required": list(REQUIRED[name]), "properties": REQUIRED[name]}
            jsonschema.Draft202012Validator(rules, format_checker=FORMATS).validate(facet)


def facets_of(event):
    yield event["run"]["facets"]
    yield event["job"]["facets"]
    for dataset in [*event["inputs"], *event["outputs"]]:
        yield dataset["facets"]
        yield dataset.get("outputFacets", {})


@pytest.fixture
def walked(versions, register):
    version = register(versions, b"weights", alias_request="staging")
    return versions.lineage, versions.lineage.walk("zorb@staging", subjects=True), version


def test_events_of_a_walk_conform(walked):
    lineage, walk, version = walked
    events = to_openlineage(lineage, walk)
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 2
    for event in events:
        check(event)
    assert to_lines(events).count(b"\n") == 4
    assert [json.loads(line) for line in to_lines(events).splitlines()] == events
    trained = events[-1]
    assert trained["job"]["name"] == "stripes.adapter"
    (output,) = trained["outputs"]
    assert output["name"] == f"adapter/{version.artifact.sha256}"
    (version_facet,) = output["facets"]["loraline_versions"]["versions"]
    assert version_facet == {"ref": "zorb@1", "role": "adapter", "aliases": ["staging"]}
    # An output and the next step's input have the same name, which connects the graph.
    assert trained["inputs"][0]["name"] == events[1]["outputs"][0]["name"]


def test_failure_and_interruption_are_reported(versions):
    lineage = versions.lineage
    run = lineage.start_run("p", {})
    for status in ("FAILED", "INTERRUPTED"):
        error = f"EngineError: {status} \x00 <b>"
        lineage.log_execution(
            Execution(status, run.id, "s", "train", "1", "k", status=status, error=error, ended_at=now())
        )
    events = to_openlineage(lineage, lineage.walk(run.id, "down"))
    for event in events:
        check(event)
    assert sorted(event["eventType"] for event in events) == ["ABORT", "FAIL", "START", "START"]
    assert all(("errorMessage" in event["run"]["facets"]) == (event["eventType"] != "START") for event in events)


def test_rules_reject_invalid_events(walked):
    lineage, walk, _ = walked
    event = to_openlineage(lineage, walk)[0]
    for path, value in [
        ("eventType", "DONE"),
        ("eventTime", "yesterday"),
        ("producer", "us"),
        ("run", {"runId": "7"}),
        ("job", {"namespace": "loraline"}),
        ("inputs", [{"namespace": "n", "name": "n", "facets": {"version": {}}}]),
        ("extra", 1),
    ]:
        with pytest.raises(jsonschema.ValidationError):
            check(event | {path: value})


def test_run_uuids_are_stable():
    assert run_uuid("a0ecff115d08434f954f558d0a5cb70f") == "a0ecff11-5d08-434f-954f-558d0a5cb70f"
    assert run_uuid("e1") == run_uuid("e1") != run_uuid("e2")
    UUID(run_uuid("e1"))
