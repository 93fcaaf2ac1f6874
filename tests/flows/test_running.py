"""Tests partial runs, conditions and retries of steps, each through the verbs."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from registry.home import Home
from registry.lineage.record import Lineage
from tasks.run_entry import read_run_steps
from tests.flows.commands import loraline_here, say
from tests.flows.conftest import PREPARE
from tests.flows.shared import Trained

Write = Callable[..., Path]


def planned(spec: Path, home: Path, *options: str) -> dict[str, dict]:
    return {step["name"]: step for step in json.loads(say("plan", spec, *options, "--json", home=home))}


@pytest.mark.usefixtures("prefect_server")
def test_a_partial_run_plans_and_records_only_its_steps_and_says_that_it_was_partial(
    pipeline: Write, home: Path
) -> None:
    spec = pipeline()
    refused = loraline_here("run", spec, "--only", "captions", home=home)
    assert refused.returncode != 0
    assert "not cached: photos (never ran), prepared (takes from photos, which will run)" in refused.stderr
    assert "--to prepared" in refused.stderr
    assert [*planned(spec, home, "--to", "prepared")] == ["photos", "prepared"]
    assert "2 ran, 0 cached" in say("run", spec, "--to", "prepared", home=home)
    assert [*planned(spec, home, "--from", "prepared")] == ["prepared", "captions"]
    assert "1 ran, 0 cached" in say("run", spec, "--only", "captions", home=home)
    with closing(Lineage(Home(home).lineage_url)) as lineage:
        last, first = lineage.runs()
        steps = [[entry.step for entry in lineage.executions(run.id)] for run in (first, last)]
    assert steps == [["photos", "prepared"], ["captions"]]
    assert [run.spec["partial"] for run in (first, last)] == [{"to": ["prepared"]}, {"only": ["captions"]}]
    assert "0 ran, 2 cached" in say("run", spec, "--from", "prepared", home=home)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "caption"], "--only: unknown step 'caption'"),
        (["--from", "nothing"], "--from: unknown step 'nothing'"),
        (["--to", "photo"], "Did you mean 'photos'"),
        (["--only", "photos", "--to", "captions"], "--only with --from or --to"),
        (["--from", "captions", "--to", "photos"], "no step is after captions and before photos"),
        (["--to", "photos", "--force", "captions"], "step 'captions' is not among the selected steps"),
    ],
)
def test_a_selection_that_is_not_possible_is_refused(
    pipeline: Write, home: Path, options: list[str], message: str
) -> None:
    refused = loraline_here("plan", pipeline(), *options, home=home)
    assert refused.returncode != 0
    assert message.casefold() in refused.stderr.casefold()


@pytest.mark.usefixtures("prefect_server")
def test_a_condition_decides_at_plan_time_by_a_cached_report_and_skips_what_depends_on_it(trained: Trained) -> None:
    home = trained.home.path
    report = next(name for name, step in planned(trained.spec, home).items() if step["uses"] == "evaluate")
    release = next(name for name, step in planned(trained.spec, home).items() if step["uses"] == "register")
    for text, is_skipped in ((f"{report}.gates passed", False), (f"{report}.gates failed", True)):
        step = planned(trained.spec, home, "--set", f"{release}.when={text}")[release]
        assert (step["skipped"], step["cached"]) == (is_skipped, not is_skipped), text
    unmet = f"{release}.when={report}.gates failed"
    assert "1 skipped" in say("run", trained.spec, "--set", unmet, home=home)


@pytest.mark.usefixtures("prefect_server")
def test_a_condition_on_a_report_of_the_same_run_is_decided_when_the_report_is_there(trained: Trained) -> None:
    home = trained.home.path
    steps = planned(trained.spec, home)
    report = next(name for name, step in steps.items() if step["uses"] == "evaluate")
    release = next(name for name, step in steps.items() if step["uses"] == "register")
    options = ["--set", f"{release}.when={report}.gates failed", "--force", report]
    step = planned(trained.spec, home, *options)[release]
    assert step["reason"] == f"runs if {report}.gates failed"
    assert not step["skipped"]
    result = json.loads(say("run", trained.spec, *options, "--json", home=home))
    assert result["skipped"] == {release: f"all gates of {report} passed"}
    assert release not in result["outcomes"]
    with closing(Lineage(trained.home.lineage_url)) as lineage:
        run = lineage.runs()[0]
        assert release not in {entry.step for entry in lineage.executions(run.id)}
    state = {entry["name"]: (entry["state"], entry["text"]) for entry in read_run_steps(trained.home, run.id)}
    assert state[release] == ("skipped", f"all gates of {report} passed")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("report.gates", "is no condition"),
        ("report.gates passed; rm", "is no condition"),
        ("reprot.gates passed", "which names no step"),
        ("photos.gates passed", "a step that produces a manifest"),
        ("captions.clip_tt >= 0.2", "unknown metric 'clip_tt'"),
    ],
)
def test_a_condition_that_names_nothing_is_refused_with_its_line(
    pipeline: Write, home: Path, text: str, message: str
) -> None:
    spec = pipeline(PREPARE.replace("class_word: star", f'class_word: star, when: "{text}"'))
    refused = loraline_here("plan", spec, home=home)
    assert refused.returncode != 0
    assert message in refused.stderr
    assert f"{spec.name}:" in refused.stderr


@pytest.mark.usefixtures("prefect_server")
def test_retries_are_counted_and_other_errors_are_retried_only_if_the_step_says_so(pipeline: Write, home: Path) -> None:
    def attempts(retries: str) -> int:
        text = PREPARE.replace("images: images/", f"images: images/, retries: {retries}")
        spec = pipeline(text)
        for image in (spec.parent / "images").iterdir():
            image.write_bytes(b"no image")
        with closing(Lineage(Home.open(home).lineage_url)) as lineage:
            before = len(lineage.executions())
            assert loraline_here("run", spec, home=home).returncode != 0
            return len(lineage.executions()) - before

    assert attempts("3") == 1
    assert attempts("{count: 2, delay: 0, any: true}") == 3


@pytest.mark.usefixtures("prefect_server")
def test_a_plan_has_the_cost_of_earlier_runs_and_says_what_is_unknown(pipeline: Write, home: Path) -> None:
    spec = pipeline()
    assert {step["cost"] for step in planned(spec, home).values()} == {"unknown"}
    assert "total without photos, prepared, captions" in say("plan", spec, home=home)
    say("run", spec, home=home)
    assert {step["cost"] for step in planned(spec, home).values()} == {None}
    forced = planned(spec, home, "--force", "captions")["captions"]["cost"]
    with closing(Lineage(Home(home).lineage_url)) as lineage:
        (made,) = (entry for entry in lineage.executions() if entry.step == "captions")
    assert made.ended_at is not None
    assert made.output is not None
    seconds = (made.ended_at - made.started_at).total_seconds()
    assert forced == {"seconds": seconds, "gpu_hours": 0.0, "bytes": made.output.size, "executions": 1}


def test_the_time_of_a_training_is_in_proportion_to_its_samples(trained: Trained) -> None:
    home, steps = trained.home.path, planned(trained.spec, trained.home.path)
    adapter = next(name for name, step in steps.items() if step["uses"] == "train")
    once, again = (
        planned(trained.spec, home, "--force", adapter, *options)[adapter]["cost"]["seconds"]
        for options in ((), ("--set", f"{adapter}.batch=8"))
    )
    assert again > once > 0


@pytest.mark.usefixtures("prefect_server")
def test_a_concurrency_limit_that_the_server_does_not_have_stops_steps_with_a_model_only(trained: Trained) -> None:
    home = trained.home.path
    (home / "loraline.yaml").write_text("concurrency_limit: no-such-limit\n")
    export = next(name for name, step in planned(trained.spec, home).items() if step["uses"] == "convert")
    photos = next(name for name, step in planned(trained.spec, home).items() if step["uses"] == "ingest")
    refused = loraline_here("run", trained.spec, "--only", export, "--force", export, home=home)
    assert refused.returncode != 0
    assert "prefect gcl create no-such-limit --limit 1" in refused.stderr
    assert "1 ran" in say("run", trained.spec, "--only", photos, "--force", photos, home=home)
