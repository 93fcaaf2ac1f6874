"""Tests the state in which a flow run ends, by what the run changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flows.registered import RegistrationState
from flows.result import FinalState, PipelineResult, final_state
from tests.flows.shared import Trained

LOW = {"metric": "clip_i_paired", "of": "adapter", "value": 0.03, "min": 0.9, "max": None, "passed": False}
HIGH = LOW | {"metric": "drift", "value": 0.5, "min": None, "max": 0.1}
MISSING = LOW | {"value": None}
PASSED = LOW | {"value": 0.95, "passed": True}


def registered(
    trained: Trained, *gates: dict[str, Any], alias: str | None = "staging", has_alias: bool = False, refused: str = ""
) -> RegistrationState:
    version = replace(trained.version(), gates=gates, passed=all(gate["passed"] for gate in gates) if gates else None)
    return RegistrationState(version, alias, version.version if has_alias else None, (refused,) if refused else (), "")


@pytest.mark.parametrize(
    ("gates", "options", "expected"),
    [
        ([LOW], {"refused": "gate"}, ("GatesFailed", "small@1 not staged: clip_i_paired 0.03 < 0.9", True)),
        ([PASSED, HIGH], {"refused": "gate"}, ("GatesFailed", "small@1 not staged: drift 0.5 > 0.1", True)),
        ([MISSING], {"refused": "gate"}, ("GatesFailed", "small@1 not staged: clip_i_paired has no value", True)),
        ([LOW], {"alias": None}, ("GatesFailed", "small@1: clip_i_paired 0.03 < 0.9", True)),
        ([LOW], {"alias": "trial", "has_alias": True}, ("Staged", "small@1 as trial", False)),
        ([PASSED], {"refused": "no consent"}, ("Refused", "small@1 not staged: no consent", True)),
        ([], {"alias": "trial", "refused": "not run"}, ("Refused", "small@1 not trial: not run", True)),
        ([PASSED], {"has_alias": True}, ("Staged", "small@1", False)),
        ([PASSED], {}, ("Registered", "small@1", False)),
        ([PASSED], {"alias": None}, ("Registered", "small@1", False)),
    ],
)
def test_the_state_of_a_run_names_its_new_version_and_why_it_was_not_staged(
    trained: Trained, gates: list[dict[str, Any]], options: dict[str, Any], expected: tuple[str, str, bool]
) -> None:
    result = PipelineResult({}, {"release": "no result"}, {"release": registered(trained, *gates, **options)})
    assert final_state(result) == FinalState(*expected)


def test_one_failed_version_of_several_decides_the_state(trained: Trained) -> None:
    versions = {"good": registered(trained, PASSED, has_alias=True), "bad": registered(trained, LOW, refused="gate")}
    state = final_state(PipelineResult({}, dict.fromkeys(versions, "no result"), versions))
    assert state == FinalState("GatesFailed", "small@1; small@1 not staged: clip_i_paired 0.03 < 0.9", failed=True)


def test_an_unchanged_run_names_a_version_that_is_still_refused_and_does_not_fail(trained: Trained) -> None:
    versions = {"release": registered(trained, LOW, refused="gate")}
    state = final_state(PipelineResult({}, {}, versions))
    assert state.name == "NothingChanged"
    assert not state.failed
    assert state.message == "every step is cached; small@1 not staged: clip_i_paired 0.03 < 0.9"
