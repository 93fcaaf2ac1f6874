"""Checks the documentation: links resolve, commands exist, pipeline files load."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import get_args

import pytest
import typer
from pydantic import BaseModel

from flows.cli import app
from flows.coming_from.options import OPTIONS, TRAINERS
from flows.coming_from.write import convert_settings
from flows.spec import load_spec
from lora_engine.captioning.vlm_families import VLM_FAMILIES
from lora_engine.catalog.formats import FORMATS, written_formats
from lora_engine.catalog.kinds import KINDS
from lora_engine.data.captioners import CAPTIONERS
from lora_engine.data.edits import Edit
from lora_engine.data.spec import PreprocessSettings
from lora_engine.evaluation.metrics import METRICS
from lora_engine.formats import codecs
from lora_engine.merging.methods import METHODS
from lora_engine.merging.spec import MergeOptions
from lora_engine.registries import GROUPS
from lora_engine.training.methods import methods
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.methods import MethodSpec
from tasks.step import STEPS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for entry in (path for path in ROOT.glob("[!.]*") if path.name != "build")
    for page in (entry.rglob("*.md") if entry.is_dir() else [entry])
    if page.suffix == ".md"
)


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_images_resolve(page: Path) -> None:
    assert [target for target in local_links(page) if not (page.parent / target).exists()] == []


def local_links(page: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def test_the_readme_has_commands_and_links_to_check() -> None:
    assert len(shown_verbs(ROOT / "README.md")) > 8
    assert len(local_links(ROOT / "README.md")) > 8


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_verb_that_is_shown_exists(page: Path) -> None:
    assert shown_verbs(page) - known_verbs() == set()


@functools.cache
def known_verbs() -> set[str]:
    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def shown_verbs(page: Path) -> set[str]:
    return set(re.findall(r"(?:^|[`\s])loraline ([a-z]+(?:-[a-z]+)*)\b", "\n".join(code_of(page))))


def code_of(page: Path) -> list[str]:
    text = page.read_text()
    return [*re.findall(r"```(?:[a-z]*)\n(.*?)```", text, re.DOTALL), *re.findall(r"`(loraline [^`]+)`", text)]


def test_the_pipeline_in_the_readme_loads(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    # Not in the repository, which other tests copy at the same time.
    path = shutil.copytree(ROOT / "examples" / "zorb", tmp_path / "zorb") / "readme.yaml"
    path.write_text(block)
    assert "exports" in load_spec(path).steps


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/pipeline.yaml")), ids=page_id)
def test_every_example_loads_and_registers_what_it_trains(path: Path) -> None:
    assert {"train", "register"} <= {step.uses for step in load_spec(path).steps.values()}


@pytest.mark.parametrize(("page", "count"), [("plugins.md", 3), ("adding-a-kind.md", 3), ("adding-a-format.md", 2)])
def test_the_code_about_entries_is_that_of_the_example(page: str, count: int) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert len(python_and_toml(text)) == count
    assert blocks_not_in_the_example(text) == []


def test_code_that_differs_from_the_example_in_one_character_is_found() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text()
    (block,) = blocks_not_in_the_example(text.replace("quantile(0.5", "quantile(0.4"))
    assert block.startswith("class Median")


def blocks_not_in_the_example(text: str) -> list[str]:
    example = ROOT / "tests" / "plugin"
    sources = [path.read_text() for path in example.rglob("*") if path.suffix in {".py", ".toml"}]
    written = [without_indentation(source) for source in sources]
    return [
        block for block in python_and_toml(text) if not any(without_indentation(block) in source for source in written)
    ]


def without_indentation(text: str) -> str:
    """Returns the lines that are not empty, without indentation: the formatter outdents methods on a page."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def python_and_toml(text: str) -> list[str]:
    return re.findall(r"```(?:python|toml)\n(.*?)```", text, re.DOTALL)


