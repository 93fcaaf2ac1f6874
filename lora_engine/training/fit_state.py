"""`FitState`: what `fit` has between two steps, and a checkpoint holds: position, weights, optimizer, losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lora_engine.training.candidates import Candidates
from lora_engine.training.checkpoint import Checkpoint
from lora_engine.training.ema import EmaWeights
from lora_engine.training.fit_options import FitOptions, History, rates_of
from lora_engine.training.optimizer_state import (
    apply_average,
    averaged_weights,
    export_state,
    import_state,
)
from lora_engine.training.optimizers import build_optimizer
from lora_engine.training.phases import Phase
from lora_engine.training.schedules import PhaseRates


class FitState:
    """The state of a run of phases.

    Args:
        phases: Phases in order. Their parameters are changed in place.
        options: The options of the loop.

    Attributes:
        values: The parameters of all phases by name.
        candidates: The steps that the chooser chooses from.
        history: Losses and rates so far.
        position: Number of the current phase from 0.
        step: Finished steps of the current phase.
        ema: The moving average of the phase's weights; None without one.
    """

    def __init__(self, phases: Sequence[Phase], options: FitOptions) -> None:
        self.phases, self.options = phases, options
        self.candidates = Candidates(options.chooser, tuple(rates_of(phases, options)))
        self.history = History(checks=self.candidates.checks)
        self.position, self.step = 0, 0
        self.values = {name: value for phase in phases for name, value in phase.parameters.items()}
        self.ema: EmaWeights | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._restored: Checkpoint | None = None

    @property
    def rates(self) -> tuple[PhaseRates, ...]:
        """The rates of each phase; the chooser may end the last one early."""
        return self.candidates.rates

    @property
    def total(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.rates)

    @property
    def done(self) -> int:
        """Finished steps of all phases."""
        return sum(phase.steps for phase in self.rates[: self.position]) + self.step

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.position]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the current phase."""
        if self._optimizer is None:
            raise RuntimeError("call enter_phase first")
        return self._optimizer

    def enter_phase(
        self,
        position: int,
        frozen_parameters: Iterable[nn.Parameter],
        begin: Callable[[torch.optim.Optimizer], None],
    ) -> None:
        """Makes the phase's parameters trainable, freezes all others, and makes or restores the optimizer.

        Args:
            position: Number of the phase from 0.
            frozen_parameters: Further parameters to freeze.
            begin: Takes the optimizer of the first phase of a run that starts at step 0.
        """
        if position != self.position:
            self.position, self.step = position, 0
        phase = self.phases[position]
        for value in (*frozen_parameters, *self.values.values()):
            value.requires_grad_(False)
            value.grad = None
        for value in phase.parameters.values():
            value.requires_grad_(True)
        options = self.options
        self._optimizer = build_optimizer(
            options.optimizer, phase.groups, options.weight_decay, options.optimizer_options
        )
        self.ema = EmaWeights(phase.parameters, options.ema) if options.ema is not None else None
        if self._restored is not None:
            import_state(self._optimizer, self._restored)
            if self.ema is not None:
                self.ema.restore(_under("mean/", self._restored.tensors))
            self._restored = None
        elif not self.done:
            begin(self._optimizer)

    def leave_phase(self) -> None:
        """Replaces the parameters by their averages where the settings say so."""
        apply_average(self.optimizer)
        if self.ema is not None:
            self.ema.finalize()

    @contextmanager
    def to_export(self) -> Iterator[None]:
        """Swaps in the weights that would be exported; restores the parameters bit for bit on exit."""
        with averaged_weights(self.optimizer), nullcontext() if self.ema is None else self.ema.applied():
            yield

    def is_validated(self, done: int) -> bool:
        """Returns True if the validation loss is computed after that many steps."""
        every, save_every = self.options.validate_every, self.options.save_every
        return bool(every) and (is_due(done, every) or is_due(done, save_every))

    def to_checkpoint(self) -> Checkpoint:
        """Returns the current state."""
        tensors = {f"value/{name}": value.detach() for name, value in self.values.items()}
        tensors["history/loss"] = torch.tensor(self.history.loss, dtype=torch.float64)
        tensors["history/rate"] = torch.tensor(self.history.rate, dtype=torch.float64)
        best, checks = self.candidates.export()
        tensors |= best
        if self.ema is not None:
            tensors |= {f"mean/{name}": value for name, value in self.ema.export().items()}
        optimizer = self.optimizer
        state, scalars = export_state(optimizer)
        facts = {
            "optimizer": self.options.optimizer,
            "shapes": [[list(value.shape) for value in group["params"]] for group in optimizer.param_groups],
            "position": self.position,
            "step": self.step,
            "rates": [phase.to_json() for phase in self.rates],
            "validated_on": self.options.validated_on,
            "validation": [list(entry) for entry in self.history.validation],
            "optimiser": scalars,
            **checks,
        }
        return Checkpoint({**tensors, **state}, facts)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over the state of a checkpoint whose steps are the first ones of these phases."""
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(checkpoint.tensors[f"value/{name}"])
        self.candidates.restore(checkpoint)
        self.position, self.step = int(checkpoint.facts["position"]), int(checkpoint.facts["step"])
        same_images = checkpoint.facts.get("validated_on", "") == self.options.validated_on
        validation = [(int(step), float(value)) for step, value in checkpoint.facts["validation"] if same_images]
        self.history = History(
            checkpoint.tensors["history/loss"].tolist(),
            checkpoint.tensors["history/rate"].tolist(),
            # Without the one at the end of a shorter run, which a longer one would not have made.
            [entry for entry in validation if self.is_validated(entry[0]) or entry[0] == self.total],
            self.candidates.checks,
        )
        self._restored = checkpoint


def is_due(done: int, every: int) -> bool:
    """Returns True after every so many steps; 0 is never."""
    return every > 0 and done % every == 0


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
