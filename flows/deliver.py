"""Defines the flows `relay`, which sends the log to Prefect as events, and `deliver`, which delivers and recalls.

Deployed by `prefect.yaml`. Imported by workers and tests only, because it imports Prefect.
"""

from __future__ import annotations

import json
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.events import configured_server, relay_events
from flows.prefect import logs_of_flow_run, to_prefect
from flows.result import FinalState
from flows.retrain_deployments import find_pipelines, start_run
from lora_engine.files import atomic_write, canonical_json
from registry.home import Home
from registry.lineage.record import Lineage
from registry.outbox import events_after, last_event
from registry.store.redaction import SecretFreeErrors
from tasks.errors import DeliveryError
from tasks.operations.deliver import TargetReport, deliver_adapters
from tasks.operations.delivery_file import read_delivery

_log = logging.getLogger("flows.deliver")  # a worker loads this file under another module name
_BATCH = 500


@flow(name="relay", validate_parameters=False)
def relay(home: str = ".loraline", timeout: float = 30.0) -> Any:
    """Sends the events that verbs could not send.

    Args:
        home: Path of the home.
        timeout: Limit of each request in seconds.

    Ends as `Relayed` or `NothingChanged`.
    """
    with SecretFreeErrors(), logs_of_flow_run():
        sent = relay_events(Home.open(Path(home)), configured_server(), timeout=timeout)
    if not sent:
        return to_prefect(FinalState("NothingChanged", "Prefect has all events"))
    return to_prefect(FinalState("Relayed", ", ".join(f"{event.name}: {event.resource}" for event in sent[:20])))


@flow(name="deliver", validate_parameters=False)
def deliver(home: str = ".loraline", retries: int = 5, retry_delay: float = 30.0) -> Any:
    """Makes all targets of `delivery.yaml` hold the versions that their aliases point at.

    Args:
        home: Path of the home.
        retries: Attempts after the first one, for each target that fails.
        retry_delay: Seconds before the first retry; each further delay is twice as long.

    Ends as `Delivered`, `NothingChanged`, or `DeliveryFailed`, which names the targets. After a revocation it starts
    the retraining of the affected adapters, if `on_revocation` says so.
    """
    opened = Home.open(Path(home))
    with SecretFreeErrors(), logs_of_flow_run():
        settings = read_delivery(opened)
        delays = [retry_delay * 2**attempt for attempt in range(retries)]
        run = _deliver_target.with_options(retries=retries, retry_delay_seconds=delays)
        futures = [
            run.with_options(task_run_name=target.name).submit(opened, target.name) for target in settings.targets
        ]
        for future in futures:
            future.wait()
        states = [future.state for future in futures]
        changes = [change for state in states if state.is_completed() for change in state.result()]
        failed = [
            f"{target.name}: {state.message}"
            for target, state in zip(settings.targets, states, strict=True)
            if not state.is_completed()
        ]
        if settings.on_revocation == "retrain":
            changes += _retrain_revoked(opened)
    if failed:
        return to_prefect(FinalState("DeliveryFailed", "; ".join(failed), failed=True))
    if changes:
        return to_prefect(FinalState("Delivered", "; ".join(changes)))
    return to_prefect(FinalState("NothingChanged", "every target holds what its alias points at"))


@task(name="deliver target", cache_policy=NO_CACHE, persist_result=False)
def _deliver_target(home: Home, target: str) -> list[str]:
    (report,) = deliver_adapters(home, target=target)
    if report.problems:
        raise DeliveryError("; ".join(report.problems), where=report.to)
    return _describe_changes(report)


def _describe_changes(report: TargetReport) -> list[str]:
    return [
        f"{change.action} {change.ref} at {report.target}" for change in report.changes if change.action != "refuse"
    ]


def _retrain_revoked(home: Home) -> list[str]:
    """Starts the retraining of each adapter that a revocation affected since the last delivery; returns what it did.

    The cursor is saved after the runs were created, and their idempotency keys name the event: none is lost or doubled.
    The first call only saves the cursor.
    """
    path = home.path / "relay" / "revocations.json"
    with closing(Lineage(home.lineage_url)) as lineage:
        if not path.exists():
            atomic_write(path, canonical_json(last_event(lineage)))
        number = int(json.loads(path.read_bytes()))
        affected: dict[str, int] = {}
        while events := events_after(lineage, number, _BATCH):
            number = events[-1].seq
            affected |= {
                event.name: event.details["revocation"]
                for event in events
                if event.action in {"flag", "withdraw"} and "revocation" in event.details
            }
    started = []
    if affected:
        for found in find_pipelines():
            for name in found.names & affected.keys():
                start_run(found.deployment, f"loraline-revocation-{affected[name]}-{name}")
                started.append(f"retrains {name} by {found.deployment}")
    atomic_write(path, canonical_json(number))
    return started
