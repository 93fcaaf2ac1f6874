"""Writes the file that Prefect deploys: one deployment of `retrain` per pipeline of a pipeline file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from flows.spec import PipelineSpec
from lora_engine.documents import read_document
from lora_engine.files import atomic_write
from tasks.errors import SpecError

ENTRYPOINT = "flows/retrain.py:retrain"
_HEAD = """\
# Deployments of scheduled retraining. `loraline deployments` wrote those with a tag `pipeline:FILE`; it replaces them
# when it runs again, and leaves others. Deploy: prefect --no-prompt deploy --all --prefect-file {name}
"""


@dataclass(frozen=True)
class DeploymentOptions:
    """Options of the deployments of a file.

    Attributes:
        cron: Cron expression; None deploys without a schedule.
        timezone: Name of the time zone of the cron expression.
        work_pool: Name of the work pool.
        home: Path of the home, as the workers see it.
        parameters: Values of the file's parameters.
        active: False deploys paused schedules.
    """

    cron: str | None = None
    timezone: str = "UTC"
    work_pool: str = "local"
    home: str = ".loraline"
    parameters: Mapping[str, str] = field(default_factory=dict)
    active: bool = True


def write_deployments(
    file: Path, pipelines: Sequence[PipelineSpec], output: Path, options: DeploymentOptions
) -> list[str]:
    """Writes or updates a Prefect file with one deployment per pipeline, named as the pipeline.

    Args:
        file: The pipeline file.
        pipelines: Its pipelines.
        output: The Prefect file. Other deployments in it stay; those of the same pipeline file are replaced.
        options: Options of all deployments.

    Returns:
        The names of the deployments.

    Raises:
        SpecError: The cron expression or the time zone is invalid, the output is no Prefect file, or it has a
            deployment of the same name from elsewhere.
    """
    import yaml

    check_schedule(options)
    document = read_document(output, SpecError, allowed="a Prefect file with deployments", optional=True)
    content: dict[str, Any] = {"name": "loraline", "pull": _pull(), **document.data}
    tag = f"pipeline:{file}"
    others = [entry for entry in content.get("deployments") or [] if tag not in (entry.get("tags") or [])]
    names = [pipeline.name for pipeline in pipelines]
    taken = sorted({str(entry.get("name")) for entry in others} & set(names))
    if taken:
        raise SpecError(
            f"the deployment {taken[0]!r} is in the file already, from elsewhere",
            where=str(output),
            remedy="rename the pipeline, remove that deployment, or choose another file with --output",
        )
    content["deployments"] = [*others, *(_deployment(file, tag, pipeline, options) for pipeline in pipelines)]
    text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True, width=120)
    atomic_write(output, (_HEAD.format(name=output) + text).encode())
    return names


def check_schedule(options: DeploymentOptions) -> None:
    """Raises SpecError if the cron expression or its time zone is invalid, as Prefect would when it deploys."""
    try:
        ZoneInfo(options.timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise SpecError(
            f"unknown time zone {options.timezone!r}", where="--timezone", allowed="a name such as Europe/Berlin"
        ) from None
    if options.cron is None:
        return
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=options.cron, timezone=options.timezone)
    except (ValidationError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise SpecError(
            f"{options.cron!r} is no cron expression: {reason}", where="--cron", allowed="five fields such as 0 3 * * *"
        ) from None


def _deployment(file: Path, tag: str, pipeline: PipelineSpec, options: DeploymentOptions) -> dict[str, Any]:
    parameters: dict[str, Any] = {"spec": str(file), "home": options.home, "pipeline": pipeline.name}
    if options.parameters:
        parameters["parameters"] = dict(options.parameters)
    schedule = {"cron": options.cron, "timezone": options.timezone, "active": options.active}
    return {
        "name": pipeline.name,
        "description": str(pipeline.source.get("description") or f"Retrains {pipeline.name} if something changed."),
        "entrypoint": ENTRYPOINT,
        "parameters": parameters,
        "schedules": [schedule] if options.cron is not None else [],
        "concurrency_limit": {"limit": 1, "collision_strategy": "CANCEL_NEW"},
        "tags": ["retrain", tag],
        "work_pool": {"name": options.work_pool, "job_variables": {"command": "python -m prefect.engine"}},
    }


def _pull() -> list[Any]:
    step = "prefect.deployments.steps.set_working_directory"
    return [{step: {"directory": "{{ $LORALINE_PROJECT }}"}}]
