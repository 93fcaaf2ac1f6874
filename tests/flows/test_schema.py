"""The JSON Schema of pipeline files: it accepts every example, and refuses what a pipeline may not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from flows.schema import pipeline_schema
from flows.spec import load_pipelines
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


EXPANDED = """\
parameters: {rank: {type: integer, default: 2, minimum: 1}, word: zorb}
matrix: {length: [12, 14], include: [{length: 16}]}
"""


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("name: small", "name: small-${length}"),
        ("seed: 7", "seed: ${env:SEED:-7}"),
        ("rank: 2", "rank: '${rank}'"),
        ("steps: 12", "steps: '${length}'"),
        ("method: finetune", "method: '${word}'"),
        ("trigger: zorb", "trigger: '${word}'"),
        ("to: [kohya, diffusers, peft]", "to: [kohya, '${word}']"),
        ("to: [kohya, diffusers, peft]", "to: '${word}'"),
        ("heldout: 0.5", "heldout: '${word}'"),
        ("{max: 10.0}", "{max: '${word}'}"),
    ],
)
def test_a_reference_is_valid_for_every_kind_of_value(
    validator: Any, tmp_path: Path, text: str, reference: str
) -> None:
    assert text in LINE
    write_line(tmp_path)
    (tmp_path / "line.yaml").write_text(EXPANDED + LINE.replace(text, reference, 1))
    assert problems(validator, tmp_path / "line.yaml") == []


@pytest.mark.parametrize(
    "line",
    [
        "extends: 3",
        "extends: []",
        "parameters: {rank: {typ: integer}}",
        "parameters: {rank: {type: int}}",
        "parameters: 3",
        "matrix: {}",
        "matrix: []",
        "matrix: 3",
        "matrix: {style: a}",
        "matrix: {style: []}",
        "matrix: {Style: [a]}",
        "matrix: {exclude: 3, style: [a]}",
        "matrix: [3]",
    ],
)
def test_a_mistake_in_the_expansion_is_found_by_the_schema_and_by_loading(
    validator: Any, tmp_path: Path, line: str
) -> None:
    path = write_line(tmp_path)
    path.write_text(f"{line}\n{LINE}")
    assert problems(validator, path) != []
    with pytest.raises(SpecError):
        load_pipelines(path)


def test_an_overlay_needs_no_key_but_its_values_are_checked(validator: Any, tmp_path: Path) -> None:
    path = tmp_path / "over.yaml"
    for text in (
        "extends: line.yaml",
        "extends: [line.yaml, other.yaml]\nsteps: {exports: null, adapter: {rank: 4}, x: {uses: convert, to: [peft]}}",
        "extends: line.yaml\nsteps: {adapter: {uses: train, rank: null}}",
    ):
        path.write_text(text)
        assert problems(validator, path) == []
    for text in (
        "name: x",
        "steps: {a: {uses: ingest, images: x}}",
        "extends: line.yaml\nsteps: {adapter: {uses: train, rang: 4}}",
        "extends: line.yaml\nseed: x",
    ):
        path.write_text(text)
        assert problems(validator, path) != []


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
