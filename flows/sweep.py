"""Runs a sweep: trials of a pipeline with other settings, each a cached run, and the registration of the best one.

The trials end before the steps that register and export. The winner is a run of the whole pipeline with its settings,
in which only those steps are left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.pipeline import bases_of, raise_first, run_pipeline
from flows.plan import Plan, plan_pipeline
from flows.prefect import run_as_flow
from flows.result import PipelineResult
from flows.runners import IN_THREADS, RunnerSettings, StartedRunner, read_runner, started_runner
from flows.server import prefect_server
from flows.spec import PipelineSpec
from flows.step_tasks import submit_work, wait_for_result
from flows.sweep_file import DeclaredSweep
from lora_engine.compute import fitting_threads, threads
from lora_engine.errors import InterruptedRun, NonFiniteError, TrainingError
from lora_engine.files import atomic_write, canonical_json, sha256_bytes
from registry.entities import ArtifactRef
from registry.home import Home
from tasks.operations.access import require_training
from tasks.progress import StepEvent, step_scope
from tasks.steps.register import Register
from tasks.sweep.page import render_sweep
from tasks.sweep.records import (
    best_trial,
    describe_winner,
    measure_adapter,
    read_training,
    read_trials,
    read_value,
    trial_folder,
    write_trial,
)
from tasks.sweep.search import comparable_curve, find_pruned_step, propose, require_optuna
from tasks.sweep.spec import TrialRecord


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        trials: All trials, in order.
        best: The winner.
        spec: The pipeline with its settings.
        pipeline: The result of its run.
        page: The page that compares the trials.
    """

    trials: Sequence[TrialRecord]
    best: TrialRecord
    spec: PipelineSpec
    pipeline: PipelineResult
    page: Path


def run_sweep(
    sweep: DeclaredSweep,
    home: Home,
    report: Callable[[TrialRecord], None] = lambda record: None,
    *,
    runner: RunnerSettings | None = None,
) -> SweepResult:
    """Runs the trials that did not end yet, and registers the best one.

    Args:
        sweep: The sweep.
        home: The home with all state.
        report: Called with every trial that ends, in order.
        runner: The task runner of the trials; None takes that of the home. The steps of a trial run in threads.

    Raises:
        TrainingError: No trial completed.
        EngineError, RegistryError, OSError: A trial failed for another reason than its settings.
    """
    require_optuna()
    require_training(home, [step.name for step in sweep.spec.steps.values() if isinstance(step, Register)])
    plan = _plan_trial(sweep, home)
    run = _SweepRun(sweep, home, trial_folder(home, _key_of(sweep, plan)), report)
    settings = runner or read_runner(home)
    # Here, because workers compute with the threads of this process; those of a trial change the last bits of results.
    with prefect_server(), threads(fitting_threads(bases_of([sweep.spec]))):
        with started_runner(settings, home) as started:
            trials = run.run_trials(started)
        best = best_trial(sweep.settings, trials)
        if best is None:
            raise TrainingError(
                f"none of {len(trials)} trials completed",
                where="sweep",
                remedy="narrow the ranges; the lines above say why each trial ended",
            )
        winner = describe_winner(sweep.settings, trials, best)
        spec = sweep.with_values(best.values, winner)
        result = run_pipeline(spec, home, runner=IN_THREADS)
    page = home.reports / f"{sweep.spec.name}-sweep.html"
    atomic_write(page, render_sweep(sweep.spec.name, sweep.settings, trials, best).encode())
    return SweepResult(trials, best, spec, result, page)