def options_of(spec: type[BaseModel] | None, *shared: str) -> str:
    """Returns the fields of a spec as a cell."""
    return ", ".join(f"`{name}`" for name in (spec.model_fields if spec else ()) if name not in shared)


def tables_of_entries() -> dict[str, list[tuple[str, ...]]]:
    """Returns the rows of each table of the reference, the first one its head."""
    shared = (*MergeOptions.model_fields, *MethodSpec.model_fields, "method")
    return {
        "Steps": [("step", "produces"), *((name, step.produces) for name, step in STEPS.items())],
        "Adapter kinds": [
            ("kind", "form", "options"),
            *((name, kind.title, options_of(kind.spec, "name")) for name, kind in KINDS.items()),
        ],
        "Adapter formats": [
            ("format", "program", "kinds"),
            *(
                (name, entry.title, ", ".join(codecs[name].key_layout.factor_keys) if entry.is_written else "only read")
                for name, entry in FORMATS.items()
            ),
        ],
        "Merge methods": [
            ("method", "result", "options"),
            *((name, method.title, options_of(method.spec, *shared)) for name, method in METHODS.items()),
        ],
        "Training methods": [
            ("method", "trains", "options"),
            *((name, method.title, options_of(method.spec, *shared)) for name, method in methods.items()),
        ],
        "Metrics": [
            ("metric", "title", "meaning", "measured"),
            *(
                (
                    name,
                    metric.title,
                    f"{metric.meaning} {metric.better.capitalize()} is better.",
                    "if there is a `judge`"
                    if metric.judged
                    else "if `extra` or a gate names it"
                    if metric.optional
                    else "if it can be",
                )
                for name, metric in METRICS.items()
            ),
        ],
        "Captioners": [
            ("captioner", "source of the captions"),
            *((name, captioner.title) for name, captioner in CAPTIONERS.items()),
        ],
    }


def page_of(tables: dict[str, list[tuple[str, ...]]]) -> str:
    """Returns the sections of the reference."""
    sections = []
    for title, (head, *rows) in tables.items():
        cells = [head, tuple("---" for _ in head), *((f"`{name}`", *rest) for name, *rest in rows)]
        sections.append(f"## {title}\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n")
    return "\n".join(sections)


def test_the_reference_has_the_entries_of_the_registries() -> None:
    assert (ROOT / "docs" / "reference.md").read_text().endswith("\n" + page_of(tables_of_entries()))


def names_of_field(field: str) -> list[str]:
    """Returns the names that a setting of preprocess takes."""
    options = get_args(PreprocessSettings.model_fields[field].annotation)
    return [option.model_fields["name"].default for option in options]


@pytest.mark.parametrize(
    ("page", "head", "names"),
    [
        ("merging.md", "| method | result |", METHODS),
        ("training.md", "| method | trains |", methods),
        ("formats.md", "| format | kinds |", written_formats()),
        ("plugins.md", "| group | entry |", GROUPS),
        ("crops-and-masks.md", "| crop | what is kept | options |", names_of_field("crop")),
        ("crops-and-masks.md", "| mask | white parts | options |", names_of_field("mask")),
        (
            "captioning.md",
            "| edit | options |",
            [edit.model_fields["edit"].default for edit in get_args(get_args(Edit)[0])],
        ),
        ("metrics.md", "| metric | shows |", METRICS),
    ],
)
def test_a_table_of_names_has_every_entry(page: str, head: str, names: Iterable[str]) -> None:
    lines = (ROOT / "docs" / page).read_text().partition(head)[2].splitlines()[2:]
    rows = list(takewhile(lambda line: line.startswith("|"), lines))
    assert sorted(name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])) == sorted(names)


