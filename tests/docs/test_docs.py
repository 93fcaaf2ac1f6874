"""Checks the documentation: links resolve, commands exist, pipeline files load."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

import pytest
import typer

from flows.cli import app
from flows.spec import load_spec

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


def test_the_code_about_plugins_is_that_of_the_example() -> None:
    example = ROOT / "tests" / "plugin"
    sources = [path.read_text() for path in example.rglob("*") if path.suffix in {".py", ".toml"}]
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", (ROOT / "docs" / "plugins.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    assert [block for block in blocks if not any(block.strip() in source for source in sources)] == []
