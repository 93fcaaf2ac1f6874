"""Schemathesis over the compatible part of the OpenAPI document: valid and invalid requests, and no server error."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from flows.web.app import WebSettings, create_app
from lora_engine.serving.engine import PlainEngine
from registry.home import Home
from tasks.serving.service import ImageService, ServiceSettings

COMPATIBLE = r"^/(sdapi|internal|v1/(images/|models))"
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
_services: list[ImageService] = []


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = Home.open(tmp_path_factory.mktemp("schema") / "home")
    # Large random requests are refused, not drawn.
    bounds = ServiceSettings(max_images=1, max_steps=2, max_pixels=32 * 32)
    service = ImageService(home, bounds, PlainEngine("tiny"))
    app: FastAPI = create_app(
        service, WebSettings(hosts=("testserver", "localhost", "127.0.0.1"), requests_per_minute=0)
    )
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    service.close()


schema = schemathesis.pytest.from_fixture("document").include(path_regex=COMPATIBLE)


@schema.parametrize()
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_request_gets_a_documented_answer(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)