def table_of_other_trainers() -> str:
    """Returns the table of the page for users of other trainers."""
    names = {trainer: [f"`{name}`" for option in OPTIONS for name in option.names(trainer)] for trainer in TRAINERS}
    assert sum(map(len, names.values())) > 300
    rows = [("Loraline", *TRAINERS.values(), "difference"), ("---",) * 6]
    for option in OPTIONS:
        cells = [", ".join(f"`{name}`" for name in option.names(trainer)) for trainer in TRAINERS]
        rows.append((f"`{option.ours}`" if option.ours else "-", *cells, option.note.replace("|", "\\|")))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def test_the_page_for_users_of_other_trainers_has_the_table_that_errors_use() -> None:
    page = (ROOT / "docs" / "coming-from.md").read_text()
    assert page.endswith("\n\n" + table_of_other_trainers())


def test_the_example_of_the_page_for_users_of_other_trainers_is_converted(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "coming-from.md").read_text()
    (source,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    shown = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0]
    shutil.copytree(ROOT / "examples" / "zorb" / "images", tmp_path / "images" / "10_zorb ring")
    (tmp_path / "config.toml").write_text(source)
    written = convert_settings(tmp_path / "zorb", tmp_path / "config.toml").path.read_text()
    assert shown in written


def test_the_pipeline_with_saved_adapters_on_the_page_about_training_loads(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(name: early\n.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    (tmp_path / "images").mkdir()
    (tmp_path / "pipeline.yaml").write_text(block)
    assert {"adapter@step-200", "adapter@step-300"} <= set(load_spec(tmp_path / "pipeline.yaml").steps)


def test_the_pipeline_with_two_datasets_on_the_page_about_training_loads(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(name: two\n.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    for name in ("images", "rings"):
        (tmp_path / name).mkdir()
    (tmp_path / "pipeline.yaml").write_text(block)
    assert load_spec(tmp_path / "pipeline.yaml").steps["both"].model_dump()["parts"][1]["weight"] == 0.5


def train_blocks() -> dict[str, str]:
    """Returns the blocks about training that are settings of a train step, by their first line."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    keys = {block: set(re.findall(r"^([a-z_]+):", block, re.MULTILINE)) for block in blocks}
    return {block.partition("\n")[0]: block for block in blocks if keys[block] <= set(TrainSettings.model_fields)}


@pytest.mark.parametrize("first", train_blocks())
def test_the_settings_of_a_train_step_on_the_page_about_training_load(first: str, tmp_path: Path) -> None:
    assert len(train_blocks()) >= 5
    (tmp_path / "images").mkdir()
    settings = "\n".join(f"    {line}" for line in train_blocks()[first].splitlines())
    steps = "" if first.startswith("steps:") else "    steps: 100\n"
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        "name: shown\nbase: tiny\nsteps:\n"
        "  photos: {uses: ingest, images: images/}\n"
        f"  adapter:\n    uses: train\n    dataset: photos\n{steps}{settings}\n"
    )
    assert "adapter" in load_spec(path).steps


@pytest.mark.parametrize("path", ["docs/captioning.md", "examples/photographs/captions.yaml"])
def test_pipelines_with_captioners_load(path: str, tmp_path: Path) -> None:
    text = (ROOT / path).read_text()
    (tmp_path / "images").mkdir()
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(text if path.endswith(".yaml") else re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert load_spec(pipeline).steps["captions"].uses == "caption"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_pipelines_with_crops_and_masks_load(number: int, tmp_path: Path) -> None:
    steps = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "crops-and-masks.md").read_text(), re.DOTALL)
    assert len(steps) == 3
    (tmp_path / "images").mkdir()
    pipeline = tmp_path / "pipeline.yaml"
    photos = "  photos: {uses: ingest, images: images/, alpha: mask, masks: images/}"
    pipeline.write_text(f"name: shown\nbase: tiny\nsteps:\n{photos}\n  {steps[number]}")
    assert load_spec(pipeline).steps["prepared"].uses == "preprocess"


def test_the_page_about_captioners_has_every_family() -> None:
    rows = (ROOT / "docs" / "captioning.md").read_text().partition("| family |")[2].splitlines()[2:]
    table = {row.split("|")[2].strip(" `") for row in takewhile(lambda line: line.startswith("|"), rows)}
    assert table == set(VLM_FAMILIES)
