"""The JSON Schema of pipeline files: it accepts every example, and refuses what a pipeline may not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from flows.schema import pipeline_schema
from flows.template import write_template
from lora_engine.catalog.formats import written_formats
from lora_engine.catalog.kinds import KINDS
from lora_engine.documents import read_document
from lora_engine.merging.methods import METHODS
from lora_engine.training.methods import methods
from tasks.errors import SpecError
from tasks.step import STEPS
from tests.flows.commands import say
from tests.flows.shared import LINE, write_line

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").rglob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = pipeline_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def problems(validator: Any, path: Path) -> list[str]:
    return [
        f"{list(error.path)}: {error.message}"
        for error in validator.iter_errors(read_document(path, SpecError, allowed="a mapping").data)
    ]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_example_is_valid(validator: Any, path: Path) -> None:
    assert problems(validator, path) == []


def test_the_template_is_valid(validator: Any, tmp_path: Path) -> None:
    assert problems(validator, write_template(tmp_path / "new")) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("rank: 2", "rank: 0"),
        ("rank: 2", "rank: two"),
        ("rank: 2", "rang: 2"),
        ("rank: 2", "kind: lorra"),
        ("rank: 2", "kind: {name: lora, factor: 8}"),
        ("method: finetune", "method: magic"),
        ("uses: train", "uses: trian"),
        ("to: [kohya,", "to: [kohia,"),
        ("name: small", "name: Small Name"),
        ("captioner: template", "captioner: magic"),
        ("steps:", "stpes:"),
    ],
)
def test_a_mistake_is_found(validator: Any, tmp_path: Path, text: str, wrong: str) -> None:
    assert problems(validator, write_line(tmp_path)) == []
    (tmp_path / "line.yaml").write_text(LINE.replace(text, wrong, 1))
    assert problems(validator, tmp_path / "line.yaml") != []


def test_every_entry_that_a_pipeline_can_name_is_in_the_schema(validator: Any) -> None:
    steps, definitions = validator.schema["properties"]["steps"], validator.schema["$defs"]
    train, convert = definitions["Train"]["properties"], definitions["Convert"]["properties"]
    assert steps["additionalProperties"]["allOf"][0]["properties"]["uses"]["enum"] == list(STEPS)
    assert train["kind"]["anyOf"][0]["enum"] == [name for name, kind in KINDS.items() if kind.spec]
    assert train["method"]["anyOf"][0]["enum"] == list(methods)
    assert convert["to"]["anyOf"][0]["items"]["anyOf"][0]["enum"] == list(written_formats())
    assert definitions["Merge"]["properties"]["method"]["anyOf"][0]["enum"] == list(METHODS)
    assert train["rank"]["description"].startswith("Rank of every adapted layer.")


def test_the_verb_prints_the_schema_or_writes_it(tmp_path: Path) -> None:
    printed = json.loads(say("schema", home=tmp_path / "home"))
    assert f"$schema={tmp_path / 'x.json'}" in say("schema", "-o", tmp_path / "x.json", home=tmp_path / "home")
    assert json.loads((tmp_path / "x.json").read_bytes()) == printed == json.loads(json.dumps(pipeline_schema()))
    assert not (tmp_path / "home").exists()