@dataclass(frozen=True)
class _SweepRun:
    sweep: DeclaredSweep
    home: Home
    folder: Path
    report: Callable[[TrialRecord], None]

    def run_trials(self, runner: StartedRunner) -> list[TrialRecord]:
        """Returns all trials; those that did not end yet are run, as many at a time as the sweep declares."""
        return run_as_flow(f"{self.sweep.spec.name} sweep", self._run_waves, runner=runner)()

    def _run_waves(self) -> list[TrialRecord]:
        settings, ended = self.sweep.settings, read_trials(self.folder)
        for start in range(0, settings.trials, settings.parallel):
            numbers = range(start, min(start + settings.parallel, settings.trials))
            if all(number in ended for number in numbers):
                continue
            earlier = [ended[number] for number in range(start)]
            proposed = dict(zip(numbers, propose(settings, earlier, len(numbers)), strict=True))
            left = {number: values for number, values in proposed.items() if number not in ended}
            ended |= self._run_wave(left, earlier)
        return [ended[number] for number in range(settings.trials)]

    def _run_wave(
        self, left: Mapping[int, Mapping[str, Any]], earlier: Sequence[TrialRecord]
    ) -> dict[int, TrialRecord]:
        futures = {
            number: submit_work(
                f"trial-{number}", _Trial(self.sweep, self.home, self.folder, number, values, earlier).run
            )
            for number, values in left.items()
        }
        ended: dict[int, TrialRecord] = {}
        errors: dict[str, BaseException] = {}
        for number, future in futures.items():
            result = wait_for_result(future)
            if isinstance(result, BaseException):
                errors[f"trial-{number}"] = result
            else:
                ended[number] = result
                self.report(result)
        if errors:
            raise_first(errors)
        return ended


@dataclass
class _Trial:
    """A trial in progress; before it starts, plain data that can be pickled."""

    sweep: DeclaredSweep
    home: Home
    folder: Path
    number: int
    values: Mapping[str, Any]
    earlier: Sequence[TrialRecord]
    curve: dict[int, float] = field(default_factory=dict)

    def run(self) -> TrialRecord:
        """Runs the pipeline and returns the record of the trial, once it is written."""
        settings, home = self.sweep.settings, self.home
        spec = self.sweep.with_values(self.values)
        with step_scope(lambda event: self._watch(event, stop)) as stop:
            try:
                outcomes = run_pipeline(spec, home, runner=IN_THREADS).outcomes
            except NonFiniteError as error:
                return self._record(state="failed", why=error.problem)
            except InterruptedRun:
                if not stop.is_set():
                    raise
                return self._pruned(tuple(sorted(self.curve.items())))
        adapter = outcomes[self.sweep.adapter].ref
        curve = comparable_curve(read_training(home, adapter))
        if find_pruned_step(settings, self.earlier, curve) is not None:
            # It ended before it was stopped; the next trials must not depend on that.
            return self._pruned(curve)
        value = read_value(home, settings, outcomes[settings.step].ref)
        return self._record(state="completed", value=value, curve=curve, **measure_adapter(home, adapter))

    def _watch(self, event: StepEvent, stop: threading.Event) -> None:
        if event.step != self.sweep.adapter:
            return
        for point in event.points:
            loss = point.values.get("choice_loss", point.values.get("validation_loss"))
            if loss is None or not point.step:
                continue
            self.curve[point.step] = loss
            curve = tuple(self.curve.items())
            if find_pruned_step(self.sweep.settings, self.earlier, curve) is not None:
                stop.set()

    def _pruned(self, curve: tuple[tuple[int, float], ...]) -> TrialRecord:
        step = find_pruned_step(self.sweep.settings, self.earlier, curve)
        until = tuple(point for point in curve if step is None or point[0] <= step)
        return self._record(
            state="pruned", curve=until, why=f"validation loss above the median of earlier trials at step {step}"
        )

    def _record(self, **facts: Any) -> TrialRecord:
        record = TrialRecord(number=self.number, values=dict(self.values), **facts)
        write_trial(self.folder, record)
        return record


def sweep_key(sweep: DeclaredSweep, home: Home) -> str:
    """Returns a digest of everything that the trials depend on, except their number."""
    return _key_of(sweep, _plan_trial(sweep, home))


def _key_of(sweep: DeclaredSweep, plan: Plan) -> str:
    settings = sweep.settings.model_dump(mode="json", exclude={"trials"})
    made = {step.outcome.ref for step in plan.steps if step.outcome is not None}
    parts = []
    for step in plan.steps:
        registered = [
            [role, source.sha256]
            for role, sources in step.sources.items()
            for source in sources
            if isinstance(source, ArtifactRef) and source not in made
        ]
        parts.append([step.name, registered, step.job.key_parts({})])
    return sha256_bytes(canonical_json([settings, parts]))


def _plan_trial(sweep: DeclaredSweep, home: Home) -> Plan:
    """Plans the steps of a trial with the values that the file has."""
    steps = {name: step for name, step in sweep.spec.steps.items() if name in sweep.trial_steps}
    return plan_pipeline(replace(sweep.spec, steps=steps), home)
