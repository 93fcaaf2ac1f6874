"""`fit`, the only training loop: runs phases in order and can stop and resume between any two steps.

The phases determine parameters, batches and losses. The loop itself draws no random number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_engine.errors import InterruptedRun, NonFiniteError, TrainingError
from lora_engine.progress import Progress, no_progress
from lora_engine.training.checkpoint import Checkpoint, Checkpoints
from lora_engine.training.choosing import Check
from lora_engine.training.determinism import deterministic, gradients_off
from lora_engine.training.fit_options import FitOptions, History
from lora_engine.training.fit_state import FitState, is_due
from lora_engine.training.optimizer_state import estimated_rate
from lora_engine.training.phases import Phase

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
    score: Callable[[int], Check] = lambda done: Check(done, ()),
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
        score: Takes the steps done and returns the candidate, with the losses of the chooser's units; otherwise a pure
            function of the weights, the same in all processes.

    Returns:
        The whole history, including the part before a resume.

    Raises:
        InterruptedRun: `stop` returned True; the checkpoint is written.
        NonFiniteError: NaN or Inf in a loss, a gradient or a weight; the last checkpoint precedes it.
    """
    state = FitState(phases, options)
    run = _Run(state, checkpoints, validate, average, observe, save_weights, score)
    devices = {value.device.type for phase in phases for value in phase.parameters.values()}
    with deterministic(enabled=devices <= {"cpu"}), gradients_off(frozen) as frozen_parameters:
        run.restore(continue_from)
        for position in range(state.position, len(phases)):
            state.enter_phase(position, frozen_parameters, begin)
            run.begin_phase()
            if state.done == 0 and (validated := run.validated()):
                progress(0, state.total, validated)
            while state.step < state.rates[position].steps:
                if stop():
                    run.save()
                    raise InterruptedRun(f"stopped after {state.done} of {state.total} steps; a checkpoint is written")
                begun = time.perf_counter()
                values = run.take_step() | {SECONDS: time.perf_counter() - begun}
                run.close_step()
                progress(state.done, state.total, values | run.validated())
            state.leave_phase()
        state.candidates.keep_best(state.values)
    return state.history


class _Run:
    """The steps of a run, with what is called between them; see `fit` for the arguments."""

    def __init__(
        self,
        state: FitState,
        checkpoints: Checkpoints | None,
        validate: Callable[[], float] | None,
        average: Callable[[Sequence[Tensor]], None],
        observe: Callable[[int], None],
        save_weights: Callable[[int, float | None], None],
        score: Callable[[int], Check],
    ) -> None:
        self._average, self._observe, self._save_weights, self._score = average, observe, save_weights, score
        self._state, self._options, self._checkpoints = state, state.options, checkpoints
        self._validate = validate if state.options.validate_every else None

    def begin_phase(self) -> None:
        """Validates and scores before the first step, and scores at the start of the last phase."""
        if not self._state.history.validation:
            self._record_validation()
        self._record_check()

    def take_step(self) -> dict[str, float]:
        """Takes one optimizer step over `accumulate` batches; returns the values to show."""
        state, accumulate = self._state, self._options.accumulate
        optimizer, phase = state.optimizer, state.phase
        factor = state.rates[state.position].factor(state.step)
        for settings, group in zip(optimizer.param_groups, phase.groups, strict=True):
            settings["lr"] = group.learning_rate * factor
        parts: list[Tensor] = []
        for index in range(accumulate):
            number = state.step * accumulate + index
            with phase.batch_context(number):
                batch = phase.batch(number)
                predicted, target = phase.predict(batch)
                terms = torch.stack([term(predicted, target, batch) for term in phase.terms]) / accumulate
                # Inside the context: checkpointed activations are recomputed with the same dropout.
                torch.autograd.backward(terms.sum() * self._options.loss_scale)
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
        if state.ema is not None:
            state.ema.update(state.step)
        self._require_finite("the norm of the weights", _norm(phase.parameters.values()).item())
        rate = phase.groups[0].learning_rate * factor * estimated_rate(optimizer)
        state.history.loss.append(loss)
        state.history.rate.append(rate)
        return {"loss": loss, **(values if len(values) > 1 else {}), "learning_rate": rate, "gradient_norm": norm_value}

    def close_step(self) -> None:
        """Counts the step; scores, observes, validates and saves if due."""
        state = self._state
        state.step += 1
        self._record_check()
        last = state.done == state.total
        if is_due(state.done, self._options.observe_every):
            with state.to_export():
                self._observe(state.done)
        if last or state.is_validated(state.done):
            self._record_validation()
        if is_due(state.done, self._options.save_every):
            with state.to_export():
                self._save_weights(state.done, self._current_loss())
        if last or state.done % self._options.checkpoint_every == 0:
            self.save()

    def validated(self) -> dict[str, float]:
        """Returns the validation loss and the score of this step; empty if they were not computed."""
        loss, score = self._current_loss(), self._state.candidates.score_of(self._state.done)
        return score if loss is None else {"validation_loss": loss, **score}

    def save(self) -> None:
        """Writes a checkpoint of the current state."""
        if self._checkpoints is not None:
            self._checkpoints.save(self._state.done, self._state.to_checkpoint())

    def restore(self, continue_from: Callable[[Checkpoint, int], None]) -> None:
        """Restores the newest usable checkpoint, if there is one."""
        state = self._state
        checkpoint = self._checkpoints.load(state.candidates.can_continue) if self._checkpoints is not None else None
        self._require_agreement(-1 if checkpoint is None else int(checkpoint.tensors["history/loss"].numel()))
        if checkpoint is None:
            return
        state.restore(checkpoint)
        continue_from(checkpoint, state.done)

    def _require_agreement(self, done: int) -> None:
        # Another run may write checkpoints while the processes of this one choose theirs.
        agreed = torch.tensor([float(done)], device=next(iter(self._state.values.values())).device)
        self._average([agreed])
        if agreed.item() != done:
            raise TrainingError(
                f"a process resumes after {done} steps, others after another number", remedy="run it again"
            )

    def _record_check(self) -> None:
        state = self._state
        if state.candidates.is_due(state.done):
            with state.to_export():
                check = self._score(state.done)
                self._require_finite("the loss of a candidate", check.score)
                state.candidates.add(check, state.values)

    def _current_loss(self) -> float | None:
        latest = self._state.history.validation[-1] if self._state.history.validation else (-1, 0.0)
        return latest[1] if latest[0] == self._state.done else None

    def _record_validation(self) -> None:
        if self._validate is not None:
            with self._state.to_export():
                value = self._validate()
            self._require_finite("the validation loss", value)
            self._state.history.validation.append((self._state.done, value))

    def _gather(self, parts: list[Tensor]) -> None:
        # Unscales the gradients, then averages them and the loss terms over all processes.
        gradients = [value.grad for value in self._state.phase.parameters.values() if value.grad is not None]
        if self._options.loss_scale != 1.0:
            torch._foreach_div_(gradients, self._options.loss_scale)
        self._average([*parts, *gradients])

    def _clip(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        gradients = [value.grad for value in parameters.values() if value.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._options.clip:
            torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), self._options.clip, norm)
        return norm

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            step = self._state.done + 1
            raise NonFiniteError(
                f"{what} is {value} at step {step} of {self._state.total}", where="training", remedy=_REMEDY
            )


def _norm(values: Iterable[nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([value.detach() for value in values])
