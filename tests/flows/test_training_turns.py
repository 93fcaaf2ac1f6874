"""Tests that trainings of one home take turns on a device: between processes, and with one or two slots."""

from __future__ import annotations

import os
import signal
from itertools import groupby
from pathlib import Path

import pytest

from flows.plan import plan_pipeline
from flows.spec import load_spec
from registry.home import Home
from registry.lineage.record import Lineage
from tasks.device_locks import count_holders
from tasks.devices import device_slot
from tasks.execution import execute
from tasks.job import prepare_job
from tasks.progress import StepEvent, listening
from tests.faults.points import Trial, forked
from tests.faults.work import Tell
from tests.flows.commands import loraline_here
from tests.flows.conftest import PREPARE
from tests.flows.shared import training_here

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

TRAIN = "{{uses: train, dataset: captions, method: finetune, rank: 2, steps: 3, batch: 2, seed: {}}}"
BY_TURNS = "concurrency: 1\n" + PREPARE + "".join(f"  adapter{seed}: {TRAIN.format(seed)}\n" for seed in (1, 2))
ONE = PREPARE + f"  adapter: {TRAIN.format(1)}\n"


def test_two_processes_of_one_home_never_train_at_the_same_time(pipeline, home):
    import lora_engine.families.sd.model
    import lora_engine.training.run  # noqa: F401 (once, for both processes)

    path = pipeline(BY_TURNS)
    log = home.absolute().parent / "log"

    def train(name: str) -> Trial:
        def work(tell: Tell) -> None:
            opened, spec = Home.open(home), load_spec(path)
            lineage = Lineage(opened.lineage_url)
            run = lineage.start_run(spec.name, spec.source)

            def note(event: StepEvent) -> None:
                if event.kind == "progress" and event.step == name:
                    append(log, f"{name} {count_holders(opened, 'cpu')}\n")

            outputs = {}
            # The next test trains in a child, which holds the slot with its parent.
            with listening(note), training_here():
                for step in ("photos", "prepared", "captions", name):
                    source = {"dataset": (outputs[spec.steps[step].dataset],)} if step != "photos" else {}
                    job = prepare_job(step, spec.steps[step], spec.folder, concurrency=spec.concurrency)
                    outputs[step] = execute(job, source, opened, run.id).ref
            tell("trained")

        return forked(work)

    trials = [train(name) for name in ("adapter1", "adapter2")]
    assert [trial.finish() for trial in trials] == [(0, ["trained"])] * 2
    names, holders = zip(*(line.split() for line in log.read_text().splitlines()), strict=True)
    assert len(list(groupby(names))) == len(set(names)) == 2
    assert set(holders) == {"1"}


def append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


@pytest.mark.usefixtures("prefect_server")
def test_a_waiting_training_ends_with_ctrl_c_and_a_second_one_may_be_allowed(pipeline, home):
    path = pipeline("concurrency: 1\n" + ONE)
    opened = Home.open(home)
    holders: list[int] = []

    def interrupt(event: StepEvent) -> None:
        if event.kind == "waiting":
            os.kill(os.getpid(), signal.SIGINT)

    def count(event: StepEvent) -> None:
        if event.kind == "progress" and event.step == "adapter":
            holders.append(count_holders(opened, "cpu"))

    with device_slot(opened, "cpu", 1):
        with listening(interrupt):
            stopped = loraline_here("run", path, home=home)
        assert stopped.returncode == 130, stopped.stderr
        assert "adapter: waiting for device cpu" in stopped.stdout
        assert "step 'adapter': stopped while waiting for device 'cpu'" in stopped.stderr
        with listening(count):
            done = loraline_here("run", path, "--concurrency", "2", home=home)
        assert done.returncode == 0, done.stderr
    assert set(holders) == {2}
    assert count_holders(opened, "cpu") == 0
    # The number of trainings changes no bytes, so it is not part of the cache key.
    for overrides in ((), ("concurrency=3",)):
        plan = plan_pipeline(load_spec(path, overrides), opened)
        assert [step.cached for step in plan.steps] == [True] * 4


def test_a_number_of_trainings_below_one_is_refused_with_file_and_line(pipeline, home):
    path = pipeline("concurrency: 0\n" + ONE)
    refused = loraline_here("run", path, home=home)
    assert refused.returncode == 2
    assert "pipeline.yaml:1" in refused.stderr
    assert "concurrency is 0" in refused.stderr
    assert "greater than or equal to 1" in refused.stderr
    refused = loraline_here("run", pipeline(ONE), "--concurrency", "0", home=home)
    assert refused.returncode == 2
    assert "--concurrency" in refused.stderr
