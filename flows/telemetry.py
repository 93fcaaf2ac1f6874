"""Sends spans of flow runs, steps and the server's requests to an OpenTelemetry collector.

Prefect creates a span for each flow run and each task run, once a tracer provider is set. The standard variables of
OpenTelemetry set the collector: `OTEL_EXPORTER_OTLP_ENDPOINT`, or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` for spans alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache

from tasks.errors import SpecError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def is_traced() -> bool:
    """Returns True if a collector of spans is set and OpenTelemetry is not disabled."""
    return any(map(os.environ.get, _ENDPOINTS)) and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


@lru_cache(maxsize=1)
def start_tracing() -> None:
    """Sets the tracer provider of this process if a collector is set; its last spans are sent when the process ends.

    Raises:
        SpecError: The extra `telemetry` is not installed.
    """
    if not is_traced():
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SpecError(
            f"{error.name} is not installed, which spans need",
            where="OTEL_EXPORTER_OTLP_ENDPOINT",
            remedy="pip install 'loraline[telemetry]', or unset the variable",
        ) from error
    from opentelemetry import trace

    provider = TracerProvider(resource=Resource.create({"service.name": "loraline"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def describe_span(attributes: Mapping[str, str | bool]) -> None:
    """Adds attributes to the span of the current task run, if there is one."""
    from opentelemetry import trace

    trace.get_current_span().set_attributes(dict(attributes))
