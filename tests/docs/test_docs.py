"""What the documentation shows, works: links lead somewhere, commands exist, pipeline files load."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import typer

from flows.cli import app
from flows.spec import load_spec

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_readme_has_commands_to_check() -> None:
    assert len(shown_verbs(ROOT / "README.md")) > 8


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


def test_the_pipeline_in_the_readme_loads() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = ROOT / "examples" / "zorb" / ".readme.yaml"
    try:
        path.write_text(block)
        assert "exports" in load_spec(path).steps
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/pipeline.yaml")), ids=page_id)
def test_every_example_loads(path: Path) -> None:
    assert load_spec(path).steps
