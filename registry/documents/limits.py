"""Derives the known limits of a version from its metrics and its datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from registry.documents.facts import Facts
from registry.policy.license_terms import forbidden_uses


def limits(facts: Facts) -> Iterator[str]:
    """Yields one sentence per limit, the most important first."""
    version = facts.version
    if version.passed is None:
        yield "It was never evaluated: nothing is known of what it does."
    elif version.passed is False:
        yield "It failed its evaluation; see the gates."
    elif not version.gates:
        yield "No gate was set: its metrics were measured, but no gate checked them."
    if version.metrics:
        yield from _measured(facts)
    trained = sum(dataset.train for dataset in facts.datasets if dataset.role == "dataset")
    if trained:
        images = f"{trained} image{'s' * (trained != 1)}"
        yield f"It was trained on {images} of its concept, and reproduces what they have in common."
    elif facts.parents:
        yield "It was merged, not trained: the concepts of its parents may interfere."
    uncovered = sum(dataset.count - sum(dataset.consents.values()) for dataset in facts.datasets)
    if uncovered:
        yield f"No consent is recorded for {uncovered} of its images."
    if facts.base:
        yield f"It was made for the base {facts.base}; on other bases of its family its effect was not measured."
    if uses := forbidden_uses(facts.terms):
        yield f"Not allowed: {'; '.join(uses)}."
    if facts.license is None:
        yield "Its license is unknown: do not publish or sell what it makes before that is settled."


def _measured(facts: Facts) -> Iterator[str]:
    metrics = {name: metric for name, metric in facts.version.metrics.items() if isinstance(metric, Mapping)}
    counts = sorted({metric["n"] for metric in metrics.values() if isinstance(metric.get("n"), int)})
    if counts:
        shown = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        splits = {"heldout": " that were held out", "training": " that it was trained on"}
        split = splits.get(str(facts.report.get("measured_on")), "")
        source = f", with images{split}" if split else ""
        yield f"Its metrics are based on {shown} comparisons each{source}; see the intervals."
    few = [name for name, metric in metrics.items() if metric.get("verdict") == "too few"]
    if few:
        yield f"Too few independent groups for a verdict in: {', '.join(few)}."
    unclear = [name for name, metric in metrics.items() if metric.get("verdict") == "unclear"]
    if unclear:
        yield f"No clear difference from the base in: {', '.join(unclear)}."
