"""schemathesis over the compatible part of the OpenAPI document: valid and invalid requests, and no server error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from flows.web.app import WebSettings, create_app
from lora_engine.serving.engine import PlainEngine
from registry.home import Home
from tasks.serving.service import ImageService, ServiceSettings

# Some invalid values are accepted as the original does (null, unknown fields), so rejection is not checked.
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
WITH_INPUT = [
    *("POST /sdapi/v1/txt2img", "POST /sdapi/v1/img2img", "POST /sdapi/v1/options", "POST /sdapi/v1/png-info"),
    *("GET /sdapi/v1/progress", "POST /v1/images/generations", "POST /v1/images/edits"),
    "POST /v1/images/variations",
]
ANY_TEXT = "GET /v1/models/{model}"
"""Has no invalid input."""
CASES = [(label, mode) for label in WITH_INPUT for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
CASES.append((ANY_TEXT, GenerationMode.POSITIVE))


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, APIOperation]]:
    home = Home.open(tmp_path_factory.mktemp("schema") / "home")
    # What would draw for long is refused by these limits with a documented answer.
    service = ImageService(home, ServiceSettings(max_images=1, max_steps=1, max_pixels=64 * 64), PlainEngine("tiny"))
    bounds = WebSettings(hosts=("127.0.0.1", "localhost", "testserver"), requests_per_minute=0)
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service, bounds))
    yield {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}
    service.close()


def answers(operation: APIOperation, mode: GenerationMode, examples: int) -> None:
    """Sends generated requests, and checks the answers."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check(case: Case) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


@pytest.mark.parametrize(("label", "mode"), CASES, ids=lambda value: getattr(value, "value", value))
def test_an_operation_of_a_compatible_api_answers_as_documented(
    operations: dict[str, APIOperation], label: str, mode: GenerationMode
) -> None:
    answers(operations[label], mode, 12)


def test_operations_without_input_answer_as_documented(operations: dict[str, APIOperation]) -> None:
    compatible = [label for label in operations if "/sdapi/" in label or "openai" in operations[label].tags]
    others = sorted(set(compatible) - {*WITH_INPUT, ANY_TEXT})
    assert len(others) > 20
    assert set(WITH_INPUT) <= set(compatible)
    for label in others:
        answers(operations[label], GenerationMode.POSITIVE, 1)
