"""The matrix of a pipeline file: its cells, their names, values from files, and what is refused before it expands."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flows.spec import load_pipelines, load_spec, pipeline_names
from lora_engine.documents import Document, read_document
from registry.home import Home
from registry.lineage.record import Lineage
from tasks.errors import SpecError
from tests.flows.commands import loraline_here, say

Write = Callable[..., Path]
STEPS = """\
steps:
  photos:   {uses: ingest, images: images/}
  captions: {uses: caption, dataset: photos, trigger: "${style}", class_word: star}
  adapter:  {uses: train, dataset: captions, steps: 4, rank: "${rank}"}
"""
TEXT = f"""\
name: "${{style}}-r${{rank}}"
parameters:
  rank: {{type: integer, default: 3, minimum: 1, maximum: 99}}
matrix: {{style: [a, b], rank: [4, 8]}}
{STEPS}"""
JOINED = """\
name: "joined-${style}"
matrix: {style: [a, b]}
steps: {j: {uses: merge, adapters: ["${style}@1", "c@1"]}}
"""
MATRIX = "{style: [a, b], rank: [4, 8]}"


def cells(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [dict(spec.cell or {}) for spec in load_pipelines(path, **options)]


def with_matrix(matrix: str, name: str = "${style}-r${rank}") -> str:
    return TEXT.replace(MATRIX, matrix).replace("${style}-r${rank}", name)


def test_each_combination_is_a_pipeline_with_its_own_values(pipeline: Write) -> None:
    specs = load_pipelines(pipeline(TEXT))
    assert [spec.name for spec in specs] == ["a-r4", "a-r8", "b-r4", "b-r8"]
    assert [spec.steps["adapter"].model_dump()["rank"] for spec in specs] == [4, 8, 4, 8]
    assert specs[0].cell == {"style": "a", "rank": 4}
    assert all("matrix" not in spec.source for spec in specs)
    assert pipeline_names(pipeline(TEXT)) == tuple(spec.name for spec in specs)


def test_a_file_without_a_matrix_is_one_pipeline(pipeline: Write) -> None:
    (spec,) = load_pipelines(pipeline(TEXT.replace(f"matrix: {MATRIX}\n", "").replace("${style}", "a")))
    assert spec.cell is None
    assert spec.name == "a-r3"


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ("[{style: a, rank: 4}, {style: b, rank: 2}]", [("a", 4), ("b", 2)]),
        ("[{style: a}, {style: b, rank: 2}]", [("a", 3), ("b", 2)]),
        ("{style: [a, b], rank: [4, 8], exclude: [{style: b, rank: 4}]}", [("a", 4), ("a", 8), ("b", 8)]),
        ("{style: [a, b], rank: [4, 8], exclude: [{rank: 4}]}", [("a", 8), ("b", 8)]),
        ("{style: [a], include: [{style: b, rank: 9}]}", [("a", 3), ("b", 9)]),
        ("{style: [a, b], include: [{style: b, rank: 9}]}", [("a", 3), ("b", 9)]),
        ("{style: [a, b], include: [{rank: 5}, {style: a, rank: 6}]}", [("a", 6), ("b", 5)]),
        ("{include: [{style: a, rank: 1}, {style: b, rank: 2}]}", [("a", 1), ("b", 2)]),
        ("{style: ['${env:LORALINE_STYLE:-z}'], rank: ['${rank}']}", None),
    ],
)
def test_include_and_exclude_are_those_of_github_actions(
    pipeline: Write, matrix: str, expected: list[tuple[str, int]] | None
) -> None:
    path = pipeline(with_matrix(matrix))
    if expected is None:  # a value of an axis cannot refer to the axis itself without a default
        assert cells(path) == [{"style": "z", "rank": 3}]
        return
    specs = load_pipelines(path)
    found = [
        (spec.steps["captions"].model_dump()["trigger"], spec.steps["adapter"].model_dump()["rank"]) for spec in specs
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapters.csv", "Style,rank\na,4\n\nb,\n"),
        ("adapters.yaml", "- {style: a, rank: 4}\n- {style: b}\n"),
        ("adapters.json", '[{"style": "a", "rank": 4}, {"style": "b"}]'),
    ],
)
def test_cells_come_from_a_file(pipeline: Write, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    path = pipeline(with_matrix(f"{{file: {name}}}"))
    assert cells(path) == [{"style": "a", "rank": 4}, {"style": "b"}]
    assert [spec.name for spec in load_pipelines(path)] == ["a-r4", "b-r3"]
    path = pipeline(with_matrix(f"{{file: {name}, extra: [x, 'y']}}", "${style}-${extra}"))
    assert [spec.name for spec in load_pipelines(path)] == ["a-x", "a-y", "b-x", "b-y"]


def test_a_column_has_the_type_of_its_parameter(pipeline: Write, tmp_path: Path) -> None:
    (tmp_path / "adapters.csv").write_text("style,rank\n7,4\n")
    text = with_matrix("{file: adapters.csv}", "a${style}")
    with pytest.raises(SpecError, match=r"captions\.trigger is 7"):
        load_pipelines(pipeline(text))
    typed = text.replace("parameters:\n", "parameters:\n  style: {type: string}\n")
    assert cells(pipeline(typed)) == [{"style": "7", "rank": 4}]


def test_a_file_of_cells_is_relative_to_the_file_that_names_it(pipeline: Write, tmp_path: Path) -> None:
    (tmp_path / "adapters.csv").write_text("style,rank\na,4\n")
    pipeline(with_matrix("{file: adapters.csv}"))
    (tmp_path / "deep").mkdir()
    over = tmp_path / "deep" / "over.yaml"
    over.write_text("extends: ../pipeline.yaml")
    assert cells(over) == [{"style": "a", "rank": 4}]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ("{}", "the matrix is empty"),
        ("[]", "the matrix is empty"),
        ("", "the matrix is empty"),
        ("3", "the matrix is 3"),
        ("{style: []}", "axis 'style' has no values"),
        ("{style: a}", "axis 'style' is 'a'"),
        ("{style: [null]}", "a value of axis 'style' is empty"),
        ("{style: [{a: 1}]}", "a value of axis 'style' is a mapping"),
        ("{Style: [a]}", "axis 'Style'"),
        ("{1: [a]}", "axis '1'"),
        ("{style: [a, a]}", r"two pipelines have the name 'a-r3'"),
        (
            "{style: [a], other: [1, 2]}",
            r"two pipelines have the name 'a-r3': style=a, other=1; and style=a, other=2.*\$\{other\}",
        ),
        ("{style: [a], rank: [0]}", "at least 1"),
        ("{style: [a], rank: [x]}", "a value of type integer"),
        ("{style: [a], exclude: [{style: a}]}", "excludes every cell"),
        ("{style: [a], exclude: [{stile: a}]}", r"exclude names 'stile'.*did you mean 'style'"),
        ("{style: [a], exclude: 3}", "matrix.exclude is 3"),
        ("{style: [a], include: [3]}", "a cell of the matrix is 3"),
        ("[{style: a}, 3]", "a cell of the matrix is 3"),
        ("{file: missing.csv}", "which is no file"),
        ("{file: 'https://example.org/a.csv'}", "the path of a CSV"),
        ("{file: empty.csv}", "has no rows"),
        ("{file: empty.yaml}", "the file contains no value"),
        ("{file: bad.csv}", r"bad\.csv:2: parameter 'rank' is 'x'"),
        ("{file: bad.yaml}", r"bad\.yaml:1:14: parameter 'rank' is 'x'"),
        ("{file: wide.csv}", r"wide\.csv:2"),
        ("{file: secret.csv}", "hf_token is a secret in plain text"),
        ("{style: ['${stile}']}", "names no parameter"),
        ("{style: ['${style}']}", "names no parameter"),
    ],
)
def test_a_bad_matrix_is_refused(pipeline: Write, tmp_path: Path, matrix: str, message: str) -> None:
    files = {
        "empty.csv": "style,rank\n",
        "empty.yaml": "",
        "bad.csv": "style,rank\na,x\n",
        "bad.yaml": "- {style: a, rank: x}\n",
        "wide.csv": "style\na,b,c\n",
        "secret.csv": "style,hf_token\na,hunter2hunter2\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SpecError, match=message) as caught:
        load_pipelines(pipeline(with_matrix(matrix)))
    assert str(tmp_path) in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("count", [1001, 5000])
def test_too_many_cells_are_refused_before_they_expand(pipeline: Write, tmp_path: Path, count: int) -> None:
    values = ", ".join(map(str, range(count)))
    for matrix in (f"{{style: [{values}]}}", "{file: many.csv}"):
        (tmp_path / "many.csv").write_text("style\n" + "\n".join(map(str, range(count))))
        with pytest.raises(SpecError, match=f"the matrix has {count} cells.*at most 1000"):
            load_pipelines(pipeline(with_matrix(matrix)))


def test_a_product_of_a_million_cells_is_refused(pipeline: Write) -> None:
    values = ", ".join(map(str, range(100)))
    axes = ", ".join(f"{name}: [{values}]" for name in ("style", "b", "c", "d"))
    with pytest.raises(SpecError, match="the matrix has 100000000 cells"):
        load_pipelines(pipeline(with_matrix(f"{{{axes}}}")))


def test_many_cells_of_a_large_file_are_refused(pipeline: Write) -> None:
    values = ", ".join(f"s{index}" for index in range(900))
    text = with_matrix(f"{{style: [{values}]}}")
    assert len(load_pipelines(pipeline(text), names=["s7-*"])) == 1
    steps = "".join(f"  p{index}: {{uses: ingest, images: images/}}\n" for index in range(400))
    with pytest.raises(SpecError, match=r"900 pipelines of .* values each"):
        load_pipelines(pipeline(text + steps))


def test_a_thousand_cells_read_the_file_once(pipeline: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def count(path: Path, *arguments: Any, **options: Any) -> Document:
        read.append(path)
        return read_document(path, *arguments, **options)

    monkeypatch.setattr("flows.spec.overlays.read_document", count)
    values = ", ".join(f"s{index}" for index in range(1000))
    assert len(load_pipelines(pipeline(with_matrix(f"{{style: [{values}]}}")))) == 1000
    assert len(read) == 1


def test_pipelines_are_selected_by_name(pipeline: Write) -> None:
    path = pipeline(TEXT)
    assert [spec.name for spec in load_pipelines(path, names=["b-*"])] == ["b-r4", "b-r8"]
    assert [spec.name for spec in load_pipelines(path, names=["b-r8", "a-r?"])] == ["a-r4", "a-r8", "b-r8"]
    with pytest.raises(SpecError, match=r"no pipeline 'c-r8'.*did you mean"):
        load_pipelines(path, names=["a-*", "c-r8"])


def test_one_pipeline_is_not_chosen_from_several(pipeline: Write) -> None:
    with pytest.raises(SpecError, match="the file has 4 pipelines: a-r4, a-r8, b-r4, b-r8"):
        load_spec(pipeline(TEXT))


def test_an_axis_is_no_parameter_of_the_command_line(pipeline: Write, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is an axis of the matrix"):
        load_pipelines(pipeline(TEXT), parameters={"rank": "4"})
    (tmp_path / "adapters.csv").write_text("style,rank\na,4\n")
    with pytest.raises(SpecError, match="is an axis of the matrix"):
        load_pipelines(pipeline(with_matrix("{file: adapters.csv}")), parameters={"rank": "4"})


def test_an_error_names_the_cell(pipeline: Write) -> None:
    with pytest.raises(SpecError, match=r"pipeline\.yaml:7:.*trigger.*\(matrix: style=b c, rank=4\)"):
        load_pipelines(pipeline(with_matrix("{style: [b c], rank: [4]}", "x-${rank}")))


def test_an_override_changes_every_cell_and_the_matrix(pipeline: Write) -> None:
    specs = load_pipelines(pipeline(TEXT), ["adapter.steps=9", "matrix.style=[c]", "seed=3"])
    assert [spec.name for spec in specs] == ["c-r4", "c-r8"]
    assert {spec.steps["adapter"].model_dump()["steps"] for spec in specs} == {9}
    assert {spec.seed for spec in specs} == {3}


def test_a_registered_adapter_is_named_by_a_cell(pipeline: Write) -> None:
    text = JOINED.replace("c@1", "${style}@production")
    specs = load_pipelines(pipeline(text))
    assert [spec.steps["j"].model_dump()["adapters"] for spec in specs] == [
        ("a@1", "a@production"),
        ("b@1", "b@production"),
    ]


def test_resolve_prints_files_that_give_the_same_pipelines(pipeline: Write, tmp_path: Path) -> None:
    path, home = pipeline(TEXT), tmp_path / "home"
    printed = say("resolve", path, home=home)
    specs = load_pipelines(path)
    for number, text in enumerate(printed.split("---\n")):
        again = tmp_path / f"{number}.yaml"
        again.write_text(text)
        assert dict(load_spec(again).steps) == dict(specs[number].steps)
    as_json = json.loads(say("resolve", path, "--json", home=home))
    assert as_json == [dict(spec.source) for spec in specs]
    single = pipeline(TEXT.replace(f"matrix: {MATRIX}\n", "").replace("${style}", "a"))
    assert json.loads(say("resolve", single, "--json", home=home))["name"] == "a-r3"
    assert not home.exists()


def test_plan_shows_every_pipeline_and_those_that_are_selected(pipeline: Write, tmp_path: Path) -> None:
    path, home = pipeline(TEXT), tmp_path / "home"
    shown = say("plan", path, home=home)
    assert [name for name in ("a-r4 (1 of 4", "b-r8 (4 of 4: style=b, rank=8)") if name in shown] != []
    entries = json.loads(say("plan", path, "--pipeline", "b-*", "--json", home=home))
    assert [entry["pipeline"] for entry in entries] == ["b-r4", "b-r8"]
    assert entries[0]["cell"] == {"style": "b", "rank": 4}
    assert [step["name"] for step in entries[0]["result"]] == ["photos", "captions", "adapter"]


def test_one_failing_pipeline_does_not_stop_the_others(pipeline: Write, tmp_path: Path) -> None:
    path, home = pipeline(JOINED), tmp_path / "home"
    completed = loraline_here("plan", path, home=home)
    assert completed.returncode == 1
    assert "2 of 2 pipelines failed: joined-a, joined-b" in completed.stderr
    entries = json.loads(say("plan", path, "--json", home=home, code=1))
    assert [sorted(entry) for entry in entries] == [["cell", "error", "pipeline"]] * 2


def test_an_unknown_step_is_refused_before_the_first_pipeline_runs(pipeline: Write, tmp_path: Path) -> None:
    completed = loraline_here("run", pipeline(TEXT), "--force", "photoz", home=tmp_path / "home")
    assert completed.returncode == 2
    assert "unknown step 'photoz'" in completed.stderr
    assert "1 of 4" not in completed.stdout


@pytest.mark.usefixtures("prefect_server")
def test_a_run_continues_after_a_pipeline_that_fails(pipeline: Write, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"no image")
    steps = "steps: {photos: {uses: ingest, images: '${folder}'}}"
    text = f'name: "x-${{folder}}"\nmatrix: {{folder: [broken, images]}}\n{steps}\n'
    path, home = pipeline(text), tmp_path / "home"
    completed = loraline_here("run", path, home=home)
    assert completed.returncode == 1
    assert "x-images (2 of 2: folder=images)" in completed.stdout
    assert "1 of 2 pipelines failed: x-broken" in completed.stderr
    broken, good = json.loads(say("run", path, "--json", home=home, code=1))
    assert "0.png" in broken["error"]
    assert good["result"]["outcomes"]["photos"]["cached"]
    assert say("run", path, "--pipeline", "x-images", home=home)


@pytest.mark.usefixtures("prefect_server")
def test_the_record_of_a_run_needs_no_other_file(pipeline: Write, tmp_path: Path) -> None:
    pipeline("name: x-${word}\nmatrix: {word: [a]}\nsteps: {photos: {uses: ingest, images: images/}}\n")
    over = tmp_path / "deep" / "over.yaml"
    over.parent.mkdir()
    over.write_text("extends: ../pipeline.yaml\nseed: 3\n")
    say("run", over, home=tmp_path / "home")
    with closing(Lineage(Home.open(tmp_path / "home").lineage_url)) as lineage:
        (run,) = lineage.runs()
    assert run.spec == {
        "name": "x-a",
        "seed": 3,
        "steps": {"photos": {"uses": "ingest", "images": "../images"}},
    }
