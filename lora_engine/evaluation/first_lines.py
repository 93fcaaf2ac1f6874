"""Writes the first lines of a report: what the adapter does, everything that got worse, and how far to believe it.

Reads reports of format 1 and 2. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_engine.evaluation.chosen import Chosen
from lora_engine.evaluation.evidence import COVERAGE_GROUPS, LEAST_ANSWERED, MIN_GROUPS
from lora_engine.evaluation.metrics import METRICS

_MOST_NAMED = 5


def write_headline(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields the sentences at the top: first every metric that is worse, then the headlines of the metrics."""
    metrics = report.get("metrics", {})
    for other, values in {"base": metrics, **report.get("comparisons", {})}.items():
        worse = [_describe_change(name, values[name], other) for name in _known(values) if _is_worse(values[name])]
        if worse:
            yield f"Worse than {'the base' if other == 'base' else other}: {', '.join(worse)}."
    for name in _known(metrics):
        entry, values = METRICS[name], metrics[name]
        if entry.headline:
            verdicts = dict(zip(("better", "worse", "unclear"), entry.verdicts, strict=True))
            verdict = verdicts.get(values["verdict"], verdicts["unclear"])
            yield entry.headline.format(verdict=verdict, adapter=values["adapter"], base=values["base"])


def write_notices(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields what limits the report: missing embedders, few groups, left-out images, a chosen checkpoint."""
    missing = report.get("missing_embedders", {})
    if report.get("format", 1) >= 2 and report.get("embedder") is None:
        reason = f" ({missing['embedder']})" if "embedder" in missing else ""
        yield f"Likeness and agreement were not measured: there is no embedder of images and texts{reason}."
    counts = {
        values["n"]
        for name, values in report.get("metrics", {}).items()
        if isinstance(values.get("n"), int) and not (name in METRICS and METRICS[name].of_whole_sets)
    }
    if report.get("format", 1) >= 2 and counts and min(counts) < MIN_GROUPS:
        yield (
            f"With fewer than {MIN_GROUPS} independent groups a metric has no interval and no verdict, because chance "
            "can explain any difference. "
            + ("One pair says nothing about chance. " if min(counts) == 1 else "")
            + "Hold out more "
            "images, or give more prompts."
        )
    if chosen := report.get("chosen"):
        yield f"The checkpoint of step {chosen['step']} was {Chosen.model_validate(chosen).describe()}."
    if left_out := report.get("left_out", []):
        named = [f"{item['source']} ({item['reason']})" for item in left_out]
        yield f"{len(left_out)} held-out images were left out: {_shorten(named)}."
    if truncated := report.get("truncated", []):
        yield f"{len(truncated)} prompts are longer than the embedder reads; agreement is measured on their beginning."
    if unreadable := report.get("unreadable", []):
        yield (
            f"{len(unreadable)} prompts have letters of another script than Latin, which a CLIP has hardly seen; their "
            "agreement says little."
        )
    for name, share in report.get("judge", {}).get("answered", {}).items():
        if share < LEAST_ANSWERED:
            yield f"The judge hardly answers the question of {name}: its answers have {share:.0%} of the probability."
    for role, reason in report.get("absent", {}).items():
        yield f"Not compared with {role}: {reason}."
    for reason in report.get("skipped_gates", []):
        yield f"Not applicable, as it declares: {reason}."


def states_coverage(report: Mapping[str, Any]) -> bool:
    """Returns True if every interval has enough groups for the sentence about its coverage."""
    counts = [values.get("n", 0) for values in report.get("metrics", {}).values() if values.get("interval")]
    return bool(counts) and min(counts) >= COVERAGE_GROUPS


def _known(metrics: Mapping[str, Any]) -> list[str]:
    return [name for name in METRICS if name in metrics]


def _is_worse(values: Mapping[str, Any]) -> bool:
    return bool(values.get("verdict") == "worse")


def _describe_change(name: str, values: Mapping[str, Any], other: str) -> str:
    before = values["base" if other == "base" else "other"]
    title = METRICS[name].title
    return f"{title[0].lower()}{title[1:]} ({values['adapter']:.3f} instead of {before:.3f})"


def _shorten(texts: list[str]) -> str:
    more = len(texts) - _MOST_NAMED
    return ", ".join(texts[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
