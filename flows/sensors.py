"""Defines the sensors: flows that start a retraining when files, a base on the hub, or consents changed.

Deployed by `prefect.yaml` with short schedules. A sensor compares a digest with the one in the home. It starts the run
first, with an idempotency key, and saves the digest then: a change is neither lost nor reported twice if the sensor is
killed in between. Imported by workers and tests only, because it imports Prefect.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow

from flows.prefect import logs_of_flow_run, to_prefect
from flows.result import FinalState
from flows.retrain_deployments import RetrainDeployment, find_pipelines, start_run, was_cancelled
from flows.spec import PipelineSpec
from lora_engine.files import atomic_write, canonical_json, sha256_bytes
from registry.entities import now
from registry.home import Home
from registry.store.redaction import SecretFreeErrors
from tasks.errors import PipelineFailed

_log = logging.getLogger("flows.sensors")  # a worker loads this file under another module name
_MAX_DAYS = 3650


@dataclass(frozen=True)
class Observation:
    """What a sensor saw for a deployment.

    Args:
        digest: Digest of the observed values; a change starts a run.
        note: What it saw, for the state's message.
    """

    digest: str
    note: str


@flow(name="watch-files", validate_parameters=False)
def watch_files(home: str = ".loraline", deployments: Sequence[str] = (), urls: Sequence[str] = ()) -> Any:
    """Retrains when a file that a pipeline reads changed: images, masks, captions, prompts, consents, weights.

    Names, sizes and times of the files are compared, not their content.

    Args:
        home: Path of the home.
        deployments: Names such as `retrain/nightly`; empty means all of the flow `retrain`.
        urls: More folders or buckets to watch, such as `s3://bucket/images`, for the named deployments.
    """
    return _sense("files", home, deployments, lambda found: _list_inputs(found, urls))


@flow(name="watch-base", validate_parameters=False)
def watch_base(home: str = ".loraline", deployments: Sequence[str] = (), timeout: float = 20.0) -> Any:
    """Retrains when the base of a pipeline has a new revision on the Hugging Face hub; ends as `Offline` without it.

    Args:
        home: Path of the home.
        deployments: Names such as `retrain/nightly`; empty means all of the flow `retrain`.
        timeout: Limit of each request in seconds.
    """
    return _sense("base", home, deployments, lambda found: _read_revisions(found, timeout))


@flow(name="watch-consent", validate_parameters=False)
def watch_consent(home: str = ".loraline", deployments: Sequence[str] = (), days: int = 30) -> Any:
    """Retrains when consents were added, withdrawn or expired; names those that expire soon.

    Args:
        home: Path of the home.
        deployments: Names such as `retrain/nightly`; empty means all of the flow `retrain`.
        days: Days before a consent expires to name it, 0 to 3650.
    """
    within = timedelta(days=min(max(days, 0), _MAX_DAYS))
    return _sense("consent", home, deployments, lambda found: _read_consents(found, now().date(), within))


def _sense(
    sensor: str, home: str, deployments: Sequence[str], observe: Callable[[RetrainDeployment], Observation | None]
) -> Any:
    opened = Home.open(Path(home))
    with SecretFreeErrors(), logs_of_flow_run(), opened.lock(f"sensor-{sensor}"):
        notes, triggered, offline = [], [], []
        for found in find_pipelines(deployments):
            try:
                observation = observe(found)
            except ConnectionError as error:
                offline.append(f"{found.deployment}: {error}")
                continue
            if observation is None:
                continue
            if observation.note:
                notes.append(f"{found.deployment}: {observation.note}")
            if _trigger(sensor, opened, found, observation.digest):
                triggered.append(found.deployment)
    if offline:
        return to_prefect(FinalState("Offline", "; ".join(offline), failed=True))
    if triggered:
        return to_prefect(FinalState("Triggered", "; ".join([f"started {', '.join(triggered)}", *notes])))
    return to_prefect(FinalState("NothingChanged", "; ".join(notes)))


def _trigger(sensor: str, home: Home, found: RetrainDeployment, digest: str) -> bool:
    """Starts a run if the digest differs from the saved one, or if the last run was cancelled before it started.

    The number in the key makes a return to an earlier state a change of its own.
    """
    path = home.path / "sensors" / f"{sensor}-{found.id}.json"
    saved = json.loads(path.read_bytes()) if path.exists() else None
    if saved is None:
        _save_state(path, digest, 0, None)
        return False
    number, run = int(saved["number"]), saved["run"]
    if saved["digest"] == digest and (run is None or not was_cancelled(UUID(run))):
        return False
    key = f"loraline-{sensor}-{found.id}-{number + 1}-{digest[:32]}"
    identity, _ = start_run(found.deployment, key)
    _save_state(path, digest, number + 1, str(identity))
    return True


def _save_state(path: Path, digest: str, number: int, run: str | None) -> None:
    atomic_write(path, canonical_json({"digest": digest, "number": number, "run": run}))


def _list_inputs(found: RetrainDeployment, urls: Sequence[str]) -> Observation:
    listing = [entry for pipeline in found.pipelines for path in _inputs_of(pipeline) for entry in _list_path(path)]
    listing += [entry for url in urls for entry in _list_url(url)]
    return Observation(sha256_bytes(canonical_json(sorted(listing))), "")


def _inputs_of(pipeline: PipelineSpec) -> Iterator[Path]:
    for step in pipeline.steps.values():
        for _, written, _ in step.externals():
            yield pipeline.folder / written


def _list_path(path: Path) -> Iterator[list[Any]]:
    """Yields name, size and time of a file, or of each file below a folder; nothing for a missing one."""
    if path.is_file():
        yield _describe_file(path)
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            if not file.is_symlink() and file.is_file():
                yield _describe_file(file)


def _describe_file(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def _list_url(url: str) -> list[list[Any]]:
    from tasks.operations.watched_folder import list_folder

    return list_folder(url)


def _read_revisions(found: RetrainDeployment, timeout: float) -> Observation | None:
    bases = sorted({pipeline.base for pipeline in found.pipelines})
    revisions = {base: revision for base in bases if (revision := _revision_of(base, timeout))}
    if not revisions:
        return None
    note = ", ".join(f"{base} is at {revision[:12]}" for base, revision in revisions.items())
    return Observation(sha256_bytes(canonical_json(revisions)), note)


def _revision_of(base: str, timeout: float) -> str | None:
    """Returns the commit of a base on the hub; None if it is no repository of the hub, or pinned to a commit.

    Raises:
        ConnectionError: The hub cannot be reached, or `HF_HUB_OFFLINE` is set.
    """
    from tasks.operations.watched_base import read_revision

    return read_revision(base, timeout)


def _read_consents(found: RetrainDeployment, today: date, within: timedelta) -> Observation | None:
    from lora_engine.data.consent import read_consent
    from lora_engine.errors import DataError

    tables = sorted(
        pipeline.folder / written
        for pipeline in found.pipelines
        for step in pipeline.steps.values()
        for field, written, _ in step.externals()
        if field == "consent"
    )
    statements, soon = [], []
    for table in tables:
        try:
            stated = read_consent(table)
        except DataError as error:
            raise PipelineFailed(error.problem, where=error.where, remedy=error.remedy) from error
        for name, statement in stated.items():
            expires = statement.rights.expires if statement.rights is not None else None
            rights = statement.rights.model_dump(mode="json") if statement.rights is not None else {}
            expired = expires is not None and expires < today
            statements.append([str(table), name, statement.consent or "", expired, rights])
            if expires is not None and today <= expires <= today + within:
                soon.append(f"{name} on {expires}")
    note = f"{len(soon)} consents expire soon: {', '.join(sorted(soon)[:5])}" if soon else ""
    return Observation(sha256_bytes(canonical_json(statements)), note) if tables else None
