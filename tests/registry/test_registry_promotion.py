import dataclasses
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.entities import AdapterVersion, ArtifactRef, Event
from registry.errors import Conflict, PromotionError, Refused, UnknownVersion, VersionError
from registry.event_log import read_events
from registry.maintenance.fsck import fsck
from registry.policy.alias_policy import PRESETS, AliasPolicy, PolicyFacts
from registry.policy.alias_policy import decide as decide_by
from registry.policy.consent import ConsentFindings
from registry.policy.license_terms import UNRESTRICTED
from registry.queries import alias_table
from registry.versions import promotion
from registry.versions.projections import replay
from registry.versions.promotion import history, promote, rollback

GATE = {"metric": "clip_t", "of": "difference", "min": 0.0, "max": 1.0, "value": 0.5, "passed": True}
VERSION = AdapterVersion(
    name="zorb",
    version=1,
    sha256="a" * 64,
    size=1,
    artifact=ArtifactRef("adapter", "b" * 64, 1),
    adapter_path="adapter.safetensors",
    report=None,
    aliases=(),
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    run_id=None,
    mlflow_run_id=None,
    card={},
    metrics={"clip_t": {"difference": 0.5}},
    gates=(GATE,),
    passed=True,
    parents=(),
)


CLEAN = PolicyFacts(terms=UNRESTRICTED, consent=ConsentFindings(), actor="ada@lab")


def decide(version, alias, **facts):
    return decide_by(version, PRESETS["default"].get(alias, AliasPolicy()), dataclasses.replace(CLEAN, **facts))


def state(versions):
    with versions.lineage.database.read() as session:
        return alias_table(session), read_events(session)


def test_version_with_passed_gates_may_have_any_alias():
    assert all(decide(VERSION, alias).allowed for alias in ("staging", "production", "best"))


@pytest.mark.parametrize(
    ("changes", "alias", "reason"),
    [
        ({"passed": None, "gates": ()}, "staging", "were not run"),
        ({"passed": False, "gates": ()}, "staging", "did not pass"),
        ({"gates": ()}, "production", "no gate was set"),
        ({"gates": ({**GATE, "passed": False},)}, "production", "gate clip_t (difference) did not pass"),
        ({"gates": ({**GATE, "value": -0.5},)}, "production", "below its minimum 0"),
        ({"gates": ({**GATE, "value": 1.5},)}, "staging", "above its maximum 1"),
        ({"gates": ({**GATE, "value": None},)}, "production", "has the value None"),
        ({"gates": ({**GATE, "value": float("nan")},)}, "production", "has the value nan"),
        ({"metrics": {"a": {"b": [float("inf")]}}}, "best", "metric a.b.0 is inf"),
    ],
)
def test_every_failing_condition_is_a_reason(changes, alias, reason):
    decision = decide(dataclasses.replace(VERSION, **changes), alias)
    assert not decision.allowed
    assert len(decision.reasons) == 1
    assert reason in decision.reasons[0]


def test_all_reasons_come_at_once():
    bad = dataclasses.replace(VERSION, metrics={"x": float("nan")}, gates=({**GATE, "value": -1}, {**GATE, "value": 2}))
    assert len(decide(bad, "production", damage=["adapter: gone", "report: gone"]).reasons) == 5


def test_policy_of_other_aliases_requires_intact_bytes_only():
    unevaluated = dataclasses.replace(VERSION, passed=None, gates=())
    assert decide(unevaluated, "mine").allowed
    assert not decide(unevaluated, "mine", damage=["gone"]).allowed
    assert decide(dataclasses.replace(VERSION, gates=()), "staging").allowed


def test_promotion_is_logged_with_actor_reason_and_gates(synced, register):
    register(synced, b"weights", alias_request="staging")
    event = promote(synced, "zorb", "staging", "production", reason="looks right", actor="ada@lab")
    assert (event.before, event.after, event.actor, event.reason) == (None, 1, "ada@lab", "looks right")
    assert [gate["metric"] for gate in event.gates] == ["clip_t"]
    assert synced.show("zorb", "production").aliases == ("production", "staging")
    assert history(synced, "zorb", "production") == [event]
    assert synced.is_synced()


