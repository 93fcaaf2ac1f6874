"""Tests queued retrainings under kills, and the check that finds lost and repeated ones."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from flows.pipeline import run_pipeline
from flows.spec import load_spec
from registry import event_log
from registry.versions.versions import Versions
from tests.faults.queued import NAMES, PROJECT, check_queue, kill_queued, prepare_queue


@pytest.mark.nightly
def test_no_queued_retraining_is_lost_or_done_twice_when_workers_and_runs_are_killed(
    tmp_path: Path, prefect_database: Path
) -> None:
    result = kill_queued(tmp_path, 30, 15, seed=1, database=prefect_database)
    assert result.violations == []
    assert result.run_kills > 0
    assert result.worker_kills > 0
    assert result.repeated > 0


@pytest.mark.usefixtures("prefect_server")
def test_the_check_of_the_queue_finds_a_lost_retraining_one_that_was_staged_twice_and_a_wrong_alias(
    tmp_path: Path,
) -> None:
    home, specs = prepare_queue(tmp_path, 2)
    run_pipeline(load_spec(specs[0]), home)
    assert check_queue(home, 1) == []
    assert any("1 versions of 1 adapters, not 2" in entry for entry in check_queue(home, 2)), "one is lost"
    run_pipeline(load_spec(specs[0]), home)
    assert check_queue(home, 1) == [], "the same retraining again changes nothing"
    with closing(Versions(home)) as versions, versions.lineage.database.write() as session:
        version = dataclasses.replace(versions.show("queued-0", 1))
        event_log.log_alias_event(session, version, "trial", 1, action="stage", actor="x", reason="twice")
    assert any("staged 2 times" in entry for entry in check_queue(home, 1))


def test_the_automations_are_valid_and_name_our_flows() -> None:
    from prefect.events.schemas.automations import AutomationCore

    from flows.prefect import FLOW
    from flows.retrain import retrain

    document = yaml.safe_load((PROJECT / "deploy" / "requeue.yaml").read_text())
    automations = [AutomationCore.model_validate(entry) for entry in document["automations"]]
    names = {name for entry in automations for name in _listed(entry.trigger.match_related["prefect.resource.name"])}
    assert names == {FLOW, retrain.name}
    page = (PROJECT / "docs" / "scheduling.md").read_text()
    assert all(f"| `{entry.name}` |" in page for entry in automations)
    assert NAMES > 1


def _listed(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]
