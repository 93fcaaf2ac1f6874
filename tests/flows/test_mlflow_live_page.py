"""MLflow's own page of a training that runs, in a browser."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from mlflow.entities import Run

from registry.home import Home
from tests.flows.browser import browsed
from tests.flows.commands import loraline_process
from tests.flows.shared import write_line
from tests.flows.test_watching import MEASURED, STEPS, WATCHED, mlflow_runs, training_process, wait_for
from tests.support.mlflow_server import mlflow_server


@pytest.mark.nightly
@pytest.mark.needs("chromium")
def test_the_page_of_a_running_training_shows_its_measurements_and_samples(
    tmp_path: Path, home: Path, environment: dict[str, str]
) -> None:
    def measured_run() -> Run | None:
        return next((run for run in mlflow_runs(home) if run.data.metrics.keys() >= MEASURED), None)

    spec = write_line(tmp_path, WATCHED.replace(f"steps: {STEPS}", "steps: 1000"))
    with loraline_process(environment, "run", spec) as process:
        live = wait_for(measured_run)
        child = training_process()
        assert child is not None
        os.kill(child, signal.SIGSTOP)  # it runs until the page is read
        try:
            with mlflow_server(Home(home.absolute()).mlflow_url) as address, browsed(tmp_path / "browser") as page:
                run = f"{address}/#/experiments/{live.info.experiment_id}/runs/{live.info.run_id}"
                page.open(run)
                page.wait_for_text("Running")
                for name in MEASURED:
                    page.wait_for_text(name)
                page.open(f"{run}/model-metrics")
                page.wait_for_text("Model metrics (6)")
                page.open(f"{run}/artifacts")
                page.wait_for_text("pictures")
        finally:
            process.kill()
            process.wait()
            os.kill(child, signal.SIGCONT)
    wait_for(lambda: not Path(f"/proc/{child}").exists())
