"""Tests what other programs read of a home: `status`, metrics for Prometheus, logs as JSON lines, spans."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prometheus_client.parser import text_string_to_metric_families

from flows.queued import read_queued
from tests.flows.commands import loraline_here, loraline_process, say
from tests.flows.made import register_zorb
from tests.flows.web.server import Serving, copy_home, stop


@pytest.fixture
def zorb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a home whose `zorb@1` was promoted to `trial` by ann."""
    home = register_zorb(tmp_path)
    monkeypatch.setenv("LORALINE_ACTOR", "ann")
    say("promote", "zorb@1", "--to", "trial", "--reason", "to compare", home=home)
    return home


def test_status_says_since_when_and_by_whom_an_alias_points_at_its_version(zorb: Path) -> None:
    shown = json.loads(say("status", "--json", home=zorb))
    (alias,), (adapter,) = shown["aliases"], shown["adapters"]
    event = json.loads(say("log", "zorb", "--json", home=zorb))[-1]
    assert (alias["actor"], alias["moved_because"], alias["since"]) == ("ann", "to compare", event["at"])
    assert (adapter["name"], adapter["version"], adapter["versions"]) == ("zorb", 1, 1)
    text = say("status", home=zorb)
    assert "to compare" in text
    assert "ann" in text


def test_a_withdrawn_version_is_not_the_latest_of_its_adapter(zorb: Path) -> None:
    say("unalias", "zorb@trial", "--reason", "done", home=zorb)
    say("withdraw", "zorb@1", "--reason", "wrong", home=zorb)
    assert json.loads(say("status", "--json", home=zorb))["adapters"] == []


