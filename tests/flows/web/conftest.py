"""Provides one server for the tests of clients."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from registry.home import Home
from tests.flows.shared import fill_once
from tests.flows.web.served import Served, make_home, serving


@pytest.fixture(scope="module")
def served_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Returns a copy of a home with two adapters: one server at a time uses a home."""
    made = fill_once(tmp_path_factory, "served", make_home) / "home"
    return Home.open(shutil.copytree(made, tmp_path_factory.mktemp("served") / "home"))


@pytest.fixture(scope="module")
def served(served_home: Home) -> Iterator[Served]:
    """Yields a running server."""
    with serving(served_home) as running:
        yield running
