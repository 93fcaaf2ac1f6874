"""Keeps the candidates of a run of `fit`: their scores, the best factors, and the rates that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_engine.training.checkpoint import Checkpoint
from lora_engine.training.checkpoint_files import CheckpointFile
from lora_engine.training.choosing import Check, Chooser, read_checks, with_memorized, write_checks
from lora_engine.training.schedules import PhaseRates, common_steps

_PREFIX = "best/"


class Candidates:
    """The candidates of a run; without a chooser there are none, and the rates are those that were planned.

    Args:
        chooser: The rules of the choice; None keeps the last step.
        planned: The rates of all phases without an early stop.

    Attributes:
        checks: The score before the last phase, and those of all candidates so far.
        rates: The rates of all phases.
    """

    def __init__(self, chooser: Chooser | None, planned: Sequence[PhaseRates]) -> None:
        self._chooser, self._planned = chooser, tuple(planned)
        self._best: dict[str, Tensor] = {}
        self.checks: list[Check] = []
        self.rates = self._rates_after(self.checks)

    def is_due(self, done: int) -> bool:
        """Returns True if the step is a candidate without a score, or that before the last phase."""
        if self._chooser is None or (self.checks and self.checks[-1].step == done):
            return False
        first, total = sum(phase.steps for phase in self.rates[:-1]), sum(phase.steps for phase in self.rates)
        if done <= first:
            return done == first and not self.checks
        return done % self._chooser.every == 0 or done == total

    def add(self, check: Check, values: Mapping[str, Tensor]) -> None:
        """Adds a score, and copies the factors if they are the best so far."""
        check = with_memorized(check, self.checks)
        self.checks.append(check)
        candidates = self.checks[1:]
        if self._chooser is not None and candidates and self._chooser.best(candidates) is check:
            self._best = {name: value.detach().clone() for name, value in values.items()}
        self.rates = self._rates_after(self.checks)

    def score_of(self, done: int) -> dict[str, float]:
        """Returns the score of a step to show; empty for one without."""
        return {"choice_loss": self.checks[-1].score} if self.checks and self.checks[-1].step == done else {}

    @torch.no_grad()
    def keep_best(self, values: Mapping[str, Tensor]) -> None:
        """Replaces factors by those of the best candidate, if there is one."""
        for name, value in self._best.items():
            values[name].copy_(value)

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Returns the tensors and the facts of a checkpoint."""
        tensors = {f"{_PREFIX}{name}": value for name, value in self._best.items()}
        return tensors, write_checks(self.checks)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores what `export` returned."""
        self.checks = read_checks(checkpoint.facts)
        tensors = checkpoint.tensors.items()
        self._best = {name.removeprefix(_PREFIX): value for name, value in tensors if name.startswith(_PREFIX)}
        self.rates = self._rates_after(self.checks)

    def can_continue(self, file: CheckpointFile) -> bool:
        """Returns True if this run would have taken the steps of a checkpoint, and compared the same candidates."""
        before, checks = [PhaseRates.from_json(values) for values in file.facts["rates"]], read_checks(file.facts)
        after = self._rates_after(checks)
        if self._chooser is not None and not self._chooser.would_make(checks, sum(phase.steps for phase in after)):
            return False
        return file.step <= common_steps(before, after)

    def _rates_after(self, checks: Sequence[Check]) -> tuple[PhaseRates, ...]:
        return self._planned if self._chooser is None else self._chooser.rates(self._planned, checks)