def metrics_of(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_the_home_holds(zorb: Path, tmp_path: Path) -> None:
    found = metrics_of(say("metrics", home=zorb))
    assert found["loraline_versions", "zorb", "ACTIVE"] == 1
    assert found["loraline_alias_version", "zorb", "trial"] == 1
    assert found["loraline_alias_policy_met", "zorb", "trial"] == 1
    assert found["loraline_events_total", "promote"] == 1
    samples = json.loads(say("metrics", "--json", home=zorb))
    assert {(sample["name"], *sample["labels"].values()): sample["value"] for sample in samples} == found
    (zorb / "policy.yaml").write_text("aliases: {trial: {needs_signature: true}}\n")
    file = tmp_path / "loraline.prom"
    assert say("metrics", "-o", file, home=zorb) == ""
    assert metrics_of(file.read_text())["loraline_alias_policy_met", "zorb", "trial"] == 0


def test_metrics_of_a_missing_home_are_empty(tmp_path: Path) -> None:
    assert metrics_of(say("metrics", home=tmp_path / "none")) == {}


def finished(environment: dict[str, str], *arguments: object) -> str:
    """Runs the command in a process to a successful end, and returns its standard error."""
    with loraline_process(environment, *arguments) as process:
        _, err = process.communicate()
        assert process.returncode == 0, err
    return err


def test_log_records_are_json_lines_without_secrets(pipeline: Callable[..., Path], environment: dict[str, str]) -> None:
    secret = "a-token-that-is-long"
    file = pipeline()
    file.rename(named := file.with_name(f"{secret}.yaml"))
    err = finished(environment | {"LORALINE_LOG": "json", "HF_TOKEN": secret}, "run", named)
    lines = [json.loads(line) for line in err.splitlines()]
    assert {"timestamp", "level", "logger", "message", "process", "step"} <= set(lines[0])
    ended = {line["step"]: line["message"] for line in lines if "completed in" in line["message"]}
    assert set(ended) == {"photos", "prepared", "captions"}
    assert secret not in err


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"LORALINE_LOG": "jsn"}, "environment: LORALINE_LOG is 'jsn'. Allowed: json"),
        ({"LORALINE_LOG": "json", "LORALINE_LOG_LEVEL": "loud"}, "LORALINE_LOG_LEVEL is 'LOUD'"),
    ],
)
def test_an_unknown_format_or_level_of_logs_is_refused(tmp_path: Path, variables: dict[str, str], problem: str) -> None:
    refused = loraline_here("list", home=tmp_path, **variables)
    assert refused.returncode == 2
    assert problem in refused.stderr


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """Yields the address of an OTLP collector, and the spans that it has received."""
    spans: list[Span] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = ExportTraceServiceRequest.FromString(body)
            spans.extend(span for group in request.resource_spans for s in group.scope_spans for span in s.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Writes nothing."""

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        server.server_close()


def test_a_run_and_its_steps_are_spans_of_one_trace(pipeline: Callable[..., Path], environment: dict[str, str]) -> None:
    with collector() as (address, spans):
        finished(environment | {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{address}/v1/traces"}, "run", pipeline())
    steps = {}
    for span in spans:
        values = {item.key: item.value for item in span.attributes}
        if "loraline.step" in values:
            steps[values["loraline.step"].string_value] = (span, values)
    assert set(steps) == {"photos", "prepared", "captions"}
    (trace,) = {span.trace_id for span, _ in steps.values()}
    runs = [span for span in spans if span.trace_id == trace and not span.parent_span_id]
    assert len(runs) == 1
    assert {span.parent_span_id for span, _ in steps.values()} == {runs[0].span_id}
    assert steps["photos"][1]["loraline.uses"].string_value == "ingest"
    assert not steps["photos"][1]["loraline.cached"].bool_value


def test_without_a_collector_a_run_sends_no_spans(pipeline: Callable[..., Path], environment: dict[str, str]) -> None:
    with collector() as (address, spans):
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_SDK_DISABLED": "true"}
        finished(environment | variables, "run", pipeline())
    assert spans == []


def test_requests_to_the_server_are_spans_in_the_trace_of_the_client(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with collector() as (address, spans):
        serving = Serving(copy_home(tmp_path_factory, tmp_path / "home"), OTEL_EXPORTER_OTLP_ENDPOINT=address)
        with serving.running("--no-studio") as process, serving.client() as client:
            body = {"prompt": "a secret ring", "steps": 1}
            client.post("/v1/images", json=body, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
            client.get("/v1/adapters/zorb")
            client.get("/v1/adapters", headers={"Host": "evil.example"})
            client.get("/healthz")
            assert stop(process)[0] == 0
    found = {}
    for span in spans:
        values = {item.key: item.value.string_value or item.value.int_value for item in span.attributes}
        assert "secret" not in str(values)
        route, status = values.get("http.route"), values["http.response.status_code"]
        found[span.name] = (span.trace_id.hex() == trace, route, status)
    assert found == {
        "POST /v1/images": (True, "/v1/images", 200),
        "GET /v1/adapters/{name}": (False, "/v1/adapters/{name}", 200),
        "GET": (False, None, 400),
    }


def test_status_lists_what_a_prefect_server_has_queued(
    tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with httpx.Client(base_url=prefect_server.rstrip("/") + "/") as client:
        flow = client.post("flows/", json={"name": "monitored"}).raise_for_status().json()["id"]
        made = client.post("deployments/", json={"name": "hourly", "flow_id": flow}).raise_for_status().json()["id"]
        for name, due in (("later", "2100-01-02T00:00:00Z"), ("next", "2100-01-01T00:00:00Z")):
            state = {"type": "SCHEDULED", "state_details": {"scheduled_time": due}}
            client.post(f"deployments/{made}/create_flow_run", json={"name": name, "state": state}).raise_for_status()
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    queued = [run for run in read_queued() or () if run.deployment == "hourly"]
    assert [(run.name, run.state) for run in queued] == [("next", "Scheduled")]
    shown = json.loads(say("status", "--json", home=tmp_path / "none"))["queued"]
    assert [run["name"] for run in shown if run["deployment"] == "hourly"] == ["next"]


def test_a_server_that_does_not_answer_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        assert read_queued() is None
    assert "does not say what is queued" in caplog.text
