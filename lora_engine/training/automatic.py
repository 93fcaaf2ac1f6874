"""Rules of the automatic settings: pure functions of losses and norms. Imports no torch.

Every rule returns the value and its evidence, which the record and the card of the training hold.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.choosing import RANK_PREFIXES, BestCheckpoint
from lora_engine.training.specs.schedules import Cosine

RATE_FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Rates that `learning_rate: auto` tries, as factors on the default."""
EPOCHS, LEAST_STEPS, MOST_STEPS = 200, 200, 20_000
"""Longest training of `steps: auto`."""
PROBE_SHARE, PROBE_SHARE_OF_LIMIT = 0.25, 0.1
"""Share of the steps of a short training; of the longest training with `steps: auto`."""
SMALLEST_SHARE = 0.01
"""Share of the largest block's product below which `targets: auto` drops a block."""
_Value = TypeVar("_Value", int, float)
_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?:\.[^.]+\.\d+)?(?=\.)")


def limit_steps(settings: TrainSettings, epoch: int) -> TrainSettings:
    """Returns the settings with a number of steps; `auto` is the longest training, which a choice ends early.

    Args:
        settings: The settings.
        epoch: Steps of an epoch.
    """
    if not settings.is_auto("steps"):
        return settings
    steps = min(max(EPOCHS * epoch, LEAST_STEPS), MOST_STEPS)
    choice = settings.best_checkpoint or BestCheckpoint()
    return settings.model_copy(update={"steps": steps, "best_checkpoint": choice})


def describe_cost(settings: TrainSettings) -> str:
    """Returns the work that automatic settings and a choice add to a training, for plans; empty for none."""
    parts = []
    if settings.is_auto("steps"):
        parts.append(f"at most {EPOCHS} epochs")
    elif settings.best_checkpoint is not None and settings.best_checkpoint.patience:
        parts.append(f"at most {settings.steps} steps")
    if settings.is_auto("learning_rate"):
        share = PROBE_SHARE_OF_LIMIT if settings.is_auto("steps") else PROBE_SHARE
        total = len(RATE_FACTORS) * share
        parts.append(f"{len(RATE_FACTORS)} short trainings for learning_rate, together {total:g} times the steps")
    if settings.is_auto("rank"):
        scored = ", of which each candidate is scored at all" if scores_prefixes(settings, settings.automatic) else ""
        parts.append(f"{len(RANK_PREFIXES)} ranks from the one training{scored}")
    if settings.is_auto("targets"):
        parts.append("one backward pass for targets")
    return "; ".join(parts)


def with_first_values(settings: TrainSettings, rate: float) -> TrainSettings:
    """Returns the settings with the values of the automatic ones that the probes start from.

    Args:
        settings: The settings; the steps are a number.
        rate: The default rate of the base.
    """
    values = {"targets": "all", "learning_rate": rate, "rank": RANK_PREFIXES[0]}
    changes = {name: value for name, value in values.items() if settings.is_auto(name)}
    return settings.model_copy(update=changes)


