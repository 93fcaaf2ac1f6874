"""A home with registered adapters, and an engine that one process loads once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.home import Home
from tests.flows.web.server import copy_home
from tests.tasks.serving.held import HeldEngine


@pytest.fixture(scope="session")
def held_engine() -> HeldEngine:
    return HeldEngine()


@pytest.fixture
def engine(held_engine: HeldEngine) -> Iterator[HeldEngine]:
    """Yields the engine as it is at first; it draws at once until a test holds it."""
    held_engine.may_draw.set()
    held_engine.has_begun.clear()
    held_engine.batches.clear()
    held_engine.forgotten.clear()
    yield held_engine
    held_engine.may_draw.set()


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Home:
    return copy_home(tmp_path_factory, tmp_path / "home")
