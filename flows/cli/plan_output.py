"""Prints plans: what runs, what is cached and why, and the expected cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.cost import StepCost
    from flows.plan import Plan, PlannedStep

_MOST_NAMED = 5


def print_plan(plan: Plan) -> None:
    """Prints a row per step."""
    from flows.cli.output import print_table

    rows = []
    for step in plan.steps:
        action = ("adopted" if step.adoption else "cached") if step.cached else "skipped" if step.skipped else "run"
        reason = step.reason.removeprefix("cached").removeprefix("; ") if action == "cached" else step.reason
        rows.append((step.name, step.job.kind.name, action, reason))
    print_table(("step", "uses", "action", "reason"), rows)


def print_costs(costs: Mapping[str, StepCost | None]) -> None:
    """Prints the expected cost of each step and of all; nothing if no step runs."""
    from flows.cost import total_cost

    total, unknown = total_cost(costs)
    _print_costs("step", costs, total, unknown)


def print_costs_of_pipelines(costs: Mapping[str, Mapping[str, StepCost | None]]) -> None:
    """Prints the expected cost of each pipeline and of all, by the pipelines' names; leaves out those that are cached.

    The cost of a pipeline is unknown if that of one of its steps is.
    """
    from flows.cost import total_cost

    totals: dict[str, StepCost | None] = {}
    for name, steps in costs.items():
        total, unknown = total_cost(steps)
        if steps:
            totals[name] = None if unknown else total
    total, unknown = total_cost(
        {f"{name}.{step}": cost for name, steps in costs.items() for step, cost in steps.items()}
    )
    _print_costs("pipeline", totals, total, unknown)


def _print_costs(column: str, costs: Mapping[str, StepCost | None], total: StepCost, unknown: Sequence[str]) -> None:
    from flows.cli.output import print_table

    if not costs:
        return
    print("\nExpected cost, from earlier executions:")
    rows = [(name, *_cost_cells(cost)) for name, cost in costs.items()]
    missing = ", ".join(unknown) if len(unknown) <= _MOST_NAMED else f"{len(unknown)} steps"
    label = f"total without {missing}" if unknown else "total"
    print_table((column, "time", "GPU hours", "disk"), [*rows, (label, *_cost_cells(total))])


def _cost_cells(cost: StepCost | None) -> tuple[str, str, str]:
    if cost is None:
        return "unknown", "unknown", "unknown"
    minutes, seconds = divmod(round(cost.seconds), 60)
    time = f"{cost.seconds:.1f} s" if minutes == 0 else f"{minutes} min {seconds} s"
    return time, f"{cost.gpu_hours:.2f}", f"{cost.bytes / 1e6:.1f} MB"


def cost_to_json(step: PlannedStep, costs: Mapping[str, StepCost | None]) -> dict[str, Any]:
    """Returns the expected cost of a step; None if it does not run."""
    cost = costs.get(step.name)
    return {"cost": cost.to_json() if cost else "unknown" if step.runs else None}


def planned_to_json(step: PlannedStep) -> dict[str, Any]:
    """Returns a planned step as JSON."""
    return {
        "name": step.name,
        "uses": step.job.kind.name,
        "cached": step.cached,
        "skipped": step.skipped,
        "reason": step.reason,
        "ref": step.outcome.ref if step.outcome else None,
        "adoption": step.adoption.source.id if step.adoption else None,
    }
