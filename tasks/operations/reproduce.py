"""`reproduce`: builds a version again from lineage alone, and says whether it is the same, and if not, what differs."""

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
from tasks.operations.rebuild import RebuildPlan, prepare, rebuild
from tasks.operations.reproduction_report import ReproductionReport, report_reproduction
from tasks.operations.upstream import Trace, read_version, trace
from tasks.operations.workspace import workspace


@dataclass(frozen=True)
class Recipe:
    """All that building a version again needs, found and verified.

    Args:
        version: The version.
        found: Where it comes from.
        plan: What is built again, and what is taken from the store.
        spec: The pipeline file of its run, as data.
    """

    version: AdapterVersion
    found: Trace
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
    """What has to be built for a version, and from what; nothing is built, and the home is only read.

    Args:
        home: Where the version is registered.
        ref: `name@version` or `name@alias`.
        base: Where the base is, if it is no longer where it was.
        given: `step.field` -> the user's file or folder that a step read, to begin there and not at its result.
        force: Whether to go on where another result is to be expected.

    Raises:
        NotReproducible: Not all that is needed is known and here; says all of it at once.
        RightsError: It was made from pictures that were revoked meanwhile.
        UnknownName: No such adapter.
        UnknownVersion: No such number or alias.
    """
    lineage = Lineage(home.lineage_url)
    try:
        version = read_version(lineage, ref)
        found = trace(lineage, version)
        spec = lineage.run(version.run_id).spec if version.run_id else {}
        made = {name: (step.output,) for name, step in found.steps.items() if step.output is not None}
        refuse_revoked(made, lineage, version.ref)
    finally:
        lineage.close()
    _refuse_foreign(version, found)
    plan = prepare(found, open_store(home), version, given=given or {}, base=base)
    unknown = [name for name in given or {} if name.partition(".")[0] not in found.steps]
    reasons = [*plan.reasons, *(f"{name!r} names none of the steps {', '.join(found.steps)}" for name in unknown)]
    if reasons:
        raise NotReproducible(version.ref, reasons)
    if plan.doubts and not force:
        raise NotReproducible(
            version.ref, plan.doubts, "use the release and the base that made it, or add --force-differences"
        )
    return Recipe(version, found, plan, spec)


def reproduce(home: Home, recipe: Recipe, *, keep: Path | None = None) -> ReproductionReport:
    """Builds a version again in a workspace of its own, and compares every step with what lineage says of it.

    The home is only read. Each step computes with the number of threads that it computed with.

    Args:
        home: Where the version is registered.
        recipe: What `find_recipe` found.
        keep: Where the workspace is to stay; None removes it.

    Raises:
        EngineError, RegistryError, OSError: What a step raised.
    """
    store = open_store(home)
    with workspace(keep) as place:
        made = rebuild(recipe.plan, store, place, (recipe.version.name, recipe.spec))
        told = report_reproduction(recipe.version, recipe.found, recipe.plan, made, (store, open_store(place)))
    return replace(told, workspace=keep)


def _refuse_foreign(version: AdapterVersion, found: Trace) -> None:
    if found.maker(version.artifact) is None and version.artifact.sha256 in found.taken:
        raise NotReproducible(
            version.ref,
            ["it was imported from a file, and how that file came to be is not known here"],
            "`loraline lineage` shows the file's digest; ask where it comes from",
        )
