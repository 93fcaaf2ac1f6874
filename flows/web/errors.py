"""Answers errors as `{"error": {...}}` with the parts of a `WordedError`, without paths and stack traces.

Routes of a compatible API (`CompatibleRoute`) answer them in that API's form.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from lora_engine.errors import WordedError, make_readable
from registry.store.redaction import redact
from tasks.serving.job import Failure, QueueFull, ServiceClosed

_logger = logging.getLogger(__name__)
STATUS: Mapping[str, int] = {
    "UnknownJob": 404,
    "UnknownModel": 404,
    "UnknownSampler": 404,
    "MissingImage": 404,
    "UnknownName": 404,
    "UnknownVersion": 404,
    "GoneVersion": 410,
    "Refused": 409,
    "Conflict": 409,
    "KeyReused": 409,
    "Canceled": 409,
    "ImagesRefused": 403,
    "IdentityError": 403,
    "RightsError": 403,
    "ClientGone": 499,
    "TenantQueueFull": 429,
    "QueueFull": 503,
    "ServiceClosed": 503,
    "DiskFull": 507,
    "HomeError": 503,
    "PolicyError": 503,
    "StoreError": 503,
    "MissingBlob": 503,
    "DamagedBlob": 503,
    "DamagedRow": 503,
    "SignatureError": 409,
    "SpecError": 422,
    "SettingsError": 422,
    "DataError": 422,
    "AdapterError": 422,
    "UnknownBaseError": 422,
    "BaseModelError": 422,
    "VersionError": 422,
    "PromotionError": 422,
}
"""Class of an error -> status; a class that is not listed has that of its nearest listed base, else 500.

499 is what nginx logs for a client that closed the connection.
"""
FOR_A1111: Mapping[str, int] = {"QueueFull": 429}
"""Statuses that clients of A1111's API expect instead: they wait after 429."""
FOR_OPENAI: Mapping[str, int] = {**FOR_A1111, **{kind: 400 for kind, status in STATUS.items() if status == 422}}
"""Statuses of OpenAI's API: what a request may not ask is 400."""
_PATH = re.compile(r"(?<![\w:/.])(?:/[\w.@+~-]+){2,}/?")


class ClientGone(WordedError):
    """The client closed the connection before its images were drawn; nobody reads the answer."""


class JobFailed(WordedError):
    """A job that could not be drawn.

    Args:
        failure: Why.
    """

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.problem, where=failure.where, allowed=failure.allowed, remedy=failure.remedy)


class ErrorBody(BaseModel):
    """What is wrong, where, and how to correct it."""

    type: str = Field(description="Class of the error.")
    message: str = Field(description="All parts as one text.")
    problem: str = Field(description="The problem with the value that was sent.")
    where: str = Field("", description="The field, adapter or job.")
    allowed: str = Field("", description="The allowed values.")
    remedy: str = Field("", description="The fix.")
    reasons: list[str] = Field(default_factory=list, description="All reasons, if there are several.")


class ErrorAnswer(BaseModel):
    """The body of an answer that is no success."""

    error: ErrorBody


@dataclass(frozen=True)
class ErrorForm:
    """How an API answers errors.

    Attributes:
        invalid: Answers the errors of pydantic for a body.
        http: Answers an error of the framework, such as an unreadable body.
        worded: Answers an error of Loraline.
    """

    invalid: Callable[[Sequence[Any]], Response]
    http: Callable[[HTTPException], Response]
    worded: Callable[[WordedError], Response]


class CompatibleRoute(APIRoute):
    """A route of a compatible API, whose errors have that API's form; a subclass has the form."""

    form: ClassVar[ErrorForm]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns the handler of FastAPI, with errors answered."""
        handle, form = super().get_route_handler(), self.form

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return form.invalid(error.errors())
            except HTTPException as error:
                return form.http(error)
            except WordedError as error:
                return form.worded(error)

        return answer


def describe_failure(failure: Failure) -> ErrorBody:
    """Returns the body of an error for a client."""
    values = {name: hide_paths(value) for name, value in asdict(failure).items() if isinstance(value, str)}
    values["type"] = values.pop("kind")
    return ErrorBody(
        **values, message=hide_paths(failure.message), reasons=[hide_paths(reason) for reason in failure.reasons]
    )


def status_of(error: WordedError | Failure, changes: Mapping[str, int] | None = None) -> int:
    """Returns the status of an answer.

    Args:
        error: The error; a `JobFailed` has the status of what failed.
        changes: Statuses of another API that differ from `STATUS`: `FOR_A1111` or `FOR_OPENAI`.
    """
    if isinstance(error, JobFailed):
        error = error.failure
    kinds = [error.kind] if isinstance(error, Failure) else [kind.__name__ for kind in type(error).__mro__]
    table = {**STATUS, **(changes or {})}
    return next((table[kind] for kind in kinds if kind in table), 500)


def headers_of(error: WordedError) -> dict[str, str]:
    """Returns the headers of an answer: when to try again."""
    return {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFull | ServiceClosed) else {}


def hide_paths(text: str) -> str:
    """Returns a text without folders of this machine, control characters and secrets."""
    return _PATH.sub(lambda match: match[0].rstrip("/").rpartition("/")[2], make_readable(redact(text)))


def answer(failure: Failure, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Returns the answer of an error."""
    return JSONResponse({"error": describe_failure(failure).model_dump()}, status, dict(headers or {}))


def add_error_handlers(app: FastAPI) -> None:
    """Makes the application answer all errors as `ErrorAnswer`."""

    @app.exception_handler(WordedError)
    async def answer_worded(request: Request, error: WordedError) -> JSONResponse:
        status = status_of(error)
        if isinstance(error, JobFailed):  # accepted, and logged by the service
            return answer(error.failure, status)
        if not isinstance(error, ClientGone):
            request.app.state.service.metrics.rejected.labels(type(error).__name__).inc()
        if status >= 500:
            _logger.warning("%s", error)
        return answer(Failure.of(error), status, headers_of(error))

    @app.exception_handler(RequestValidationError)
    async def answer_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(_of_validation(error.errors()), 422)

    @app.exception_handler(HTTPException)
    async def answer_http(_: Request, error: HTTPException) -> JSONResponse:
        failure = Failure("HttpError", str(error.detail))
        return answer(failure, error.status_code, error.headers)


def _of_validation(errors: Any) -> Failure:
    """Returns the first error of pydantic, with the number of the others; does not quote long values."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    value = repr(first.get("input"))
    shown = f" ({value[:60]}{'...' if len(value) > 60 else ''})" if first["type"] != "missing" else ""
    more = f"; {len(errors) - 1} more fields are invalid" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        return Failure("InvalidRequest", f"unknown field{more}", where, remedy="leave it out; see /openapi.json")
    return Failure(
        "InvalidRequest", f"{first['msg']}{shown}{more}", where, remedy="correct the field; see /openapi.json"
    )
