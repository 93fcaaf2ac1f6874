"""Overlays of pipeline files: what wins, which file an error names, where paths start, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.spec import load_spec, read_pipeline_file
from lora_engine.documents import Document, read_document, to_yaml
from tasks.errors import SpecError

Write = Callable[..., Path]
BASE = """\
name: stripes
base: tiny
seed: 7
steps:
  photos:   {uses: ingest, images: images/}
  captions: {uses: caption, dataset: photos, trigger: sks, class_word: star}
  adapter:
    uses: train
    dataset: captions
    steps: 4
    overrides: {text: {rank: 2}}
  exports:  {uses: convert, adapter: adapter, to: [kohya, peft]}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_mappings_merge_and_other_values_are_replaced(pipeline: Write, tmp_path: Path) -> None:
    pipeline(BASE)
    over = "extends: pipeline.yaml\nsteps: {adapter: {steps: 9, overrides: {text: {alpha: 1}}}, exports: {to: [peft]}}"
    spec = load_spec(write(tmp_path, "over.yaml", over))
    adapter = spec.steps["adapter"].model_dump()
    assert (adapter["steps"], adapter["overrides"]["text"]["rank"], adapter["overrides"]["text"]["alpha"]) == (9, 2, 1)
    assert spec.steps["exports"].model_dump()["to"] == ("peft",)
    assert "extends" not in spec.source


def test_null_removes_a_step_or_a_key(pipeline: Write, tmp_path: Path) -> None:
    pipeline(BASE)
    spec = load_spec(write(tmp_path, "over.yaml", "extends: pipeline.yaml\nseed: null\nsteps: {exports: null}"))
    assert set(spec.steps) == {"photos", "captions", "adapter"}
    assert spec.seed == 0
    assert "seed" not in spec.source


