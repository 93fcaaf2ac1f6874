"""Measures evidence: the metrics with intervals, verdicts and the values of every group. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_engine.evaluation.evidence import BASE, CANDIDATE, Evidence, Measured
from lora_engine.evaluation.metrics import METRICS
from lora_engine.evaluation.plan import derive_evaluation_seed
from lora_engine.evaluation.statistics import (
    Comparison,
    MetricVerdict,
    average_groups,
    compare,
    decide_verdicts,
    estimate,
)


@dataclass(frozen=True)
class Measurements:
    """All metrics, as stored in `report.json`.

    Attributes:
        metrics: Metric -> the candidate against the base; `embedders` are the digests that its values depend on.
        comparisons: Role -> metric -> the candidate against that version.
        units: Metric -> the values of every group and model.
    """

    metrics: Mapping[str, dict[str, Any]]
    comparisons: Mapping[str, Mapping[str, dict[str, Any]]]
    units: Mapping[str, dict[str, Any]]


def measure(evidence: Evidence, names: Iterable[str], seed: int) -> Measurements:
    """Measures the named metrics of `METRICS`.

    Args:
        evidence: The images and losses.
        names: The metrics; their needs are met.
        seed: Seed of the resampling.

    Raises:
        SettingsError: The function of a metric returned something else than a `Measured`.
    """
    measured: dict[str, Measured] = {}
    embedders: dict[str, list[str]] = {}
    for name in names:
        evidence.used_embedders.clear()
        measured[name] = _measure(name, evidence)
        embedders[name] = sorted(evidence.used_embedders)
    own = {name: _own_interval(name, item, seed) for name, item in measured.items()}
    compared = {role: _against(role, measured, own, seed) for role in evidence.roles if role != CANDIDATE}
    metrics = compared.pop(BASE)
    for name, used in embedders.items():
        metrics[name] |= {"embedders": used} if used else {}
    return Measurements(metrics, compared, {name: _units(item) for name, item in measured.items()})


def _measure(name: str, evidence: Evidence) -> Measured:
    measured = METRICS[name].measure(evidence)
    if not isinstance(measured, Measured):
        raise METRICS.misfit(
            name, f"returned a {type(measured).__name__}", "a lora_engine.evaluation.evidence.Measured"
        )
    if missing := sorted(set(evidence.roles) - measured.values.keys()):
        raise METRICS.misfit(name, f"has no values for {', '.join(missing)}", "values for every role of the evidence")
    return measured


def _against(
    role: str, measured: Mapping[str, Measured], own: Mapping[str, list[float] | None], seed: int
) -> dict[str, dict[str, Any]]:
    """Returns the candidate's metrics against one other model, with verdicts that are adjusted over all metrics."""
    # The names keep the seeds of the comparison with the base from those of other comparisons.
    comparisons = {
        name: compare(
            item.values[role],
            item.values[CANDIDATE],
            item.groups,
            seed=derive_evaluation_seed(seed, "bootstrap", name, *([] if role == BASE else [role])),
        )
        for name, item in measured.items()
    }
    distances = {name for name in measured if METRICS[name].is_distance} if role == BASE else set()
    verdicts, adjusted = decide_verdicts(
        {name: item for name, item in comparisons.items() if name not in distances},
        {name: METRICS[name].better for name in comparisons},
    )
    return {
        name: _entry(name, role, item, verdicts.get(name, "distance"), adjusted.get(name), own[name])
        for name, item in comparisons.items()
    }


def _entry(
    name: str, role: str, comparison: Comparison, verdict: MetricVerdict, p: float | None, own: list[float] | None
) -> dict[str, Any]:
    difference = comparison.difference
    entry = {
        "base" if role == BASE else "other": comparison.before,
        "adapter": comparison.after,
        "difference": difference.mean,
        "interval": list(difference.interval) if difference.interval else None,
        "n": difference.n,
        "better": METRICS[name].better,
        "verdict": verdict,
    }
    further = {"effect": difference.effect, "p": p, "adapter_interval": own}
    return entry | {key: value for key, value in further.items() if value is not None}


def _own_interval(name: str, measured: Measured, seed: int) -> list[float] | None:
    values = average_groups(measured.values[CANDIDATE], measured.groups)
    interval = estimate(values, seed=derive_evaluation_seed(seed, "bootstrap", name, CANDIDATE)).interval
    return list(interval) if interval else None


def _units(measured: Measured) -> dict[str, Any]:
    return {
        "groups": list(dict.fromkeys(measured.groups)),
        "values": {role: average_groups(values, measured.groups).tolist() for role, values in measured.values.items()},
    }
