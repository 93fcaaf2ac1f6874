"""What a version is not known to do: sentences that follow from its figures and its data, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from registry.documents.facts import Facts


def limits(facts: Facts) -> Iterator[str]:
    """One sentence a limit, in the order of their weight."""
    version = facts.version
    if version.passed is None:
        yield "It was never evaluated: nothing is known of what it does."
    elif version.passed is False:
        yield "It failed its evaluation; see the gates."
    elif not version.gates:
        yield "No gate was set: its figures were measured, but nothing was decided by them."
    if version.metrics:
        yield from _measured(facts)
    trained = sum(dataset.train for dataset in facts.datasets if dataset.role == "dataset")
    if trained:
        yield f"It has seen {trained} picture{'s' * (trained != 1)} of its concept, and draws what they have in common."
    elif facts.parents:
        yield "It was merged, not trained: what its parents have learned may get in each other's way."
    uncovered = sum(dataset.count - sum(dataset.consents.values()) for dataset in facts.datasets)
    if uncovered:
        yield f"No consent is recorded for {uncovered} of its pictures."
    if facts.base:
        yield f"It was made for the base {facts.base}; on other bases of its family its effect was not measured."
    if facts.terms.name is None:
        yield "Its licence is unknown: do not publish or sell what it makes before that is settled."


def _measured(facts: Facts) -> Iterator[str]:
    metrics = {name: metric for name, metric in facts.version.metrics.items() if isinstance(metric, Mapping)}
    counts = sorted({metric["n"] for metric in metrics.values() if isinstance(metric.get("n"), int)})
    if counts:
        shown = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        where = {"heldout": " that were kept from training", "train": " that it was trained on"}
        on = where.get(str(facts.report.get("measured_on")), "")
        yield f"Its figures rest on {shown} comparisons each{', with pictures' + on if on else ''}; mind the intervals."
    unclear = [name for name, metric in metrics.items() if metric.get("verdict") == "unclear"]
    if unclear:
        yield f"No clear difference from the base in: {', '.join(unclear)}."
