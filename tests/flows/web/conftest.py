"""Provides one server for the tests of clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from registry.home import Home
from tests.flows.web.served import Served, serving
from tests.flows.web.server import copy_home


@pytest.fixture(scope="module")
def served_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Returns a home of its own for a server, with `zorb@1` and `ring@1` in production."""
    return copy_home(tmp_path_factory, tmp_path_factory.mktemp("served") / "home")


@pytest.fixture(scope="module")
def served(served_home: Home) -> Iterator[Served]:
    """Yields a running server."""
    with serving(served_home) as running:
        yield running
