"""Lets trainings of registered adapters start from the version in production (`retraining: {start: warm}`).

What a training starts from is part of its cache key. So a promotion alone must not cause a training: as long as nothing
else changed since the last run, the steps keep what that run started from.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

from pydantic import ValidationError

from flows.plan import plan_pipeline
from flows.spec import PipelineSpec
from registry import queries
from registry.entities import AdapterVersion
from registry.errors import GoneVersion, Refused, UnknownName, UnknownVersion
from registry.home import Home
from registry.lineage.record import Lineage
from registry.versions.versions import Versions
from tasks.job import Job
from tasks.steps.register import Register
from tasks.steps.train import Train

_log = logging.getLogger(__name__)


def warm_started(spec: PipelineSpec, home: Home) -> PipelineSpec:
    """Returns the pipeline whose trainings start as its `retraining` says.

    A training that sets `init` itself keeps it. Where the version in production does not suit a training, it starts
    from scratch, and the log says why.

    Args:
        spec: The pipeline.
        home: The home with all state.
    """
    if spec.retraining.start != "warm":
        return spec
    names = {
        step.adapter: str(step.name)
        for step in spec.steps.values()
        if isinstance(step, Register) and isinstance(spec.steps.get(step.adapter), Train)
    }
    trained = {step: name for step, name in names.items() if spec.steps[step].init is None}  # type: ignore[attr-defined]
    for step in names.keys() - trained.keys():
        _log.info("step %s: starts from its own init", step)
    with closing(Versions(home)) as versions:
        before = _with_inits(
            spec, {step: _last_init(versions.lineage, spec.name, step, name) for step, name in trained.items()}
        )
        plan = plan_pipeline(before, home)
        if all(planned.cached for planned in plan.steps):
            return before
        jobs = {planned.name: planned.job for planned in plan.steps}
        inits = {step: _production(versions, jobs[step], name, spec.retraining.alias) for step, name in trained.items()}
        return _with_inits(spec, inits)


def _last_init(lineage: Lineage, pipeline: str, step: str, name: str) -> str | None:
    """Returns the version that the last training of a step started from; None if it started from scratch."""
    last = lineage.last_execution(pipeline, step)
    ref = None if last is None else last.inputs.get("init")
    if ref is None:
        return None
    with lineage.database.read() as session:
        versions = queries.read_versions(session, name)
    return next((version.ref for version in versions if version.artifact.sha256 == ref.sha256), None)


def _production(versions: Versions, job: Job, name: str, alias: str) -> str | None:
    """Returns `name@version` of the version with the alias if a training can start from it."""
    step = job.name
    try:
        version = versions.use(name, alias)
        versions.require_active(version)
    except (UnknownName, UnknownVersion):
        _log.info("step %s: starts from scratch: there is no %s@%s", step, name, alias)
        return None
    except (GoneVersion, Refused) as error:
        _log.warning("step %s: starts from scratch: %s", step, error)
        return None
    obstacle = _find_mismatch(versions, version, job)
    if obstacle:
        _log.warning("step %s: starts from scratch: %s %s", step, version.ref, obstacle)
        return None
    _log.info("step %s: starts from %s, which is %s", step, version.ref, alias)
    return version.ref


def _find_mismatch(versions: Versions, version: AdapterVersion, job: Job) -> str:
    """Returns why a training cannot start from a version, by its recorded recipe; empty if it can."""
    makers = versions.lineage.executions(output=version.artifact.sha256)
    recorded = next((maker.settings for maker in makers if maker.uses == "train"), None)
    if recorded is None:
        return "was not trained by a step of this home"
    if (recorded.get("base") or {}).get("fingerprint") != (job.base or {}).get("fingerprint"):
        return "was trained on another base"
    settings, wanted = recorded.get("settings", {}), job.spec.own_settings()
    for key in ("kind", "targets", "method"):
        if _name_of(settings.get(key)) != _name_of(wanted.get(key)):
            return f"has {key} {settings.get(key)!r}, not {wanted.get(key)!r}"
    if (
        isinstance(settings.get("rank"), int)
        and isinstance(wanted.get("rank"), int)
        and settings["rank"] > wanted["rank"]
    ):
        return f"has rank {settings['rank']}, more than {wanted['rank']}"
    return ""


def _name_of(value: object) -> object:
    return value.get("name", value) if isinstance(value, Mapping) else value


def _with_inits(spec: PipelineSpec, inits: Mapping[str, str | None]) -> PipelineSpec:
    steps, source = dict(spec.steps), copy.deepcopy(dict(spec.source))
    for name, init in inits.items():
        if init is None:
            continue
        step = steps[name]
        try:
            steps[name] = type(step).model_validate(step.model_dump() | {"init": init})
        except ValidationError as error:
            _log.warning("step %s: starts from scratch: %s", name, error.errors()[0]["msg"])
            continue
        source["steps"][name]["init"] = init
    return replace(spec, steps=steps, source=source)
