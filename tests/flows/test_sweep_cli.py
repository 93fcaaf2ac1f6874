"""`loraline sweep` searches settings, continues where it stopped, prunes, and registers the best trial."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from flows.sweep import run_sweep, sweep_key
from flows.sweep_file import load_sweep
from lora_engine.errors import InterruptedRun, SettingsError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.progress import clear_stop, request_stop
from tasks.sweep.records import measure_adapter, read_trials, read_value, trial_folder, write_trial
from tasks.sweep.spec import SweepSettings, TrialRecord
from tests.flows.commands import loraline_here, say
from tests.flows.shared import Trained

SWEEP = """\
sweep:
  metric: adapter.validation_loss
  direction: minimize
  trials: 3
  seed: 3
  parameters:
    adapter.rank: {values: [1, 2, 4]}
    adapter.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
"""
STEPS = """\
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 2, batch: 2, validate_every: 1}
  report:   {uses: evaluate, adapter: adapter, dataset: captions, seeds: 1, steps: 1, max_pictures: 1}
  release:  {uses: register, adapter: adapter}
"""
EXAMPLE = Path(__file__).parents[2] / "examples" / "zorb" / "sweep.yaml"
Write = Callable[..., Path]


@pytest.fixture
def swept(pipeline: Write) -> Write:
    """Returns a function that writes a pipeline file with a section `sweep`."""

    def write(sweep: str = SWEEP, steps: str = STEPS) -> Path:
        path = pipeline()
        text = path.read_text().replace(
            "{uses: ingest, images: images/}", "{uses: ingest, images: images/, heldout: 0.5}"
        )
        path.write_text(text.replace("steps:\n", f"{sweep}steps:\n") + steps)
        return path

    return write


def trainings(home: Path, status: str = "COMPLETED") -> list[str]:
    with closing(Lineage(Home(home.absolute()).lineage_url)) as lineage:
        return [entry.key for entry in lineage.executions() if entry.uses == "train" and entry.status == status]


def folder_of_trials(home: Path) -> Path:
    (folder,) = (Home(home.absolute()).cache / "sweeps").iterdir()
    return folder


@pytest.mark.usefixtures("prefect_server", "trained_here")
def test_an_interrupted_sweep_continues_and_registers_the_best_trial(swept: Write, home: Path) -> None:
    pytest.importorskip("optuna")
    path, opened = swept(), Home.open(home)

    def stop_after_the_first(record: TrialRecord) -> None:
        if record.number == 0:
            request_stop()

    with pytest.raises(InterruptedRun):
        run_sweep(load_sweep(path), opened, stop_after_the_first)
    clear_stop()
    assert [record.number for record in read_trials(folder_of_trials(home)).values()] == [0]
    assert len(trainings(home)) == 1

    result = json.loads(say("sweep", path, "--json", home=home))
    trials = result["trials"]
    assert [trial["state"] for trial in trials] == ["completed"] * 3
    assert len(trainings(home)) == len({json.dumps(trial["values"]) for trial in trials}) == 3
    best = min(trials, key=lambda trial: trial["value"])
    assert result["best"] == best["number"]
    assert all(trial["parameters"] > 0 and trial["size"] > 0 and trial["seconds"] > 0 for trial in trials)

    with closing(Versions(opened)) as versions:
        (version,) = versions.list("try")
    assert version.artifact.sha256 == best["adapter"]
    done = version.card["recipe"]["done"]["sweep"]
    assert (done["among"], done["value"]) == (3, best["value"])
    assert "chosen among 3 trials" in done["why"]
    assert version.card["recipe"]["rank"] == best["values"]["adapter.rank"]
    with closing(Lineage(opened.lineage_url)) as lineage:
        (registration,) = [entry for entry in lineage.executions() if entry.uses == "register"]
        children = registration.settings["settings"]["sweep"]["trials"]
        assert [child["adapter"] for child in children] == [trial["adapter"] for trial in trials]
        assert all(lineage.executions(output=child["adapter"]) for child in children)
    page = Path(result["page"]).read_text()
    assert page.count("<svg") == 3
    assert "http" not in page

    again = json.loads(say("sweep", path, "--json", home=home))
    assert again["trials"] == trials
    assert len(trainings(home)) == 3
    # Without its record, a trial is the cached run of a pipeline.
    (folder_of_trials(home) / "0001.json").write_text("damaged")
    repeated = json.loads(say("sweep", path, "--json", home=home))
    assert repeated["trials"] == trials
    assert len(trainings(home)) == 3


@pytest.mark.usefixtures("prefect_server", "trained_here")
def test_trials_above_the_median_of_earlier_ones_are_stopped(swept: Write, home: Path) -> None:
    pytest.importorskip("optuna")
    sweep = load_sweep(swept(SWEEP.replace("trials: 3", "trials: 6\n  parallel: 2")))
    opened = Home.open(home)
    for number in range(4):
        # Losses that no training of these images reaches.
        write_trial(
            trial_folder(opened, sweep_key(sweep, opened)),
            TrialRecord(
                number=number,
                values={"adapter.rank": 1, "adapter.learning_rate": 0.001 * (number + 1)},
                state="completed",
                value=0.01,
                curve=((1, 0.01), (2, 0.01)),
                adapter="0" * 64,
            ),
        )
    result = json.loads(say("sweep", sweep.document.path, "--json", home=home))
    pruned = result["trials"][4:]
    assert pruned[0]["values"] != pruned[1]["values"]
    for trial in pruned:
        assert (trial["state"], [step for step, _ in trial["curve"]]) == ("pruned", [1])
        assert "above the median" in trial["why"]
    # The winner alone was trained to its end.
    assert (len(trainings(home)), len(trainings(home, "INTERRUPTED"))) == (1, 2)
    assert result["best"] == 0


CHANGES: Sequence[tuple[str, str, str]] = [
    ("adapter.rank:", "adapter.rnk:", "did you mean 'rank'?"),
    ("adapter.rank:", "adaptor.rank:", "did you mean 'adapter'?"),
    ("adapter.rank:", "report.seeds:", "does not depend on"),
    ("high: 1.0e-2", "high: 1.0e-4", "its range is empty"),
    ("values: [1, 2, 4]", "values: []", "its values are empty"),
    ("values: [1, 2, 4]", "values: [1, 0]", "adapter.rank cannot be 0"),
    ("low: 1.0e-4", "low: 0", "has no logarithm"),
    ("trials: 3", "trials: 100000", "less than or equal to 1000"),
    ("adapter.validation_loss", "adapter.choice_loss", "set best_checkpoint"),
    ("adapter.validation_loss", "adapter.validation_los", "did you mean 'validation_loss'?"),
    ("adapter.validation_loss", "report.class_drift", "add class_drift to report.extra"),
    ("adapter.validation_loss", "reprt.validation_loss", "did you mean 'report'?"),
    ("    adapter.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}\n", "", ""),
    ("trials: 3", "trials: 4", ""),
]


@pytest.mark.parametrize(("before", "after", "message"), CHANGES, ids=[change[1] or "fewer" for change in CHANGES])
def test_a_sweep_that_cannot_run_is_refused_before_anything_runs(
    swept: Write, home: Path, before: str, after: str, message: str
) -> None:
    path = swept(SWEEP.replace(before, after))
    if not message:
        assert load_sweep(path).adapter == "adapter"
        return
    done = loraline_here("sweep", path, home=home)
    assert done.returncode == 2
    assert message in done.stderr
    assert "pipeline.yaml:" in done.stderr
    assert not home.exists()


def test_a_file_without_a_sweep_or_a_registration_is_refused(swept: Write) -> None:
    with pytest.raises(SpecError, match="declares no sweep"):
        load_sweep(swept(""))
    path = swept(steps=STEPS.replace("  release:  {uses: register, adapter: adapter}\n", ""))
    with pytest.raises(SpecError, match="the winner would be lost"):
        load_sweep(path)
    evaluated = STEPS.replace("evaluate, adapter: adapter", "evaluate, adapter: other@1")
    with pytest.raises(SpecError, match="which no trial makes"):
        load_sweep(swept(SWEEP.replace("adapter.validation_loss", "report.drift"), evaluated))
    four = SWEEP.replace("trials: 3", "trials: 4").partition("    adapter.learning_rate")[0]
    with pytest.raises(SpecError, match="have only 3 combinations"):
        load_sweep(swept(four))


def test_the_example_is_a_sweep_over_its_training() -> None:
    sweep = load_sweep(EXAMPLE)
    assert (sweep.adapter, sweep.registering()) == ("adapter", ["release"])
    assert sweep.trial_steps == {"photos", "prepared", "captions", "adapter", "report"}
    trial = sweep.with_values({"adapter.rank": 16})
    assert set(trial.steps) == sweep.trial_steps
    assert trial.steps["adapter"].model_dump()["rank"] == 16


def test_the_metric_of_an_evaluation_is_that_of_its_report(trained: Trained) -> None:
    def declare(metric: str) -> SweepSettings:
        parameters = {"adapter.rank": {"values": [1, 2]}}
        return SweepSettings.model_validate(
            {"parameters": parameters, "metric": metric, "direction": "minimize", "trials": 2}
        )

    version = trained.version()
    assert version.report is not None
    value = read_value(trained.home, declare("report.validation_loss"), version.report)
    assert value == version.metrics["validation_loss"]["adapter"]
    with pytest.raises(SettingsError, match=r"'report\.class_drift', which was not measured"):
        read_value(trained.home, declare("report.class_drift"), version.report)
    facts = measure_adapter(trained.home, version.artifact)
    assert facts["size"] == version.size
    assert facts["adapter"] == version.artifact.sha256
