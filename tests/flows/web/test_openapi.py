"""schemathesis over the OpenAPI document of the server: valid and invalid requests get the documented answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from flows.web.app import WebSettings, create_app
from lora_engine.serving.engine import PlainEngine
from tasks.serving.service import ImageService, ServiceSettings
from tests.flows.web.server import copy_home

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
WITHOUT_INPUT = ["GET /v1/adapters", "GET /healthz", "GET /readyz", "GET /metrics"]
WITH_INPUT = [
    "POST /v1/jobs",
    "GET /v1/jobs",
    "GET /v1/jobs/{job_id}",
    "DELETE /v1/jobs/{job_id}",
    "GET /v1/jobs/{job_id}/images/{index}",
    "GET /v1/jobs/{job_id}/preview",
    "GET /v1/jobs/{job_id}/events",
    "POST /v1/images",
    "GET /v1/adapters/{name}",
    "GET /v1/adapters/{name}/{version}/sample",
]
VALID, INVALID = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [(label, VALID) for label in WITHOUT_INPUT] + [
    (label, mode) for label in WITH_INPUT for mode in (VALID, INVALID)
]


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, schemathesis.schemas.APIOperation]]:
    home = copy_home(tmp_path_factory, tmp_path_factory.mktemp("openapi") / "home")
    # What is valid by the document, and would draw for long, is refused by these limits with a documented answer.
    service = ImageService(home, ServiceSettings(max_images=1, max_steps=1, max_pixels=64 * 64), PlainEngine("tiny"))
    hosts = ("127.0.0.1", "localhost", "testserver")
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service, WebSettings(hosts=hosts)))
    yield {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}
    service.close()


def test_every_own_operation_is_listed_here(operations: dict[str, schemathesis.schemas.APIOperation]) -> None:
    own = [label for label in operations if "/sdapi/" not in label and "openai" not in str(operations[label].tags)]
    assert set(own) == {*WITHOUT_INPUT, *WITH_INPUT}


@pytest.mark.parametrize(("label", "mode"), CASES, ids=lambda value: getattr(value, "value", value))
def test_an_operation_answers_as_documented(
    operations: dict[str, schemathesis.schemas.APIOperation], label: str, mode: GenerationMode
) -> None:
    operation = operations[label]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check(case: Case) -> None:
        case.call_and_validate(checks=CHECKS)

    check()
