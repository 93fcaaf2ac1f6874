"""`fit`, the only training loop: runs phases in order and can stop and resume between any two steps.

The phases determine parameters, batches and losses. The loop itself draws no random number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lora_engine.errors import InterruptedRun, NonFiniteError, TrainingError
from lora_engine.progress import Progress, no_progress
from lora_engine.training.candidates import Candidates
from lora_engine.training.checkpoint import Checkpoint, Checkpoints
from lora_engine.training.choosing import Check
from lora_engine.training.determinism import deterministic, gradients_off
from lora_engine.training.ema import EmaWeights
from lora_engine.training.fit_options import FitOptions, History, rates_of
from lora_engine.training.optimizer_state import (
    apply_average,
    averaged_weights,
    estimated_rate,
    export_state,
    import_state,
)
from lora_engine.training.optimizers import build_optimizer
from lora_engine.training.phases import Phase
from lora_engine.training.schedules import PhaseRates

SECONDS = "seconds"
"""The value of `progress` that is the duration of a step, without validation, samples and checkpoint."""
_REMEDY = "lower learning_rate, raise warmup, or look for a broken image; the last checkpoint precedes this step"


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
    save_weights: Callable[[int, float | None], None] = lambda done, loss: None,
    continue_from: Callable[[Checkpoint, int], None] = lambda checkpoint, done: None,
    begin: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None,
    score: Callable[[], Sequence[Sequence[float]]] = tuple,
) -> History:
    """Runs the phases, resuming from the newest usable checkpoint if there is one.

    A checkpoint is usable if the first steps of these phases, as many as it has, are the same steps at the same rates.

    Args:
        phases: Phases in order. Their parameters are changed in place.
        frozen: Modules whose parameters are frozen except those that a phase trains.
        options: See `FitOptions`.
        checkpoints: Checkpoints to save to and resume from; None does neither.
        validate: Returns the current validation loss; a pure function of the weights.
        progress: Called after every step, and after a validation before the first: steps done, total steps, values
            (loss and its terms, rate, gradient norm, validation loss if it was computed, seconds of the step).
        stop: Polled before every step; True writes a checkpoint and ends the run.
        average: Averages tensors over all processes, in place; a no-op for a single process.
        observe: Called every `observe_every` steps with the steps done, before the checkpoint; must change nothing.
        save_weights: Called every `save_every` steps with the steps done and the validation loss (None without
            validation), while the parameters hold what would be written; must change nothing.
        continue_from: Called with the checkpoint that the run resumes from, and the steps done.
        begin: Takes the optimizer of the first phase of a run that starts at step 0.
        score: Returns the losses of the chooser's units, in rows as in `Check`; a pure function of the weights, the
            same in all processes.

    Returns:
        The whole history, including the part before a resume.

    Raises:
        InterruptedRun: `stop` returned True; the checkpoint is written.
        NonFiniteError: NaN or Inf in a loss, a gradient or a weight; the last checkpoint precedes it.
    """
    run = _Run(phases, options, checkpoints, validate, average, observe, save_weights, score)
    devices = {value.device.type for phase in phases for value in phase.parameters.values()}
    with deterministic(enabled=devices <= {"cpu"}), gradients_off(frozen) as frozen_parameters:
        run.restore(continue_from)
        for position in range(run.position, len(phases)):
            run.enter_phase(position, frozen_parameters, begin)
            if run.done == 0 and (validated := run.validated()):
                progress(0, run.total, validated)
            while run.step < run.rates[position].steps:
                if stop():
                    run.save()
                    raise InterruptedRun(f"stopped after {run.done} of {run.total} steps; a checkpoint is written")
                begun = time.perf_counter()
                values = run.take_step() | {SECONDS: time.perf_counter() - begun}
                run.close_step()
                progress(run.done, run.total, values | run.validated())
            run.leave_phase()
        run.candidates.keep_best(run.values)
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
        save_weights: Callable[[int, float | None], None],
        score: Callable[[], Sequence[Sequence[float]]],
    ) -> None:
        self._average, self._observe, self._save_weights, self._score = average, observe, save_weights, score
        self.phases, self.options = phases, options
        self.candidates = Candidates(options.chooser, tuple(rates_of(phases, options)))
        self.history = History(checks=self.candidates.checks)
        self.position, self.step = 0, 0
        self._checkpoints, self._validate = checkpoints, validate if options.validate_every else None
        self.values = {name: value for phase in phases for name, value in phase.parameters.items()}
        self._optimizer: torch.optim.Optimizer | None = None
        self._ema: EmaWeights | None = None
        self._restored: Checkpoint | None = None

    @property
    def rates(self) -> tuple[PhaseRates, ...]:
        return self.candidates.rates

    @property
    def total(self) -> int:
        return sum(phase.steps for phase in self.rates)

    @property
    def done(self) -> int:
        return sum(phase.steps for phase in self.rates[: self.position]) + self.step

    def enter_phase(
        self,
        position: int,
        frozen_parameters: Iterable[nn.Parameter],
        begin: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None,
    ) -> None:
        """Makes the phase's parameters trainable and freezes all others."""
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
        self._ema = EmaWeights(phase.parameters, options.ema) if options.ema is not None else None
        if self._restored is not None:
            import_state(self._optimizer, self._restored)
            if self._ema is not None:
                self._ema.restore(_under("mean/", self._restored.tensors))
            self._restored = None
        elif not self.done:
            begin(self._optimizer)
        if not self.history.validation:
            self._record_validation()
        self._record_check()

    def take_step(self) -> dict[str, float]:
        """Takes one optimizer step over `accumulate` batches; returns the values to show."""
        optimizer, phase, accumulate = self._current_optimizer(), self.phases[self.position], self.options.accumulate
        factor = self.rates[self.position].factor(self.step)
        for settings, group in zip(optimizer.param_groups, phase.groups, strict=True):
            settings["lr"] = group.learning_rate * factor
        parts: list[Tensor] = []
        for index in range(accumulate):
            number = self.step * accumulate + index
            with phase.batch_context(number):
                batch = phase.batch(number)
                predicted, target = phase.predict(batch)
                terms = torch.stack([term(predicted, target, batch) for term in phase.terms]) / accumulate
                # Inside the context: checkpointed activations are recomputed with the same dropout.
                torch.autograd.backward(terms.sum() * self.options.loss_scale)
            parts.append(terms.detach())
        self._gather(parts)
        norm = self._clip(phase.parameters)
        # One device transfer per step, before any weight changes.
        *term_values, norm_value = torch.cat([torch.stack(parts).sum(dim=0), norm.view(1)]).tolist()
        values = dict(zip((term.name for term in phase.terms), term_values, strict=True))
        loss = math.fsum(term_values)
        self._require_finite("the loss", loss)
        self._require_finite("the norm of the gradient", norm_value)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            phase.after_step(factor)
        if self._ema is not None:
            self._ema.update(self.step)
        self._require_finite("the norm of the weights", _norm(phase.parameters.values()).item())
        rate = phase.groups[0].learning_rate * factor * estimated_rate(optimizer)
        self.history.loss.append(loss)
        self.history.rate.append(rate)
        return {"loss": loss, **(values if len(values) > 1 else {}), "learning_rate": rate, "gradient_norm": norm_value}

    def leave_phase(self) -> None:
        """Replaces the parameters by their averages where the settings say so."""
        apply_average(self._current_optimizer())
        if self._ema is not None:
            self._ema.finalize()

    @contextmanager
    def to_export(self) -> Iterator[None]:
        """Swaps in the weights that would be exported; restores the parameters bit for bit on exit."""
        with averaged_weights(self._current_optimizer()), nullcontext() if self._ema is None else self._ema.applied():
            yield

    def close_step(self) -> None:
        """Counts the step; scores, observes, validates and saves if due."""
        self.step += 1
        self._record_check()
        last = self.done == self.total
        if _is_due(self.done, self.options.observe_every):
            with self.to_export():
                self._observe(self.done)
        if last or self._is_validated(self.done):
            self._record_validation()
        if _is_due(self.done, self.options.save_every):
            with self.to_export():
                self._save_weights(self.done, self._current_loss())
        if last or self.done % self.options.checkpoint_every == 0:
            self.save()

    def validated(self) -> dict[str, float]:
        """Returns the validation loss and the score of this step; empty if they were not computed."""
        loss, score = self._current_loss(), self.candidates.score_of(self.done)
        return score if loss is None else {"validation_loss": loss, **score}

    def save(self) -> None:
        """Writes a checkpoint of the current state."""
        if self._checkpoints is None:
            return
        tensors = {f"value/{name}": value.detach() for name, value in self.values.items()}
        tensors["history/loss"] = torch.tensor(self.history.loss, dtype=torch.float64)
        tensors["history/rate"] = torch.tensor(self.history.rate, dtype=torch.float64)
        best, checks = self.candidates.export()
        tensors |= best
        if self._ema is not None:
            tensors |= {f"mean/{name}": value for name, value in self._ema.export().items()}
        optimizer = self._current_optimizer()
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
        self._checkpoints.save(self.done, Checkpoint({**tensors, **state}, facts))

    def restore(self, continue_from: Callable[[Checkpoint, int], None]) -> None:
        """Restores the newest usable checkpoint, if there is one."""
        checkpoint = self._checkpoints.load(self.candidates.can_continue) if self._checkpoints is not None else None
        self._require_agreement(-1 if checkpoint is None else int(checkpoint.tensors["history/loss"].numel()))
        if checkpoint is None:
            return
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
            [entry for entry in validation if self._is_validated(entry[0]) or entry[0] == self.total],
            self.candidates.checks,
        )
        self._restored = checkpoint
        continue_from(checkpoint, self.done)

    def _require_agreement(self, done: int) -> None:
        # Another run may write checkpoints while the processes of this one choose theirs.
        agreed = torch.tensor([float(done)], device=next(iter(self.values.values())).device)
        self._average([agreed])
        if agreed.item() != done:
            raise TrainingError(
                f"a process resumes after {done} steps, others after another number", remedy="run it again"
            )

    def _record_check(self) -> None:
        if self.candidates.is_due(self.done):
            with self.to_export():
                check = Check(self.done, tuple(map(tuple, self._score())))
                self._require_finite("the loss of a candidate", check.score)
                self.candidates.add(check, self.values)

    def _is_validated(self, done: int) -> bool:
        every, options = self.options.validate_every, self.options
        return bool(every) and (done % every == 0 or _is_due(done, options.save_every))

    def _current_loss(self) -> float | None:
        latest = self.history.validation[-1] if self.history.validation else (-1, 0.0)
        return latest[1] if latest[0] == self.done else None

    def _record_validation(self) -> None:
        if self._validate is not None:
            with self.to_export():
                value = self._validate()
            self._require_finite("the validation loss", value)
            self.history.validation.append((self.done, value))

    def _current_optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            raise RuntimeError("call enter_phase first")
        return self._optimizer

    def _gather(self, parts: list[Tensor]) -> None:
        # Unscales the gradients, then averages them and the loss terms over all processes.
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