def probe_of(settings: TrainSettings, rate: float, share: float) -> TrainSettings:
    """Returns the settings of a short training whose rate falls to 0, which saves, draws and chooses nothing.

    Args:
        settings: The settings, with all lengths in steps.
        rate: The rate to try.
        share: Share of the steps.
    """
    steps = max(1, round(share * settings.steps))
    warmup: int | str = settings.warmup
    if isinstance(warmup, int):
        warmup = min(warmup, steps // 2)
    changes = {"learning_rate": rate, "steps": steps, "warmup": warmup, "schedule": Cosine(), "then": ()}
    nothing = {"best_checkpoint": None, "samples": None, "save_every": 0, "validate_every": 0}
    return settings.model_copy(update={**changes, **nothing})


def choose_rate(losses: Mapping[float, Sequence[float] | None]) -> tuple[float, dict[str, Any]]:
    """Returns the rate below the best one, because short trainings favor high rates.

    The best is the lowest rate whose loss is within one standard error of the lowest loss, by paired differences.

    Args:
        losses: Rate to the loss of each unit after a short training; None diverged.

    Returns:
        The rate and its evidence. Without any rate below the best, the best.
    """
    finite = {rate: list(values) for rate, values in sorted(losses.items()) if values is not None}
    if not finite:
        raise ValueError("every rate diverged")
    best = _first_within_error(finite)
    order = sorted(losses)
    chosen = order[max(0, order.index(best) - 1)]
    evidence = {
        "chosen": chosen,
        "best": best,
        "losses": [[rate, _mean(losses[rate])] for rate in order],
        "paired": _paired(finite, min(finite, key=lambda rate: statistics.fmean(finite[rate]))),
        "why": f"the one below {best:g}, which is the best after a short training"
        if chosen != best
        else f"{best:g} is the best after a short training, and the lowest that was tried",
    }
    return chosen, evidence


def prefixes_up_to(rank: int) -> list[int]:
    """Returns the ranks that `rank: auto` chooses from, up to a highest one."""
    return [prefix for prefix in RANK_PREFIXES if prefix <= rank]


def scores_prefixes(settings: TrainSettings, automatic: Sequence[str]) -> bool:
    """Returns True if a training scores candidates or short trainings at each of these ranks.

    Args:
        settings: The settings.
        automatic: Names of the settings that it chooses.
    """
    return "rank" in automatic and (
        settings.best_checkpoint is not None or not {"steps", "learning_rate"}.isdisjoint(automatic)
    )


def choose_rank(losses: Mapping[int, Sequence[float]]) -> tuple[int, dict[str, Any]]:
    """Returns the smallest rank whose loss is within one standard error of the lowest, by paired differences.

    Args:
        losses: Rank to the loss of each unit, all of one adapter.

    Returns:
        The rank and its evidence.
    """
    ordered = {rank: list(values) for rank, values in sorted(losses.items())}
    best = min(ordered, key=lambda rank: statistics.fmean(ordered[rank]))
    chosen = _first_within_error(ordered)
    evidence = {
        "chosen": chosen,
        "best": best,
        "losses": [[rank, statistics.fmean(values)] for rank, values in ordered.items()],
        "paired": _paired(ordered, best),
        "why": f"the smallest rank whose loss is within one standard error of that of rank {best}",
    }
    return chosen, evidence


def choose_blocks(products: Mapping[str, float]) -> tuple[list[str] | str, dict[str, Any]]:
    """Returns the layers of all blocks but those that hardly change the loss.

    Args:
        products: Layer to gradient norm x weight norm.

    Returns:
        The layers, or the preset `all` if no block is dropped; and the evidence.
    """
    blocks: dict[str, float] = {}
    for name, product in products.items():
        block = block_of(name)
        blocks[block] = blocks.get(block, 0.0) + product
    largest = max(blocks.values())
    dropped = {block for block, product in blocks.items() if product < SMALLEST_SHARE * largest}
    kept = [name for name in products if block_of(name) not in dropped]
    evidence = {
        "chosen": "all" if not dropped else f"{len(kept)} of {len(products)} layers",
        "blocks": [[block, product / largest, block not in dropped] for block, product in blocks.items()],
        "why": f"{len(dropped)} of {len(blocks)} blocks have less than {SMALLEST_SHARE:.0%} of the largest product of "
        "gradient norm and weight norm",
    }
    return (kept if dropped else "all"), evidence


def block_of(layer: str) -> str:
    """Returns the block of a layer: its name up to the first number, or two if one follows the other's name."""
    match = _BLOCK.match(layer)
    return match[0] if match else layer.rpartition(".")[0]


def _first_within_error(losses: Mapping[_Value, Sequence[float]]) -> _Value:
    """Returns the first value whose mean loss is within one paired standard error of the lowest."""
    best = min(losses, key=lambda value: statistics.fmean(losses[value]))
    return next(value for value, difference, error in _paired(losses, best) if difference <= error)


def _paired(losses: Mapping[_Value, Sequence[float]], best: _Value) -> list[tuple[_Value, float, float]]:
    """Returns each value with the mean of its paired differences from the best, and their standard error."""
    rows = []
    for value, units in losses.items():
        differences = [one - other for one, other in zip(units, losses[best], strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        rows.append((value, statistics.fmean(differences), error))
    return rows


def _mean(values: Sequence[float] | None) -> float | None:
    return None if values is None else statistics.fmean(values)
