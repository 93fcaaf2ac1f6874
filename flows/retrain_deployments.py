"""Finds the deployments of `retrain` on the Prefect server with their pipelines, and starts their runs once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from flows.spec import PipelineSpec, load_pipelines
from tasks.errors import SpecError

_log = logging.getLogger("flows.retrain_deployments")
_PAGE = 200


@dataclass(frozen=True)
class RetrainDeployment:
    """A deployment of `retrain`.

    Args:
        deployment: Its name, `retrain/nightly`.
        id: Its id.
        path: The pipeline file.
        pipelines: The pipelines that it runs.
    """

    deployment: str
    id: UUID
    path: Path
    pipelines: tuple[PipelineSpec, ...]

    @property
    def names(self) -> frozenset[str]:
        """Returns the names of the adapters that its pipelines register."""
        steps = [step for pipeline in self.pipelines for step in pipeline.steps.values()]
        return frozenset(step.name for step in steps if step.uses == "register")  # type: ignore[attr-defined]


def find_pipelines(deployments: Sequence[str] = ()) -> list[RetrainDeployment]:
    """Returns the deployments of `retrain`, by name; warns about those whose pipeline file cannot be used.

    Args:
        deployments: Their names, such as `retrain/nightly`; empty means all.

    Raises:
        SpecError: There is no deployment of a name.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    found: dict[str, Any] = {}
    only = FlowFilter(name=FlowFilterName(any_=["retrain"]))
    with get_client(sync_client=True) as client:
        while page := client.read_deployments(flow_filter=only, limit=_PAGE, offset=len(found)):
            found |= {f"retrain/{entry.name}": entry for entry in page}
    missing = [name for name in deployments if name not in found]
    if missing:
        raise SpecError(
            f"no deployment {missing[0]!r}", allowed=", ".join(sorted(found)) or "none; run `prefect deploy`"
        )
    chosen = [(name, found[name]) for name in sorted(deployments or found)]
    return [known for name, entry in chosen if (known := _read_pipelines(name, entry)) is not None]


def _read_pipelines(name: str, entry: Any) -> RetrainDeployment | None:
    given = entry.parameters
    path = Path(str(given.get("spec", "")))
    names = [given["pipeline"]] if given.get("pipeline") else []
    try:
        parameters = given.get("parameters") or {}
        pipelines = load_pipelines(path, parameters=parameters, names=names, download=False)
        return RetrainDeployment(name, entry.id, path, pipelines)
    except SpecError as error:
        _log.warning("%s: %s", name, error)
        return None


def start_run(deployment: str, key: str) -> tuple[UUID, str]:
    """Creates a run of a deployment, or returns the one that was created with the same key.

    Args:
        deployment: Its name.
        key: The idempotency key.

    Returns:
        The id of the flow run, and the type of its state.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        run = client.create_flow_run_from_deployment(found.id, idempotency_key=key)
    return run.id, run.state_type.value if run.state_type is not None else ""


def was_cancelled(run: UUID) -> bool:
    """Returns True if a flow run was cancelled, or deleted, before it ended: a concurrency limit may do that."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(run).state
        except ObjectNotFound:
            return True
    return state is not None and state.is_cancelled()
