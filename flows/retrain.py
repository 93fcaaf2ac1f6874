"""Defines the scheduled flow `retrain`: if anything changed since the last run, trains, compares and stages.

Deployed by `prefect.yaml`. Imported by workers and tests only, because it imports Prefect.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from flows.pipeline import run_pipeline
from flows.spec import load_spec
from registry.errors import UnknownName, UnknownVersion
from registry.home import Home
from registry.versions.versions import Versions
from tasks.operations.promote import find_version


@dataclass(frozen=True)
class Retraining:
    """Result of a scheduled run.

    Args:
        changed: Name of each step that ran -> why; empty if every step was cached.
        versions: `name@version` of each new version.
        staged: The new versions that got the requested alias.
        compared: Per version and metric: the value in production (None if there is none) and the new value.
    """

    changed: dict[str, str]
    versions: list[str]
    staged: list[str]
    compared: dict[str, dict[str, tuple[float | None, float]]]


@flow(name="retrain", validate_parameters=False)
def retrain(spec: str, home: str = ".loraline") -> dict[str, Any]:
    """Runs a pipeline if any of its inputs changed.

    Args:
        spec: Path of the pipeline file.
        home: Path of the home.

    Returns:
        A `Retraining` as a dict.
    """
    state = Home.open(Path(home))
    result = run_pipeline(load_spec(Path(spec)), state)
    new = {entry.version.ref: entry for name, entry in result.versions.items() if name in result.changed}
    staged = [ref for ref, entry in new.items() if entry.has_alias]
    compared = {ref: compare_metrics(Versions(state), ref, "production") for ref in new}
    return asdict(Retraining(dict(result.changed), list(new), staged, compared))


def compare_metrics(versions: Versions, ref: str, alias: str) -> dict[str, tuple[float | None, float]]:
    """Returns, per metric, the value of the version that the alias points at and that of this version."""
    new = find_version(versions, ref)
    try:
        old: Any = versions.show(new.name, alias).metrics
    except (UnknownName, UnknownVersion):
        old = {}
    return {name: (old.get(name, {}).get("adapter"), metric["adapter"]) for name, metric in new.metrics.items()}
