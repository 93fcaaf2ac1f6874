"""Plans the rebuild of recorded steps: what is rebuilt, from what, and why it may differ or is impossible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from lora_engine.errors import BaseModelError, EngineError
from registry.entities import AdapterVersion, ArtifactRef, Execution
from registry.store.artifacts import Store
from tasks.digests import PathDigest, digest_path
from tasks.entries import changed_revisions, find_used
from tasks.operations.upstream import FILE, UpstreamSteps, find_unkept_fields
from tasks.spec import StepSpec
from tasks.step import STEPS

_BASE, _VAE = "base", "vae"
_MODEL_FIELDS = ("model", "base", "clip")
"""The settings, at any level, that name models."""


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
    if values.get(_VAE) is not None:
        values[_VAE] = _locate_vae(plan, name, step)
    models = step.settings.get("models", {})
    # A default that the settings do not name is recorded by its role.
    values = pin_models(values, models) | {role: model["name"] for role, model in models.items() if role in values}
    try:
        spec = kind.spec.model_validate(values | _placeholders(kind.spec, step) | dict.fromkeys(files, "."))
    except ValidationError as error:
        _warn_of_revision(plan, name, step, kind.revision)
        plan.reasons.append(f"the settings of step {name!r} are no longer valid ({error.errors()[0]['msg']})")
        return
    _warn_of_revision(plan, name, step, kind.revision_of(spec, digests))
    plan.warnings += [f"step {name!r}: {change}" for change in changed_revisions(find_used(spec, None), step.settings)]
    plan.reasons += _find_model_changes(name, step, spec)
    plan.steps.append(RebuildStep(name, step, spec, files))


def pin_models(settings: Any, models: Mapping[str, Mapping[str, str]]) -> Any:
    """Returns settings in which the names of models are those of the recorded ones: with revision, or as full paths.

    Args:
        settings: The recorded settings.
        models: Role -> the record of a model; see `StepKind.models`.
    """
    pinned = {
        model["name"]: model.get("path") or f"{model['name'].partition('@')[0]}@{model['revision']}"
        for model in models.values()
        if "path" in model or "revision" in model
    }
    if isinstance(settings, list | tuple):
        return [pin_models(value, models) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        key: pinned.get(value, value) if key in _MODEL_FIELDS and isinstance(value, str) else pin_models(value, models)
        for key, value in settings.items()
    }


def _find_model_changes(name: str, step: Execution, spec: StepSpec) -> Iterator[str]:
    find, recorded = STEPS[step.uses].models, step.settings.get("models", {})
    if find is None or not recorded:
        return
    try:
        from lora_engine.bases.source import resolve_base

        base = getattr(spec, _BASE, None)
        current = find(spec, Path(), resolve_base(base) if base else None)
    except EngineError as error:
        yield f"a model of step {name!r} is missing ({error.problem})"
        return
    for role, model in recorded.items():
        if current.get(role, {}).get("fingerprint") != model["fingerprint"]:
            yield f"the {role} {model['label']!r} with fingerprint {model['fingerprint'][:16]} of step {name!r} changed"


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


def _locate_vae(plan: RebuildPlan, name: str, step: Execution) -> str:
    """Returns the autoencoder with the recorded fingerprint; adds a reason to the plan if there is none."""
    from lora_engine.bases.vae import resolve_vae

    recorded, written = step.settings.get("base", {}), str(step.settings["settings"][_VAE])
    for candidate in dict.fromkeys((recorded.get("vae_path"), recorded.get("vae"), written)):
        with suppress(BaseModelError):
            if candidate and resolve_vae(candidate).fingerprint() == recorded.get("vae_fingerprint"):
                return str(candidate)
    expected = str(recorded.get("vae_fingerprint"))[:16]
    plan.reasons.append(f"the autoencoder {written!r} with fingerprint {expected} of step {name!r} is missing")
    return written
