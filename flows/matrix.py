"""Runs the pipelines of a matrix on a task runner: each as a task, whose steps run in threads of its worker."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flows.pipeline import bases_of, run_pipeline
from flows.prefect import run_as_flow
from flows.result import PipelineResult
from flows.runners import IN_THREADS, RunnerSettings, started_runner
from flows.selection import ALL_STEPS, Selection
from flows.server import prefect_server
from flows.spec import PipelineSpec
from flows.step_tasks import submit_work, wait_for_result
from lora_engine.compute import fitting_threads, threads
from registry.home import Home


def run_pipelines(
    specs: Sequence[PipelineSpec],
    home: Home,
    runner: RunnerSettings,
    *,
    force: Collection[str] = (),
    selection: Selection = ALL_STEPS,
) -> dict[str, PipelineResult | BaseException]:
    """Runs pipelines at the same time, as many as the task runner has workers; one that fails stops no other.

    Steps with equal cache keys run once: the pipelines that come later wait, and take the result.

    Args:
        specs: The pipelines; their events have the name `PIPELINE/STEP`.
        home: The home with all state.
        runner: A task runner with processes.
        force: Names of steps to run even if they are cached.
        selection: The steps of partial runs.

    Returns:
        The result of each pipeline, or its error, by the pipeline's name.
    """

    def run_all() -> dict[str, PipelineResult | BaseException]:
        futures = {
            spec.name: submit_work(
                spec.name, _Pipeline(spec, home, frozenset(force) & spec.steps.keys(), selection).run, spec.name
            )
            for spec in specs
        }
        return {name: wait_for_result(future) for name, future in futures.items()}

    # The workers compute with as many threads as this process.
    with prefect_server(), threads(fitting_threads(bases_of(specs))), started_runner(runner, home) as started:
        return run_as_flow("matrix", run_all, runner=started)()


@dataclass(frozen=True)
class _Pipeline:
    """A pipeline as a task; plain data that can be pickled."""

    spec: PipelineSpec
    home: Home
    force: Collection[str]
    selection: Selection

    def run(self) -> PipelineResult:
        """Runs the pipeline in the worker."""
        return run_pipeline(self.spec, self.home, force=self.force, selection=self.selection, runner=IN_THREADS)
