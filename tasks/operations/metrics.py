"""Renders what a home holds and runs in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from registry.home import Home
from registry.lineage.counts import RegistryCounts, count_rows
from registry.lineage.record import Lineage
from registry.policy.conditions import AliasState
from tasks.operations.status import RunState, has_tables, read_aliases, read_status

_Labels = TypeVar("_Labels", bound=tuple[str, ...])


class _Collected:
    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        """Returns the metrics."""
        return self._metrics


def render_metrics(metrics: Sequence[Metric]) -> str:
    """Returns metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Collected(metrics))
    return generate_latest(registry).decode()


def read_metrics(home: Home) -> list[Metric]:
    """Returns the metrics of a home, whose names start with `loraline_`; only reads the home.

    Raises:
        PolicyError: The home's policy or table of licenses cannot be used.
    """
    running = [state for state in read_status(home, limit=0) if state.run.status == "RUNNING"]
    aliases, _ = read_aliases(home)
    return [*_row_metrics(_count(home)), *_alias_metrics(aliases), *_step_metrics(running)]


def _count(home: Home) -> RegistryCounts:
    if not has_tables(home):
        return RegistryCounts({}, {}, {}, {}, {})
    with closing(Lineage(home.lineage_url)) as lineage, lineage.database.read() as session:
        return count_rows(session)


def _gauge(name: str, text: str, labels: Sequence[str], values: Mapping[_Labels, float]) -> Metric:
    return _filled(GaugeMetricFamily(f"loraline_{name}", text, labels=labels), values)


def _counter(name: str, text: str, labels: Sequence[str], values: Mapping[_Labels, float]) -> Metric:
    return _filled(CounterMetricFamily(f"loraline_{name}", text, labels=labels), values)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[_Labels, float]
) -> GaugeMetricFamily | CounterMetricFamily:
    for labels, value in sorted(values.items()):
        family.add_metric(labels, value)
    return family


def _row_metrics(counts: RegistryCounts) -> Iterator[Metric]:
    yield _gauge("versions", "Versions by state", ("adapter", "state"), counts.versions)
    yield _counter("runs", "Runs of pipelines by status", ("pipeline", "status"), counts.runs)
    started = {(name,): at.timestamp() for name, at in counts.last_runs.items()}
    yield _gauge("last_run_start_timestamp_seconds", "Start of the latest run", ("pipeline",), started)
    yield _counter("executions", "Executions of steps by status", ("uses", "status"), counts.executions)
    events = {(action,): number for action, number in counts.events.items()}
    yield _counter("events", "Events of the log", ("action",), events)


def _alias_metrics(aliases: Sequence[AliasState]) -> Iterator[Metric]:
    labels = ("adapter", "alias")
    states = {(state.name, state.alias): state for state in aliases}
    number = {key: state.version for key, state in states.items()}
    since = {key: state.since.timestamp() for key, state in states.items() if state.since}
    met = {key: int(not state.reasons) for key, state in states.items()}
    yield _gauge("alias_version", "Version that an alias points at", labels, number)
    yield _gauge("alias_moved_timestamp_seconds", "Time at which an alias moved to its version", labels, since)
    yield _gauge("alias_policy_met", "1 if the version of an alias meets its policy now, else 0", labels, met)


def _step_metrics(running: Sequence[RunState]) -> Iterator[Metric]:
    steps = {(run.run.name, step.name): step for run in running for step in run.steps if step.state == "running"}
    labels = ("pipeline", "step")
    done = {key: step.done for key, step in steps.items()}
    total = {key: step.total for key, step in steps.items()}
    yield _gauge("step_done", "Completed units of work of a running step", labels, done)
    yield _gauge("step_total", "All units of work of a running step; 0 if unknown", labels, total)
