"""Provides a home with a comparison of small@1 against the base, for tests of votes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from registry.home import Home
from tests.flows.commands import say
from tests.flows.shared import Trained, copy_trained, fill_once

PROMPTS = ["a red zorb", "a blue zorb", "a zorb", "a ring", "a big zorb", "a small ring"]


def prepare(home: Path, folder: Path, *options: object) -> dict[str, object]:
    """Prepares a comparison of small@1 against the base, and returns what the verb prints."""
    (folder / "votes.txt").write_text("\n".join(PROMPTS))
    arguments = ("--against", "base", "--prompts", folder / "votes.txt", "--steps", 1, "--json", *options)
    return dict(json.loads(say("vote", "prepare", "small@1", *arguments, home=home)))


@pytest.fixture(scope="session")
def compared_home(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the trained home with a comparison of small@1 against the base; read-only."""

    def fill(folder: Path) -> None:
        shutil.copytree(trained_home, folder, dirs_exist_ok=True)
        (folder / "comparison.json").write_text(json.dumps(prepare(Home.open(folder / "home").path, folder)))

    return fill_once(tmp_path_factory, "compared", fill)


@pytest.fixture
def compared(compared_home: Path, tmp_path: Path) -> tuple[Trained, str]:
    """Returns a copy of that home, and the digest of the comparison."""
    copy = copy_trained(compared_home, tmp_path / "compared")
    return copy, json.loads((copy.spec.parent / "comparison.json").read_text())["comparison"]