def test_a_later_base_wins_and_the_file_itself_wins_over_all(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write(tmp_path, f"{name}.yaml", f"seed: {seed}\nname: {name}\ndescription: {name}")
    data = read_pipeline_file(write(tmp_path, "c.yaml", "extends: [a.yaml, b.yaml]\ndescription: c")).data
    assert data == {"seed": 2, "name": "b", "description": "c"}


def test_paths_start_from_the_file_in_which_they_are_written(pipeline: Write, tmp_path: Path) -> None:
    pipeline(BASE)
    own = write(tmp_path, "deep/own/prompts.txt", "a star")
    report = "{uses: evaluate, adapter: adapter, dataset: captions, prompts: prompts.txt}"
    over = f"extends: ../../pipeline.yaml\nsteps: {{report: {report}}}"
    spec = load_spec(write(tmp_path, "deep/own/over.yaml", over))
    assert spec.folder / spec.steps["photos"].model_dump()["images"] == tmp_path / "deep/own/../../images"
    assert spec.steps["report"].model_dump()["prompts"] == "prompts.txt"
    assert own.exists()


def test_a_base_model_beside_the_extended_file_is_found(pipeline: Write, tmp_path: Path) -> None:
    pipeline(BASE.replace("base: tiny", "base: models/own"))
    (tmp_path / "models" / "own").mkdir(parents=True)
    document = read_pipeline_file(write(tmp_path, "deep/over.yaml", "extends: ../pipeline.yaml"))
    assert document.data["base"] == "../models/own"


def test_the_steps_are_the_same_as_in_one_file(pipeline: Write, tmp_path: Path) -> None:
    whole = load_spec(pipeline(BASE))
    split = load_spec(write(tmp_path, "over.yaml", "extends: pipeline.yaml"))
    assert dict(split.steps) == dict(whole.steps)
    assert split.source == whole.source


@pytest.mark.parametrize(
    ("over", "place", "message"),
    [
        ("steps: {adapter: {rang: 2}}", "over.yaml:2:19", "adapter.rang"),
        ("steps: {exports: {adapter: adaptor}}", "over.yaml:2:19", "adaptor"),
        ("steps: {photos: null}", "pipeline.yaml:6:29", "photos"),
        ("seed: -1", "over.yaml:2:1", "seed is -1"),
    ],
)
def test_an_error_names_the_file_in_which_the_value_is_written(
    pipeline: Write, tmp_path: Path, over: str, place: str, message: str
) -> None:
    pipeline(BASE)
    with pytest.raises(SpecError, match=message) as caught:
        load_spec(write(tmp_path, "over.yaml", f"extends: pipeline.yaml\n{over}"))
    assert str(tmp_path / place) in str(caught.value)


def test_a_cycle_is_refused_with_its_files(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        write(tmp_path, f"{name}.yaml", f"extends: {other}.yaml")
    with pytest.raises(SpecError, match=r"a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        load_spec(tmp_path / "a.yaml")


def test_a_file_cannot_extend_itself_through_a_link(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "extends: link.yaml")
    (tmp_path / "link.yaml").symlink_to(path)
    with pytest.raises(SpecError, match="extend each other"):
        load_spec(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("missing.yaml", "which is no file"),
        ("https://example.org/base.yaml", "extends 'https"),
        ("3", "extends 3"),
        ("[a.yaml, {}]", "extends {}"),
        ("${style}.yaml", "extends '"),
        ("images", "which is no file"),
    ],
)
def test_an_unusable_base_is_refused(pipeline: Write, tmp_path: Path, value: str, message: str) -> None:
    pipeline(BASE)
    write(tmp_path, "a.yaml", "seed: 1")
    with pytest.raises(SpecError, match=message) as caught:
        load_spec(write(tmp_path, "over.yaml", f"extends: {value if value[0] in '[3' else repr(value)}"))
    assert "over.yaml:1" in str(caught.value)


def test_a_long_chain_and_a_wide_file_are_refused(tmp_path: Path) -> None:
    for index in range(40):
        write(tmp_path, f"{index}.yaml", f"extends: {index + 1}.yaml")
        write(tmp_path, f"leaf{index}.yaml", "seed: 1")
    with pytest.raises(SpecError, match="the chain of extended files is too long"):
        load_spec(tmp_path / "0.yaml")
    names = ", ".join(f"leaf{index}.yaml" for index in range(40))
    assert read_pipeline_file(write(tmp_path, "wide.yaml", f"extends: [{names}]")).data["seed"] == 1
    for index in range(40, 80):
        write(tmp_path, f"leaf{index}.yaml", "seed: 1")
    names = ", ".join(f"leaf{index}.yaml" for index in range(80))
    with pytest.raises(SpecError, match="extends too many files"):
        load_spec(write(tmp_path, "wide.yaml", f"extends: [{names}]"))


def test_files_that_extend_the_same_files_twice_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def count(path: Path, *arguments: Any, **options: Any) -> Document:
        read.append(path)
        return read_document(path, *arguments, **options)

    monkeypatch.setattr("flows.spec.overlays.read_document", count)
    for index in range(14):
        write(tmp_path, f"{index}.yaml", f"extends: [{index + 1}.yaml, {index + 1}.yaml]")
    write(tmp_path, "14.yaml", "name: deep")
    assert read_pipeline_file(tmp_path / "0.yaml").data == {"name": "deep"}
    assert len(read) == 15


def test_merge_keys_and_anchors_work_in_an_overlay(pipeline: Write, tmp_path: Path) -> None:
    text = BASE.replace("adapter:\n    uses: train\n", "adapter: &adapter\n    uses: train\n")
    pipeline(f"{text}  second:\n    <<: *adapter\n    steps: 6\n")
    spec = load_spec(write(tmp_path, "over.yaml", "extends: pipeline.yaml\nsteps: {second: {rank: 4}}"))
    second, first = spec.steps["second"].model_dump(), spec.steps["adapter"].model_dump()
    assert (second["steps"], second["rank"], second["dataset"]) == (6, 4, "captions")
    assert first["steps"] == 4


@pytest.mark.parametrize("text", ["1e-4", "007", "true", "null", "~", "yes", "<<", "a: b", " x ", "1_000", "é\n", "$$"])
def test_written_yaml_is_read_as_the_same_text(tmp_path: Path, text: str) -> None:
    data = {"value": text, text: 1, "list": [text, 1e-05, 8, True, None, {}]}
    path = write(tmp_path, "x.yaml", to_yaml(data))
    assert read_document(path, SpecError, allowed="").data == data
