"""`fit`, the only training loop: phases one after another, stoppable and resumable between any two steps.

What moves, on what and towards what is the phases' affair. Nothing here draws a random number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.errors import InterruptedRun, NonFiniteError
from lora_engine.progress import Progress, no_progress
from lora_engine.training.checkpoint import Checkpoint, Checkpoints
from lora_engine.training.determinism import deterministic, gradients_off
from lora_engine.training.ema import RunningMean
from lora_engine.training.optimizer_state import averaged, estimated_rate, export_state, import_state, take_mean
from lora_engine.training.optimizers import build_optimiser
from lora_engine.training.phases import Phase
from lora_engine.training.schedules import rate_factor
from lora_engine.training.specs.rates import Ema

_REMEDY = "lower learning_rate, raise warmup, or look for a broken picture; the last checkpoint is from before it"


@dataclass(frozen=True)
class FitOptions:
    """What the loop itself may be told; the meanings are those of `TrainSettings`."""

    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    checkpoint_every: int = 100
    validate_every: int = 0
    observe_every: int = 0
    optimiser: str = "adamw"
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    optimiser_options: Mapping[str, Any] = field(default_factory=dict)
    ema: Ema | None = None
    loss_scale: float = 1.0


@dataclass
class History:
    """What a run went through: one entry a step, all phases together.

    Attributes:
        loss: The loss of each step.
        rate: The learning rate of each step (of the phase's first group).
        validation: (steps done, validation loss).
    """

    loss: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)


def fit(
    phases: Sequence[Phase],
    frozen: Iterable[nn.Module],
    options: FitOptions,
    *,
    checkpoints: Checkpoints | None = None,
    validate: Callable[[], float] | None = None,
    progress: Progress = no_progress,
    stop: Callable[[], bool] = lambda: False,
    average: Callable[[Sequence[Tensor]], None] = lambda tensors: None,
    observe: Callable[[int], None] = lambda done: None,
) -> History:
    """Runs phases, from the newest checkpoint on where there is one.

    Args:
        phases: In their order. Their parameters are changed in place.
        frozen: Modules none of whose parameters moves unless a phase says so.
        options: See `FitOptions`.
        checkpoints: Where to save and to resume; None does neither.
        validate: Gives the validation loss of the moment; a pure function of the weights.
        progress: Told after every step: steps done, steps in all, values (loss and its terms, rate, gradient's norm).
        stop: Asked before every step; True makes a checkpoint and ends the run.
        average: Puts the means over all processes of the run into tensors, in place; nothing where there is one.
        observe: Called every `observe_every` steps, before the checkpoint, with the steps done; looks, changes nothing.

    Returns:
        The whole history, with the part from before a resumption.

    Raises:
        InterruptedRun: `stop` said so; the checkpoint is written.
        NonFiniteError: NaN or Inf in a loss, a gradient or a weight; the last checkpoint is from before it.
    """
    run = _Run(phases, options, checkpoints, validate, average, observe)
    devices = {value.device.type for phase in phases for value in phase.parameters.values()}
    with deterministic(wanted=devices <= {"cpu"}), gradients_off(frozen) as everything:
        run.restore()
        for position in range(run.position, len(phases)):
            run.enter_phase(position, everything)
            while run.step < phases[position].steps:
                if stop():
                    run.save()
                    raise InterruptedRun(f"stopped after {run.done} of {run.total} steps; a checkpoint is written")
                values = run.take_step()
                run.close_step()
                progress(run.done, run.total, values)
            run.leave_phase()
    return run.history


class _Run:
    def __init__(
        self,
        phases: Sequence[Phase],
        options: FitOptions,
        checkpoints: Checkpoints | None,
        validate: Callable[[], float] | None,
        average: Callable[[Sequence[Tensor]], None],
        observe: Callable[[int], None],
    ) -> None:
        self._average, self._observe = average, observe
        self.phases, self.options, self.history = phases, options, History()
        self.position, self.step = 0, 0
        self._checkpoints, self._validate = checkpoints, validate if options.validate_every else None
        self._values = {name: value for phase in phases for name, value in phase.parameters.items()}
        self._optimiser: torch.optim.Optimizer | None = None
        self._mean: RunningMean | None = None
        self._restored: Checkpoint | None = None

    @property
    def total(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def done(self) -> int:
        return sum(phase.steps for phase in self.phases[: self.position]) + self.step

    def enter_phase(self, position: int, everything: Iterable[nn.Parameter]) -> None:
        """Lets the phase's parameters move, and nothing else."""
        if position != self.position:
            self.position, self.step = position, 0
        phase = self.phases[position]
        for value in (*everything, *self._values.values()):
            value.requires_grad_(False)
            value.grad = None
        for value in phase.parameters.values():
            value.requires_grad_(True)
        options = self.options
        self._optimiser = build_optimiser(
            options.optimiser, phase.groups, options.weight_decay, options.optimiser_options
        )
        self._mean = RunningMean(phase.parameters, options.ema) if options.ema is not None else None
        if self._restored is not None:
            import_state(self._optimiser, self._restored)
            if self._mean is not None:
                self._mean.restore(_under("mean/", self._restored.tensors))
            self._restored = None
        if not self.history.validation:
            self._record_validation()

    def take_step(self) -> dict[str, float]:
        """One optimiser step over `accumulate` batches; gives the values to show."""
        optimiser, phase, accumulate = self._current_optimiser(), self.phases[self.position], self.options.accumulate
        factor = self._factor(phase)
        for settings, group in zip(optimiser.param_groups, phase.groups, strict=True):
            settings["lr"] = group.learning_rate * factor
        parts: list[Tensor] = []
        for place in range(accumulate):
            number = self.step * accumulate + place
            with phase.around(number):
                batch = phase.batch(number)
                predicted, target = phase.predict(batch)
                terms = torch.stack([term(predicted, target, batch) for term in phase.terms]) / accumulate
                # Still inside: checkpointed activations are computed again here, under what held for them.
                torch.autograd.backward(terms.sum() * self.options.loss_scale)
            parts.append(terms.detach())
        self._gather(parts)
        norm = self._clip(phase.parameters)
        # One transfer from the device a step, before anything has moved.
        *terms_now, norm_now = torch.cat([torch.stack(parts).sum(dim=0), norm.view(1)]).tolist()
        values = dict(zip((term.name for term in phase.terms), terms_now, strict=True))
        loss = math.fsum(terms_now)
        self._require_finite("the loss", loss)
        self._require_finite("the norm of the gradient", norm_now)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            phase.after(factor)
        if self._mean is not None:
            self._mean.update(self.step)
        self._require_finite("the norm of the weights", _norm(phase.parameters.values()).item())
        rate = phase.groups[0].learning_rate * factor * estimated_rate(optimiser)
        self.history.loss.append(loss)
        self.history.rate.append(rate)
        return {"loss": loss, **(values if len(values) > 1 else {}), "learning_rate": rate, "gradient_norm": norm_now}

    def leave_phase(self) -> None:
        """Makes the means, where there are any, what the phase leaves behind."""
        take_mean(self._current_optimiser())
        if self._mean is not None:
            self._mean.take()

    @contextmanager
    def to_export(self) -> Iterator[None]:
        """While it is open, the parameters are what the phase would leave behind; afterwards, bit for bit as before."""
        with averaged(self._current_optimiser()), nullcontext() if self._mean is None else self._mean.swapped():
            yield

    def close_step(self) -> None:
        """Counts the step, and validates and saves where one is due."""
        self.step += 1
        last = self.done == self.total
        if _is_due(self.done, self.options.observe_every):
            with self.to_export():
                self._observe(self.done)
        if last or _is_due(self.done, self.options.validate_every):
            self._record_validation()
        if last or self.done % self.options.checkpoint_every == 0:
            self.save()

    def save(self) -> None:
        """Writes a checkpoint of this moment."""
        if self._checkpoints is None:
            return
        tensors = {f"value/{name}": value.detach() for name, value in self._values.items()}
        tensors["history/loss"] = torch.tensor(self.history.loss, dtype=torch.float64)
        tensors["history/rate"] = torch.tensor(self.history.rate, dtype=torch.float64)
        if self._mean is not None:
            tensors |= {f"mean/{name}": value for name, value in self._mean.export().items()}
        state, scalars = export_state(self._current_optimiser())
        facts = {
            "position": self.position,
            "step": self.step,
            "validation": [list(entry) for entry in self.history.validation],
            "optimiser": scalars,
        }
        self._checkpoints.save(self.done, Checkpoint({**tensors, **state}, facts))

    def restore(self) -> None:
        """Goes back to the newest checkpoint, if there is one."""
        found = self._checkpoints.load() if self._checkpoints is not None else None
        if found is None:
            return
        with torch.no_grad():
            for name, value in self._values.items():
                value.copy_(found.tensors[f"value/{name}"])
        self.history = History(
            found.tensors["history/loss"].tolist(),
            found.tensors["history/rate"].tolist(),
            [(int(step), float(value)) for step, value in found.facts["validation"]],
        )
        self.position, self.step = int(found.facts["position"]), int(found.facts["step"])
        self._restored = found

    def _record_validation(self) -> None:
        if self._validate is not None:
            with self.to_export():
                value = self._validate()
            self._require_finite("the validation loss", value)
            self.history.validation.append((self.done, value))

    def _current_optimiser(self) -> torch.optim.Optimizer:
        if self._optimiser is None:
            raise RuntimeError("enter_phase has to come first")
        return self._optimiser

    def _factor(self, phase: Phase) -> float:
        options = self.options
        return rate_factor(options.schedule, self.step, phase.steps, options.warmup, **options.schedule_options)

    def _gather(self, parts: list[Tensor]) -> None:
        # Gradients at their true size, and these and the terms as the means over all processes.
        gradients = [value.grad for value in self.phases[self.position].parameters.values() if value.grad is not None]
        if self.options.loss_scale != 1.0:
            torch._foreach_div_(gradients, self.options.loss_scale)
        self._average([*parts, *gradients])

    def _clip(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        gradients = [value.grad for value in parameters.values() if value.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.options.clip:
            torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), self.options.clip, norm)
        return norm

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            step = self.done + 1
            raise NonFiniteError(f"{what} is {value} at step {step} of {self.total}", where="training", remedy=_REMEDY)


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _norm(values: Iterable[nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([value.detach() for value in values])
