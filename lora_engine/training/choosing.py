"""Decides from the scores of candidates where a training stops, and which step is the best. Pure; imports no torch.

Every decision is a function of the checks so far, so an interrupted run decides the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_engine.training.schedules import PhaseRates, RateStage
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.choosing import ChoiceScore
from lora_engine.training.specs.lengths import warmup_steps

_VARIANCE_LEFT = 0.15
"""Share of the variance of all losses below which the last ones no longer vary (Voronov et al. 2023, section 4)."""
_LEAST_LEARNED = 0.01
"""Fall of the loss of training images, as a share of it, below which nothing was learned."""
_WINDOW = 3
_CANDIDATES = 20


@dataclass(frozen=True)
class Check:
    """A candidate: the steps done, and the loss of each unit (a group of images that show the same).

    Attributes:
        step: The steps done.
        rows: Losses of the units. With `rank: auto` one row per prefix of the ranks, otherwise one.
        trained: Mean loss of training images; None without a limit of what is memorized.
        memorized: Share of what was learned that does not carry over; None where `trained` is.
    """

    step: int
    rows: tuple[tuple[float, ...], ...]
    trained: float | None = None
    memorized: float | None = None

    @property
    def score(self) -> float:
        """Mean loss of the units; with `rank: auto` that of the best prefix."""
        return statistics.fmean(best_row(self.rows))


@dataclass(frozen=True)
class Chooser:
    """The rules of a run; see `BestCheckpoint`.

    Attributes:
        by: Score of a step.
        every: Steps between candidates.
        patience: Candidates without an improvement that end the run; 0 never ends it early.
        min_delta: Smallest decrease that is an improvement.
        anneal: Share of all steps in which the rate falls to 0.
        images: Digests of the images that are scored, as in the manifest.
        max_memorized: Largest `memorized` of a candidate; None allows all.
    """

    by: ChoiceScore
    every: int
    patience: int
    min_delta: float
    anneal: float
    images: tuple[str, ...] = ()
    max_memorized: float | None = None

    def rates(self, planned: Sequence[PhaseRates], checks: Sequence[Check]) -> tuple[PhaseRates, ...]:
        """Returns the rates of all phases as the checks so far determine them: the last phase may end early.

        Args:
            planned: The rates without an early stop.
            checks: All candidates so far.
        """
        *before, last = planned
        first, total = sum(phase.steps for phase in before), last.steps
        falling = round(self.anneal * total)
        stop = self.find_stop([check for check in checks if first < check.step <= first + total - falling])
        if stop is None and not falling:
            return tuple(planned)
        steps = total - falling if stop is None else stop - first
        if not self.anneal:
            return (*before, replace(last, end=steps))
        if stop is not None:
            falling = max(1, round(steps * self.anneal / (1.0 - self.anneal)))
        own = last.stages[0]
        warmup = warmup_steps(own.warmup, total)
        return (
            *before,
            PhaseRates(last.name, (replace(own, steps=steps, warmup=warmup), RateStage(falling, "linear"))),
        )

    def would_make(self, checks: Sequence[Check], total: int) -> bool:
        """Returns True if a run of so many steps has these candidates: not the end of a shorter run, for example."""
        return all(check.step % self.every == 0 or check.step == total for check in checks[1:])

    def find_stop(self, checks: Sequence[Check]) -> int | None:
        """Returns the step of the first check after which the training has nothing to gain; None for none of them."""
        if not self.patience:
            return None
        stops = self._without_variance(checks) if self.by == "dvar" else self._without_improvement(checks)
        return next(stops, None)

    def _without_improvement(self, checks: Sequence[Check]) -> Iterator[int]:
        best, misses = float("inf"), 0
        for check in checks:
            improves = self._allows(check) and check.score < best - self.min_delta
            best, misses = (check.score, 0) if improves else (best, misses + 1)
            if misses >= self.patience:
                yield check.step

    def _without_variance(self, checks: Sequence[Check]) -> Iterator[int]:
        window = max(_WINDOW, self.patience)
        for count in range(window + 1, len(checks) + 1):
            scores = [check.score for check in checks[:count]]
            if statistics.pvariance(scores[-window:]) <= _VARIANCE_LEFT * statistics.pvariance(scores):
                yield checks[count - 1].step

    def best(self, checks: Sequence[Check]) -> Check:
        """Returns the chosen candidate: that of the lowest score, or by `dvar` the last one.

        Candidates that memorize more than is allowed do not count; if all do, it is the one that memorizes least.
        """
        if self.by == "dvar":
            return checks[-1]
        if allowed := list(filter(self._allows, checks)):
            return min(allowed, key=lambda check: check.score)
        return min(checks, key=lambda check: check.memorized or 0.0)

    def _allows(self, check: Check) -> bool:
        return self.max_memorized is None or check.memorized is None or check.memorized <= self.max_memorized

    def leave_one_out(self, checks: Sequence[Check]) -> float | None:
        """Returns the score of a choice on all units but one, measured on that one, as a mean over the units.

        The winner's own score is too good, because it was chosen for it; this figure is not. A prefix of the ranks is
        chosen with the step. None for fewer than two units, and where the score chooses nothing.
        """
        rows = [row for check in list(filter(self._allows, checks)) or [self.best(checks)] for row in check.rows]
        units = len(rows[0])
        if units < 2 or self.by == "dvar":
            return None
        return statistics.fmean(min(rows, key=lambda row: sum(row) - row[unit])[unit] for unit in range(units))

    def describe(self, start: Check, checks: Sequence[Check], planned: int) -> dict[str, Any]:
        """Returns what was chosen and why, for `training.json`: the entries `chosen` and `candidates`.

        Args:
            start: The check before the first step.
            checks: All candidates.
            planned: Steps without an early stop.
        """
        best, last = self.best(checks), checks[-1]
        stop = self.find_stop(checks) if last.step < planned else None
        chosen = {
            "from": [check.step for check in checks],
            "step": best.step,
            "by": self.by,
            "on": list(self.images),
            "score": best.score,
            "leave_one_out": self.leave_one_out(checks),
        }
        scores = [[check.step, check.score] for check in (start, *checks)]
        candidates: dict[str, Any] = {"scores": scores, "stopped": stop, "why": self._reason(start, checks, stop)}
        if self.max_memorized is not None:
            candidates["memorized"] = [[check.step, check.memorized] for check in checks]
        return {"chosen": chosen, "candidates": candidates}

    def _reason(self, start: Check, checks: Sequence[Check], stop: int | None) -> str:
        best = self.best(checks)
        if self.by == "dvar":
            end = f"the loss on the training images no longer varied at step {stop}" if stop else "no early stop"
            return f"{end}; the last step is kept"
        end = f"no improvement for {self.patience} candidates at step {stop}" if stop else "no early stop"
        worse = "" if best.score < start.score else "; NO candidate is better than the base"
        count = sum(map(self._allows, checks))
        if not count:
            limit = f"every one of {len(checks)} candidates memorizes more than {self.max_memorized:g}"
            return f"{end}; {limit}, step {best.step} the least ({best.memorized:.2f}){worse}"
        kind = f" that memorize at most {self.max_memorized:g}" if count < len(checks) else ""
        return f"{end}; step {best.step} has the lowest validation loss of {count} candidates{kind}{worse}"


def make_chooser(settings: TrainSettings, by: ChoiceScore, images: Sequence[str] = ()) -> Chooser | None:
    """Returns the rules by which a training chooses its best step; None for one that keeps the last.

    Args:
        settings: The settings, with all lengths in steps.
        by: Score of a step.
        images: Digests of the held-out images that are scored.
    """
    wanted = settings.best_checkpoint
    if wanted is None:
        return None
    every = wanted.every or max(1, round(settings.steps / _CANDIDATES))
    limit = wanted.max_memorized
    return Chooser(by, every, wanted.patience, wanted.min_delta, wanted.anneal, tuple(images), limit)


def best_row(rows: Sequence[Sequence[float]]) -> Sequence[float]:
    """Returns the losses of the lowest mean."""
    return min(rows, key=statistics.fmean)


def write_checks(checks: Sequence[Check]) -> dict[str, Any]:
    """Returns the facts of a checkpoint that `read_checks` reads; empty without checks."""
    rows = [[check.step, *(check.rows[0] if len(check.rows) == 1 else check.rows)] for check in checks]
    trained = (
        {"trained": [check.trained for check in checks]} if any(check.trained is not None for check in checks) else {}
    )
    return {"checks": rows, **trained} if rows else {}


def read_checks(facts: Mapping[str, Any]) -> list[Check]:
    """Returns the checks in the facts of a checkpoint; empty without a chooser."""
    rows = facts.get("checks", ())
    trained = facts.get("trained") or [None] * len(rows)
    checks: list[Check] = []
    for (step, *losses), loss in zip(rows, trained, strict=True):
        checks.append(with_memorized(Check(int(step), _read_rows(losses), loss), checks))
    return checks


def with_memorized(check: Check, before: Sequence[Check]) -> Check:
    """Returns a check with the share that it memorized since the first one before it.

    Nothing was memorized if the loss of training images fell by less than 1 %: nothing was learned.
    """
    start = before[0] if before else check
    if check.trained is None or start.trained is None:
        return check
    learned = start.trained - check.trained
    is_learned = learned > 0.0 and learned >= _LEAST_LEARNED * start.trained
    return replace(check, memorized=1.0 - (start.score - check.score) / learned if is_learned else 0.0)


def _read_rows(losses: Sequence[Any]) -> tuple[tuple[float, ...], ...]:
    rows = losses if losses and isinstance(losses[0], list) else [losses]
    return tuple(tuple(map(float, row)) for row in rows)
