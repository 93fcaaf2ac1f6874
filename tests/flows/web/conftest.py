"""Provides one server for the tests of clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from registry.home import Home
from tests.flows.shared import fill_once
from tests.flows.web.served import Served, make_home, serving


@pytest.fixture(scope="session")
def served_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Returns a home with two adapters; tests do not change its versions."""
    return Home.open(fill_once(tmp_path_factory, "served", lambda folder: make_home(folder) and None) / "home")


@pytest.fixture(scope="module")
def served(served_home: Home) -> Iterator[Served]:
    """Yields a running server."""
    with serving(served_home) as running:
        yield running
