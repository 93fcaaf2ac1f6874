"""Routes of the registry's adapters, and of the state of the server."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool

from flows.web.image_requests import service_of
from flows.web.jobs import responses
from flows.web.schemas import AdapterBody, HealthBody, adapter_bodies
from registry.errors import UnknownVersion
from registry.refs import NAME_RULE
from tasks.operations.adapter_cards import list_adapter_cards, read_sample_png

adapter_routes = APIRouter()
AdapterName = Annotated[str, Path(pattern=f"^{NAME_RULE}$", description="Name of the adapter.")]
VersionNumber = Annotated[int, Path(ge=1, le=10**15, description="Number of the version.")]
_ERRORS = responses(401, 403, 422, 429, 503)


@adapter_routes.get("/v1/adapters", tags=["adapters"], responses=_ERRORS)
async def list_adapters(request: Request) -> list[AdapterBody]:
    """List the active versions of all adapters, by name and number."""
    cards = await run_in_threadpool(list_adapter_cards, service_of(request).home)
    return [body for card in cards for body in adapter_bodies(card)]


@adapter_routes.get("/v1/adapters/{name}", tags=["adapters"], responses=_ERRORS)
async def list_versions_of(request: Request, name: AdapterName) -> list[AdapterBody]:
    """List the active versions of one adapter; an unknown name has none."""
    cards = await run_in_threadpool(list_adapter_cards, service_of(request).home, name)
    return [body for card in cards for body in adapter_bodies(card)]


@adapter_routes.get(
    "/v1/adapters/{name}/{version}/sample",
    tags=["adapters"],
    response_class=Response,
    responses={
        200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
        **_ERRORS,
        **responses(404, 410),
    },
)
async def show_sample(request: Request, name: AdapterName, version: VersionNumber) -> Response:
    """Return the sample image of a version, a PNG file of its evaluation or its training."""
    image = await run_in_threadpool(read_sample_png, service_of(request).home, f"{name}@{version}")
    if image is None:
        raise UnknownVersion("has no sample image", where=f"{name}@{version}")
    return Response(image, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


@adapter_routes.get("/healthz", tags=["server"], responses=responses(403))
async def read_health() -> HealthBody:
    """Answer while the process runs."""
    return HealthBody(status="ok")


@adapter_routes.get(
    "/readyz", tags=["server"], responses={**responses(403), 503: {"model": HealthBody, "description": "It stops."}}
)
async def read_readiness(request: Request, response: Response) -> HealthBody:
    """Answer whether requests are drawn: the base is loaded, and the server does not stop."""
    if service_of(request).is_ready:
        return HealthBody(status="ok")
    response.status_code = 503
    return HealthBody(status="stopping")


@adapter_routes.get(
    "/metrics",
    tags=["server"],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **responses(401, 403, 429)},
)
async def show_serving_metrics(request: Request) -> Response:
    """Return the metrics in the text format of Prometheus."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
