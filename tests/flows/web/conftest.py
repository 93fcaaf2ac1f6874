"""Provides one server for the tests of clients, and one in this process for the tests of the own endpoints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from flows.web.app import create_app
from lora_engine.serving.engine import PlainEngine
from registry.home import Home
from tasks.serving.service import ImageService, ServiceSettings
from tests.flows.web.own_endpoints import ADDRESS
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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return copy_home(tmp_path_factory, tmp_path_factory.mktemp("endpoints") / "home")


@pytest.fixture(scope="module")
def service(home: Home) -> Iterator[ImageService]:
    service = ImageService(home, ServiceSettings(), PlainEngine("tiny"))
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: ImageService) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url=ADDRESS, raise_server_exceptions=False) as client:
        yield client
