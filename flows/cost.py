"""Estimates what the steps of a plan cost: time, time on a GPU and bytes, from earlier executions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from flows.plan import Plan, PlannedStep
from registry.home import Home
from registry.lineage.durations import PastExecution, past_executions
from registry.lineage.record import Lineage


@dataclass(frozen=True)
class StepCost:
    """The expected cost of a step that would run.

    Attributes:
        seconds: Median time of earlier executions; of a training, in proportion to its steps and batch.
        gpu_hours: Hours of them on a GPU; 0 if the earlier executions used none.
        bytes: Median size of the output.
        executions: Number of executions that the estimate is made from.
    """

    seconds: float
    gpu_hours: float
    bytes: int
    executions: int

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return asdict(self)


def estimate_costs(plans: Iterable[Plan], home: Home) -> list[dict[str, StepCost | None]]:
    """Returns, for each plan, the cost of each step that would run; None without an earlier execution.

    Takes executions of the same kind of step in the same pipeline, else in any pipeline of the home.
    """
    plans = list(plans)
    uses = {step.job.kind.name for plan in plans for step in plan.steps if step.runs}
    if not uses:
        return [{} for _ in plans]
    by_kind: dict[tuple[str, str], list[PastExecution]] = {}
    with closing(Lineage(home.lineage_url)) as lineage:
        for past in past_executions(lineage, uses):
            for pipeline in (past.pipeline, ""):
                by_kind.setdefault((pipeline, past.uses), []).append(past)
    costs = []
    for plan in plans:
        running = [step for step in plan.steps if step.runs]
        costs.append({step.name: _estimate(step, plan.name, by_kind) for step in running})
    return costs


def total_cost(costs: Mapping[str, StepCost | None]) -> tuple[StepCost, list[str]]:
    """Returns the sum of the known costs, and the names of the steps whose cost is unknown."""
    known = [cost for cost in costs.values() if cost is not None]
    total = StepCost(
        sum(cost.seconds for cost in known),
        sum(cost.gpu_hours for cost in known),
        sum(cost.bytes for cost in known),
        sum(cost.executions for cost in known),
    )
    return total, [name for name, cost in costs.items() if cost is None]


def _estimate(
    step: PlannedStep, pipeline: str, by_kind: Mapping[tuple[str, str], Sequence[PastExecution]]
) -> StepCost | None:
    kind = step.job.kind.name
    past = by_kind.get((pipeline, kind)) or by_kind.get(("", kind))
    if not past:
        return None
    settings = step.job.spec.own_settings()
    seconds = median(execution.seconds * _ratio(settings, execution.settings) for execution in past)
    on_gpu = sum(execution.device.startswith("cuda") for execution in past) * 2 > len(past)
    size = int(median(execution.size for execution in past))
    return StepCost(seconds, seconds / 3600 if on_gpu else 0.0, size, len(past))


def _ratio(settings: Mapping[str, Any], earlier: Mapping[str, Any]) -> float:
    """Returns how many times as many samples a training draws as an earlier one; 1 if that is unknown."""
    now, before = _samples(settings), _samples(earlier)
    return now / before if now and before else 1.0


def _samples(settings: Mapping[str, Any]) -> int:
    steps, batch = settings.get("steps"), settings.get("batch")
    return steps * batch if isinstance(steps, int) and isinstance(batch, int) else 0