def test_promotion_of_the_current_version_adds_no_event(versions, register):
    register(versions, b"weights")
    event = promote(versions, "zorb", 1, "production", reason="first")
    assert promote(versions, "zorb", 1, "production", reason="again") == event
    assert len(state(versions)[1]) == 1


REVIEWED = [
    lambda version: version.version,
    lambda version: str(version.version),
    lambda version: version.ref,
    lambda version: version.sha256,
    lambda version: version.sha256[:8].upper(),
    lambda version: f"sha256:{version.sha256}",
]


@pytest.mark.parametrize("name_of", REVIEWED)
def test_reviewed_version_is_promoted_while_its_alias_stays_and_refused_once_it_moved(versions, register, name_of):
    first = register(versions, b"first", alias_request="staging")
    promote(versions, "zorb", "staging", "canary", reason="r", expected_source=name_of(first))
    second = register(versions, b"second", alias_request="staging")
    promote(versions, "zorb", 2, "production", reason="r")
    before = state(versions)
    assert before[0] == {("zorb", "canary"): 1, ("zorb", "production"): 2, ("zorb", "staging"): 2}
    # Also where nothing would move: production is the version that staging is now.
    for alias in ("canary", "production"):
        with pytest.raises(Conflict) as caught:
            promote(versions, "zorb", "staging", alias, reason="r", expected_source=name_of(first))
        for version in (first, second):
            assert f"{version.ref} (sha256 {version.sha256[:16]})" in str(caught.value)
        assert "zorb@staging: " in str(caught.value)
        assert "since event 3: stage by" in str(caught.value)
    assert state(versions) == before


@pytest.mark.parametrize("ref", ["staging", "latest"])
def test_reference_that_moves_while_the_policy_decides_is_a_conflict(versions, register, monkeypatch, ref):
    register(versions, b"first", alias_request="staging")

    def decide_late(*arguments, **facts):
        register(versions, b"second", alias_request="staging")
        return promotion_policy(*arguments, **facts)

    promotion_policy = promotion.evaluate_policy
    monkeypatch.setattr(promotion, "evaluate_policy", decide_late)
    with pytest.raises(Conflict, match=r"zorb@2 \(sha256 [0-9a-f]{16}\), not zorb@1 \("):
        promote(versions, "zorb", ref, "production", reason="r")
    assert state(versions)[0] == {("zorb", "staging"): 2}


@pytest.mark.parametrize("text", ["staging", "abc", "", "g" * 64, "other@1", "-1"])
def test_expected_version_that_is_neither_number_nor_digest_is_refused(versions, register, text):
    register(versions, b"first", alias_request="staging")
    with pytest.raises(PromotionError, match="neither a number nor a digest"):
        promote(versions, "zorb", "staging", "production", reason="r", expected_source=text)
    assert list(state(versions)[0]) == [("zorb", "staging")]


def test_expected_version_that_does_not_exist_is_named_in_the_conflict(versions, register):
    register(versions, b"first", alias_request="staging")
    for expected, name in ((7, "version 7"), ("0" * 10, "sha256 0000000000")):
        with pytest.raises(Conflict, match=rf"this is zorb@1 \(.*\), not {name} as expected"):
            promote(versions, "zorb", 1, "production", reason="r", expected_source=expected)


def test_refused_promotion_moves_nothing_and_is_logged(versions, register):
    register(versions, b"good")
    promote(versions, "zorb", 1, "production", reason="first")
    register(versions, b"bad", passed=False, gates=[{**GATE, "value": -1}])
    versions.store.blobs.path(versions.show("zorb", 2).sha256).write_bytes(b"BAD")
    with pytest.raises(Refused) as caught:
        promote(versions, "zorb", 2, "production", reason="hope")
    assert len(caught.value.reasons) == 2
    assert all(reason in str(caught.value) for reason in caught.value.reasons)
    assert versions.show("zorb", "production").version == 1
    last = history(versions, "zorb")[-1]
    assert (last.action, last.before, last.after) == ("refuse", 1, 2)


