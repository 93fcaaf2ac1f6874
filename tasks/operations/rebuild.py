"""Plans and executes the rebuild of recorded steps, in a separate workspace.

Does not read the user's folders or pipeline file, and writes nothing outside the workspace.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from lora_engine.compute import threads
from lora_engine.errors import BaseModelError
from registry.entities import AdapterVersion, ArtifactRef, Execution
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import Store, open_store
from tasks.digests import PathDigest, digest_path
from tasks.entries import changed_revisions, find_used
from tasks.execution import execute
from tasks.job import Job, prepare_job
from tasks.operations.upstream import FILE, UpstreamSteps, find_unkept_fields
from tasks.spec import StepSpec
from tasks.step import STEPS

_BASE = "base"


@dataclass(frozen=True)
class RebuildStep:
    """One step to rebuild.

    Args:
        name: The step's name.
        recorded: The recorded execution.
        spec: Its settings, with placeholders for its inputs and files.
        files: Path field -> path or kept artifact of the user's file or folder.
    """

    name: str
    recorded: Execution
    spec: StepSpec
    files: Mapping[str, Path | ArtifactRef]


@dataclass
class RebuildPlan:
    """The plan of a rebuild.

    Args:
        steps: The steps to rebuild, each after its upstream steps.
        reused: Digest -> artifact that is reused from the store, and why.
        skipped: Step -> why it is not rebuilt.
        reasons: Why the rebuild is impossible; empty if it is possible.
        warnings: Why the result may differ.
    """

    steps: list[RebuildStep] = field(default_factory=list)
    reused: dict[str, tuple[ArtifactRef, str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def plan_rebuild(
    upstream: UpstreamSteps, store: Store, version: AdapterVersion, *, given: Mapping[str, Path], base: str | None
) -> RebuildPlan:
    """Plans the rebuild of a version; verifies the artifacts to reuse, changes nothing.

    Args:
        upstream: The steps that made the version.
        store: The user's store.
        version: The version; its evaluation is skipped if the user's files for it were not kept.
        given: `step.field` -> file or folder of the user that a step read; must have the recorded content.
        base: The base; None uses the recorded base.
    """
    plan = RebuildPlan(reused=dict(upstream.sources), reasons=list(upstream.missing))
    for name, step in upstream.steps.items():
        unkept = [role for role in find_unkept_fields(step) if f"{name}.{role}" not in given]
        if unkept and not step.inputs and step.output is not None:
            plan.reused[step.output.sha256] = (step.output, f"{step.uses} read files of the user")
        elif unkept and step.output == version.report:
            plan.skipped[name] = f"the user's {' and '.join(unkept)} were not kept"
        elif unkept:
            plan.reasons += [f"step {name!r} read a {role} of the user, which was not kept" for role in unkept]
        elif step.uses not in STEPS:
            plan.reasons.append(f"step {name!r} is of kind {step.uses!r}, which this release does not have")
        else:
            _add_step(plan, name, step, given, base, version.card.get("base_fingerprint"))
    inputs = {ref.sha256 for step in plan.steps for ref in step.recorded.inputs.values()}
    plan.reused = {digest: entry for digest, entry in plan.reused.items() if digest in inputs}
    for ref, _ in plan.reused.values():
        plan.reasons += [f"{problem.where}: {problem.what}" for problem in store.verify(ref)]
    return plan


def _add_step(
    plan: RebuildPlan,
    name: str,
    step: Execution,
    given: Mapping[str, Path],
    base: str | None,
    fingerprint: str | None,
) -> None:
    kind = STEPS[step.uses]
    digests: dict[str, PathDigest] = {}
    files: dict[str, Path | ArtifactRef] = {role: ref for role, ref in step.inputs.items() if ref.kind == FILE}
    for role in find_unkept_fields(step):
        path = given[f"{name}.{role}"]
        if path.exists():
            digests[role] = digest_path(path)
        if role not in digests or digests[role].sha256 != step.settings["files"][role]:
            plan.reasons.append(f"{path} differs from the files that step {name!r} read as {role}")
        files[role] = path.resolve()
    values = dict(step.settings.get("settings", {}))
    if values.get(_BASE) is not None:
        values[_BASE] = _locate_base(plan, name, step, base, fingerprint)
    values |= {setting: model["name"] for setting, model in step.settings.get("models", {}).items()}
    try:
        spec = kind.spec.model_validate(values | _placeholders(kind.spec, step) | dict.fromkeys(files, "."))
    except ValidationError as error:
        _warn_of_revision(plan, name, step, kind.revision)
        plan.reasons.append(f"the settings of step {name!r} are no longer valid ({error.errors()[0]['msg']})")
        return
    _warn_of_revision(plan, name, step, kind.revision_of(spec, digests))
    plan.warnings += [f"step {name!r}: {change}" for change in changed_revisions(find_used(spec, None), step.settings)]
    plan.steps.append(RebuildStep(name, step, spec, files))


def _warn_of_revision(plan: RebuildPlan, name: str, step: Execution, revision: int) -> None:
    if step.revision != str(revision):
        plan.warnings.append(f"step {name!r} ran as revision {step.revision} of {step.uses}; it is {revision} now")


def _placeholders(spec: type[StepSpec], step: Execution) -> dict[str, Any]:
    """Returns placeholders for the references of a step, one per recorded input."""
    values: dict[str, Any] = {}
    for role, ref in step.inputs.items():
        name = role.partition(".")[0]
        if ref.kind == FILE or name in step.settings.get("settings", {}):  # which are the references as written
            continue
        if get_origin(spec.model_fields[name].annotation) is tuple:
            values[name] = (*values.get(name, ()), "recorded")
        else:
            values[name] = "recorded"
    return values


def _locate_base(plan: RebuildPlan, name: str, step: Execution, base: str | None, fingerprint: str | None) -> str:
    """Returns the base with the recorded fingerprint; adds a reason or a warning to the plan if there is none."""
    from lora_engine.bases.source import resolve_base

    recorded = step.settings.get("base", {})
    expected, written = recorded.get("fingerprint", fingerprint), str(step.settings["settings"][_BASE])
    misses: list[str] = []
    for candidate in dict.fromkeys([base] if base else [recorded.get("path"), recorded.get("label"), written]):
        if candidate is None:
            continue
        try:
            actual = resolve_base(candidate).fingerprint()
        except BaseModelError as error:
            misses.append(f"{candidate}: {error.problem}")
            continue
        if expected is None or actual == expected:
            return str(candidate)
        misses.append(f"{candidate} has fingerprint {actual[:16]}")
    label = recorded.get("label", written)
    reason = (
        f"the base {label!r} with fingerprint {str(expected)[:16]} of step {name!r} is missing ({'; '.join(misses)})"
    )
    if base and any("has fingerprint" in miss for miss in misses):
        plan.warnings.append(reason)
        return base
    plan.reasons.append(f"{reason}; give it with --base")
    return written


def rebuild(plan: RebuildPlan, store: Store, home: Home, run: tuple[str, Mapping[str, Any]]) -> dict[str, Execution]:
    """Executes the steps of a plan in the workspace; returns the executions by step.

    Args:
        plan: The plan.
        store: The user's store; reused artifacts are copied from it, verified.
        home: The workspace.
        run: Name and spec of the run, for the workspace's lineage.

    Raises:
        EngineError, RegistryError, OSError: The error of a step.
    """
    target, lineage = open_store(home), Lineage(home.lineage_url)
    try:
        for ref, _ in plan.reused.values():
            _copy(ref, store, target, home)
        run_id = lineage.start_run(*run).id
        rebuilt: dict[str, ArtifactRef] = {}
        for step in plan.steps:
            inputs: dict[str, tuple[ArtifactRef, ...]] = {}
            for role, ref in step.recorded.inputs.items():
                if ref.kind != FILE:
                    name = role.partition(".")[0]
                    inputs[name] = (*inputs.get(name, ()), rebuilt.get(ref.sha256, ref))
            with threads(recorded_threads(step.recorded)):
                outcome = execute(_job(step, target, home), inputs, home, run_id, live=False)
            if step.recorded.output is not None:
                rebuilt[step.recorded.output.sha256] = outcome.ref
        lineage.finish_run(run_id, "COMPLETED")
        return {execution.step: execution for execution in lineage.executions(run_id)}
    finally:
        lineage.close()


def recorded_threads(step: Execution) -> int | None:
    """Returns the number of threads that a step computed with; None if it is unknown."""
    count = str(step.environment.get("compute", {}).get("threads") or step.environment.get("threads") or "")
    return int(count) if count.isdecimal() and int(count) else None


def _copy(ref: ArtifactRef, source: Store, target: Store, home: Home) -> None:
    with tempfile.TemporaryDirectory(dir=home.work) as name:
        folder = Path(name) / "artifact"
        source.checkout(ref, folder)
        target.put(ref.kind, folder)


def _job(step: RebuildStep, store: Store, home: Home) -> Job:
    folder = home.path / "files" / step.name
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, str] = {}
    for role, source in step.files.items():
        if isinstance(source, ArtifactRef):
            (name,) = store.files(source)
            store.checkout_file(source, name, folder / name)
            paths[role] = name
        else:
            paths[role] = str(source)
    job = prepare_job(step.name, step.spec.model_copy(update=paths), folder)
    # Exclude what was excluded then, whatever is revoked now.
    recorded = step.recorded.settings
    return replace(job, excluded=tuple(recorded.get("excluded", ())), absent=recorded.get("absent", {}))
