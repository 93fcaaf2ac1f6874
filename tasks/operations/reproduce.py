"""Reproduces a version from lineage alone, and reports the differences of the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from registry.entities import AdapterVersion
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from tasks.errors import NotReproducible
from tasks.exclusion import refuse_revoked
from tasks.operations.rebuild import rebuild
from tasks.operations.rebuild_plan import RebuildPlan, plan_rebuild
from tasks.operations.reproduction_report import ReproductionReport, report_reproduction
from tasks.operations.upstream import UpstreamSteps, find_upstream_steps, resolve_version
from tasks.operations.workspace import workspace


@dataclass(frozen=True)
class Recipe:
    """Everything needed to rebuild a version, verified.

    Args:
        version: The version.
        upstream: The steps that made it.
        plan: The steps to rebuild, and the artifacts to reuse.
        spec: Data of the pipeline file of its run.
    """

    version: AdapterVersion
    upstream: UpstreamSteps
    plan: RebuildPlan
    spec: Mapping[str, Any]


def find_recipe(
    home: Home,
    ref: str,
    *,
    base: str | None = None,
    given: Mapping[str, Path] | None = None,
    force: bool = False,
) -> Recipe:
    """Plans the reproduction of a version; builds nothing and only reads the home.

    Args:
        home: The home with the version.
        ref: `name@version` or `name@alias`.
        base: The base, if it has moved; None uses the recorded base.
        given: `step.field` -> the user's file or folder that a step read; that step is rebuilt instead of reused.
        force: True continues even if a different result is expected.

    Raises:
        NotReproducible: Something needed is missing; has all reasons.
        RightsError: The version was made from images that were revoked since.
        UnknownName: The adapter does not exist.
        UnknownVersion: The version or alias does not exist.
    """
    lineage = Lineage(home.lineage_url)
    try:
        version = resolve_version(lineage, ref)
        upstream = find_upstream_steps(lineage, version)
        spec = lineage.run(version.run_id).spec if version.run_id else {}
        outputs = {name: (step.output,) for name, step in upstream.steps.items() if step.output is not None}
        refuse_revoked(outputs, lineage, version.ref)
    finally:
        lineage.close()
    _refuse_imported(version, upstream)
    plan = plan_rebuild(upstream, open_store(home), version, given=given or {}, base=base)
    unknown = [name for name in given or {} if name.partition(".")[0] not in upstream.steps]
    reasons = [*plan.reasons, *(f"{name!r} names none of the steps {', '.join(upstream.steps)}" for name in unknown)]
    if reasons:
        raise NotReproducible(version.ref, reasons)
    if plan.warnings and not force:
        raise NotReproducible(
            version.ref, plan.warnings, "use the release and the base that made it, or add --force-differences"
        )
    return Recipe(version, upstream, plan, spec)


def reproduce(home: Home, recipe: Recipe, *, keep: Path | None = None) -> ReproductionReport:
    """Rebuilds a version in a workspace, and compares every step with its recorded execution.

    Only reads the home. Each step computes with its recorded number of threads.

    Args:
        home: The home with the version.
        recipe: The result of `find_recipe`.
        keep: Folder of a workspace to keep; None means a temporary one.

    Raises:
        EngineError, RegistryError, OSError: The error of a step.
    """
    store = open_store(home)
    with workspace(keep) as temporary:
        executions = rebuild(recipe.plan, store, temporary, (recipe.version.name, recipe.spec))
        stores = store, open_store(temporary)
        report = report_reproduction(recipe.version, recipe.upstream, recipe.plan, executions, stores)
    return replace(report, workspace=keep)


def _refuse_imported(version: AdapterVersion, upstream: UpstreamSteps) -> None:
    if upstream.maker(version.artifact) is None and version.artifact.sha256 in upstream.sources:
        raise NotReproducible(
            version.ref,
            ["it was imported from a file whose origin is unknown"],
            "find the file's digest with `loraline lineage`, and ask its author for the recipe",
        )