@pytest.mark.parametrize("reason", ["", "  \n"])
def test_promotion_without_a_reason_is_refused(versions, register, reason):
    register(versions, b"weights")
    with pytest.raises(PromotionError, match="without a reason"):
        promote(versions, "zorb", 1, "production", reason=reason)
    assert state(versions) == ({}, [])


def test_bad_alias_and_unknown_version_are_refused(versions, register):
    register(versions, b"weights")
    with pytest.raises(VersionError, match="invalid alias"):
        promote(versions, "zorb", 1, "Production", reason="r")
    with pytest.raises(UnknownVersion):
        promote(versions, "zorb", "staging", "production", reason="r")


def test_stale_expectation_is_a_conflict_that_names_the_change(versions, register):
    for content in (b"1", b"2", b"3"):
        register(versions, content)
    promote(versions, "zorb", 1, "production", reason="first")
    promote(versions, "zorb", 2, "production", reason="better", actor="ada@lab", expected=1)
    with pytest.raises(
        Conflict, match=r"version 2, not at version 1 as expected, since event 2: promote by ada@lab \(better\)"
    ):
        promote(versions, "zorb", 3, "production", reason="mine", expected=1)
    with pytest.raises(Conflict, match="not at nothing"):
        promote(versions, "zorb", 3, "production", reason="mine", expected=None)
    with pytest.raises(Conflict, match="points at nothing"):
        promote(versions, "zorb", 3, "other", reason="mine", expected=1)
    assert versions.show("zorb", "production").version == 2


def test_repeated_rollback_moves_one_version_further_back(synced, register):
    for content in (b"1", b"2", b"3"):
        version = register(synced, content)
        promote(synced, "zorb", version.version, "production", reason="next")
    assert [rollback(synced, "zorb", reason="bad").after for _ in range(2)] == [2, 1]
    with pytest.raises(PromotionError, match="cannot be rolled back"):
        rollback(synced, "zorb")
    promote(synced, "zorb", 3, "production", reason="fixed elsewhere")
    assert rollback(synced, "zorb").after == 1
    aliases, events = state(synced)
    assert replay(events) == aliases
    assert fsck(synced.home, grace=0) == []


def test_rollback_to_an_earlier_version_of_choice(versions, register):
    for content in (b"1", b"2", b"3", b"4"):
        register(versions, content)
    for number in (1, 2, 3):
        promote(versions, "zorb", number, "production", reason="next")
    with pytest.raises(PromotionError, match="to version 4"):
        rollback(versions, "zorb", to=4)
    event = rollback(versions, "zorb", to=1, reason="2 was bad too", actor="ada@lab")
    assert (event.action, event.before, event.after, event.actor) == ("rollback", 3, 1, "ada@lab")


def test_rollback_to_damaged_bytes_is_refused(versions, register):
    for content in (b"1", b"2"):
        promote(versions, "zorb", register(versions, content).version, "production", reason="next")
    versions.store.blobs.path(versions.show("zorb", 1).sha256).unlink()
    with pytest.raises(Refused, match="are gone"):
        rollback(versions, "zorb")
    assert versions.show("zorb", "production").version == 2


def test_rollback_of_an_alias_that_was_never_set_is_refused(versions, register):
    register(versions, b"1")
    with pytest.raises(UnknownVersion, match="production"):
        rollback(versions, "zorb")


MOVES = st.lists(st.tuples(st.sampled_from(["promote", "rollback", "refuse"]), st.integers(1, 4)), max_size=30)


@given(MOVES)
def test_replay_ignores_refusals_and_the_clock(moves):
    events = [
        Event(seq, "zorb", "production", action, None, after, "a", "r", (), datetime.fromtimestamp(1e9 - seq, UTC))
        for seq, (action, after) in enumerate(moves, 1)
    ]
    applied = [after for action, after in moves if action != "refuse"]
    expected = {("zorb", "production"): applied[-1]} if applied else {}
    assert replay(events) == replay(reversed(events)) == expected
