"""Parameters, references to them and to the environment, and secrets in pipeline files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flows.spec import load_spec, parse_parameters, read_pipeline_file
from lora_engine.documents import to_yaml
from registry.home import Home
from registry.lineage.record import Lineage
from tasks.errors import SpecError
from tests.flows.commands import loraline_here, say

Write = Callable[..., Path]
TEXT = """\
name: stripes
parameters:
  rank: {type: integer, default: 8, minimum: 1, maximum: 64}
  trigger: sks
  rate: {default: 1e-3, description: Learning rate.}
  kind: {choices: [lora, dora], default: lora}
  formats: {default: [kohya]}
  half: false
steps:
  photos:   {uses: ingest, images: images/}
  captions: {uses: caption, dataset: photos, trigger: "${trigger}-${rank}", class_word: star}
  adapter:  {uses: train, dataset: captions, steps: 4, rank: "${rank}", learning_rate: "${rate}", kind: "${kind}"}
  exports:  {uses: convert, adapter: adapter, to: "${formats}"}
"""
TOKEN = "hf_" + "a1" * 12


def load(path: Path, **parameters: Any) -> dict[str, dict[str, Any]]:
    return {name: step.model_dump() for name, step in load_spec(path, parameters=parameters).steps.items()}


def test_a_whole_reference_keeps_the_type_and_a_part_becomes_text(pipeline: Write) -> None:
    steps = load(pipeline(TEXT))
    assert (steps["adapter"]["rank"], steps["adapter"]["learning_rate"]) == (8, 1e-3)
    assert steps["captions"]["trigger"] == "sks-8"
    assert steps["exports"]["to"] == ("kohya",)


def test_values_are_parsed_by_the_declared_type(pipeline: Write) -> None:
    steps = load(pipeline(TEXT), rank="16", trigger="007", formats="[kohya, peft]", half="true", rate="2e-3")
    assert steps["adapter"]["rank"] == 16
    assert steps["captions"]["trigger"] == "007-16"
    assert steps["exports"]["to"] == ("kohya", "peft")
    assert load(pipeline(TEXT), rank=16)["adapter"]["rank"] == 16


def test_the_recorded_source_is_a_pipeline_file_of_its_own(pipeline: Write, tmp_path: Path) -> None:
    spec = load_spec(pipeline(TEXT), parameters={"rank": "16"})
    assert "parameters" not in spec.source
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(spec.source))
    assert dict(load_spec(again).steps) == dict(spec.steps)


def test_an_overlay_sets_the_default_of_a_declared_parameter(pipeline: Write, tmp_path: Path) -> None:
    pipeline(TEXT)
    over = tmp_path / "over.yaml"
    over.write_text("extends: pipeline.yaml\nparameters: {rank: 16}")
    assert load(over)["adapter"]["rank"] == 16
    over.write_text("extends: pipeline.yaml\nparameters: {rank: 65}")
    with pytest.raises(SpecError, match="at most 64"):
        load(over)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rang": "16"}, r"unknown parameter 'rang'.*did you mean 'rank'"),
        ({"rank": "sixteen"}, "a value of type integer"),
        ({"rank": "1.5"}, "a value of type integer"),
        ({"rank": "true"}, "a value of type integer"),
        ({"rank": "0"}, "at least 1 and at most 64"),
        ({"rank": "[1"}, "--param rank"),
        ({"kind": "loar"}, "did you mean 'lora'"),
        ({"formats": "[[kohya]]"}, "a value of type list"),
        ({"half": "1"}, "a value of type boolean"),
        ({"rate": "1e999"}, "1e308"),
        ({"trigger": 7}, "a value of type string"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(pipeline: Write, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load(pipeline(TEXT), **given)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("rank: {type: integer,", "rank: {type: int,", "'integer', 'number'"),
        ("rank: {type: integer,", "rank: {typ: integer,", "did you mean 'type'"),
        ("default: 8, minimum", "default: eight, minimum", "a value of type integer"),
        ("default: 8, minimum", "default: '${trigger}', minimum", "refers to another parameter"),
        ("default: 8, minimum", "default: '${rank}', minimum", "refers to another parameter"),
        ("  trigger: sks", "  Trigger: sks", "parameter 'Trigger'"),
        ("  trigger: sks", "  1: sks", "parameter '1'"),
        ("  trigger: sks", "  trigger: {description: The word.}", r"has no value.*give --param trigger"),
        ("  trigger: sks\n", "", r"'\$\{trigger\}' names no parameter"),
        ("${trigger}-", "${tigger}-", "did you mean 'trigger'"),
        ("${trigger}-", "${trigger-", "without '}'"),
        ("${trigger}-${rank}", "${trigger", "without '}'"),
        ("${trigger}-", "${}-", "is no reference"),
        ("${trigger}-", "${env:}-", "is no reference"),
        ("${trigger}-", "${env:LORALINE_NOT_SET}-", "'LORALINE_NOT_SET' is not set"),
        ("${trigger}-", "${formats}-", "is a list, which cannot be a part"),
        ("minimum: 1", "minimum: .inf", "minimum"),
        ("choices: [lora, dora]", "choices: [lora, 3]", "a value of type string"),
        ("parameters:\n", "parameters: 3\nextra:\n", "parameters is 3"),
    ],
)
def test_a_mistake_is_refused_with_its_line(pipeline: Write, before: str, after: str, message: str) -> None:
    assert before in TEXT
    with pytest.raises(SpecError, match=message) as caught:
        load(pipeline(TEXT.replace(before, after, 1)))
    assert "pipeline.yaml:" in str(caught.value)


def test_too_many_and_too_long_names_are_refused(pipeline: Write) -> None:
    many = "".join(f"  p{index}: 1\n" for index in range(300))
    with pytest.raises(SpecError, match="at most 256 parameters"):
        load(pipeline(TEXT.replace("parameters:\n", f"parameters:\n{many}")))
    with pytest.raises(SpecError, match="is no reference") as caught:
        load(pipeline(TEXT.replace("${trigger}", f"${{{'x' * 10_000}}}")))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("texts", [["rank"], ["=8"], ["rank=8", "rank=9"], ["Rank=8"], ["a.b=8"]])
def test_a_text_that_gives_no_parameter_is_refused(texts: list[str]) -> None:
    with pytest.raises(SpecError, match="--param"):
        parse_parameters(texts)
    assert parse_parameters(["rank=a=b"]) == {"rank": "a=b"}


def test_the_environment_gives_numbers_and_texts(pipeline: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT.replace('rank: "${rank}"', 'rank: "${env:STUDIO_RANK:-2}"').replace("${trigger}", "${env:WORD:-zorb}")
    assert load(pipeline(text))["adapter"]["rank"] == 2
    monkeypatch.setenv("STUDIO_RANK", "4")
    monkeypatch.setenv("WORD", "")
    steps = load(pipeline(text))
    assert (steps["adapter"]["rank"], steps["captions"]["trigger"]) == (4, "zorb-8")


def test_a_default_from_the_environment_has_the_declared_type(pipeline: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT.replace("trigger: sks", "trigger: {type: string, default: '${env:WORD:-sks}'}")
    monkeypatch.setenv("WORD", "12")
    assert load(pipeline(text))["captions"]["trigger"] == "12-8"
    text = text.replace("type: integer, default: 8", "type: integer, default: '${env:WORD}'")
    assert load(pipeline(text))["adapter"]["rank"] == 12


def test_two_dollar_signs_are_one(pipeline: Write) -> None:
    text = TEXT.replace("name: stripes", "name: stripes\ndescription: costs $$5, $${rank} and $6")
    spec = load_spec(pipeline(text))
    document = read_pipeline_file(pipeline(text))
    assert document.data["description"] == "costs $5, ${rank} and $6"
    assert spec.source["description"] == "costs $5, $${rank} and $6"


def test_a_given_value_is_no_reference(pipeline: Write) -> None:
    document = read_pipeline_file(pipeline(TEXT), parameters={"trigger": "${rank}"})
    assert document.data["steps"]["captions"]["trigger"] == "${rank}-8"
    assert document.to_record()["steps"]["captions"]["trigger"] == "$${rank}-8"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (f"description: use {TOKEN}", "description"),
        ("description: https://user:hunter2hunter2@example.org/x", "description"),
        ("api_key: hunter2hunter2", "api_key"),
        (f"parameters: {{word: {TOKEN}}}", "parameters.word"),
        ("parameters: {api_key: hunter2hunter2}", "parameters.api_key"),
        ("parameters: {word: {default: '${env:X_API_KEY:-hunter2hunter2}'}}", "parameters.word.default"),
        (f"matrix: {{style: [{TOKEN}]}}", "matrix.style.0"),
    ],
)
def test_a_secret_in_plain_text_is_refused_without_it(pipeline: Write, tmp_path: Path, line: str, key: str) -> None:
    path = pipeline(f"name: stripes\n{line}\nsteps: {{photos: {{uses: ingest, images: images/}}}}\n")
    completed = loraline_here("plan", path, home=tmp_path / "home", X_API_KEY="from-the-environment")
    assert completed.returncode == 2
    assert key in completed.stderr
    assert "in plain text" in completed.stderr
    assert "hunter2" not in completed.stderr + completed.stdout
    assert TOKEN not in completed.stderr + completed.stdout


def test_a_secret_on_the_command_line_is_refused_without_it(pipeline: Write, tmp_path: Path) -> None:
    for option, text in (("--param", f"trigger={TOKEN}"), ("--set", f"captions.trigger={TOKEN}")):
        completed = loraline_here("plan", pipeline(TEXT), option, text, home=tmp_path / "home")
        assert completed.returncode == 2
        assert "in plain text" in completed.stderr
        assert TOKEN not in completed.stderr + completed.stdout


def test_a_secret_of_the_environment_is_recorded_as_a_reference(
    pipeline: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_API_KEY", "open-sesame-123")
    text = "name: x\nparameters: {service: '${env:STUDIO_API_KEY}'}\nsteps: {a: {uses: own, api_key: %s}}"
    for reference in ("${env:STUDIO_API_KEY}", "${service}"):
        document = read_pipeline_file(pipeline(text % f"'{reference}'"))
        assert document.data["steps"]["a"]["api_key"] == "open-sesame-123"
        recorded = document.to_record()
        assert recorded["steps"]["a"]["api_key"] == "${env:STUDIO_API_KEY}"
        with closing(Lineage(Home.open(tmp_path / "home").lineage_url)) as lineage:
            run = lineage.start_run("x", recorded)
            assert lineage.run(run.id).spec["steps"]["a"]["api_key"] == "${env:STUDIO_API_KEY}"
            with_secret = lineage.start_run("x", document.data)  # negative control of the record
            assert lineage.run(with_secret.id).spec["steps"]["a"]["api_key"] == "***"


@pytest.mark.parametrize("variable", ["STUDIO_TOKEN", "PLAIN"])
def test_a_secret_of_the_environment_is_refused_where_records_show_it(
    pipeline: Write, tmp_path: Path, variable: str
) -> None:
    text = TEXT.replace("${trigger}", f"${{env:{variable}}}")
    completed = loraline_here("plan", pipeline(text), home=tmp_path / "home", **{variable: TOKEN})
    assert completed.returncode == 2
    assert "refers to a secret" in completed.stderr
    assert TOKEN not in completed.stderr + completed.stdout


def test_a_plain_value_in_a_secret_setting_is_refused(pipeline: Write) -> None:
    path = pipeline("name: x\nparameters: {word: open-sesame}\nsteps: {a: {uses: own, api_key: '${word}'}}")
    with pytest.raises(SpecError, match=r"steps\.a\.api_key is a secret in plain text"):
        read_pipeline_file(path)


def test_the_verbs_take_parameters(pipeline: Write, tmp_path: Path) -> None:
    path, home = pipeline(TEXT), tmp_path / "home"
    assert "rank: 16" in say("resolve", path, "--param", "rank=16", home=home)
    assert "photos" in say("plan", path, "--param", "rank=16", "--json", home=home)
    completed = loraline_here("plan", path, "--param", "rank=0", home=home)
    assert completed.returncode == 2
    assert "at least 1" in completed.stderr
    assert not home.exists()
