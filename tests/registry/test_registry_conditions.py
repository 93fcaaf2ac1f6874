"""Tests that the policy of an alias holds whenever the alias is used, and that what does not meet it is listed."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from registry import Registry, event_log
from registry.documents.keys import make_key, trust_key
from registry.documents.signing import sign
from registry.errors import Refused
from registry.maintenance.fsck import fsck
from registry.policy.conditions import find_lockouts, judge_alias, read_alias_states
from registry.versions.promotion import history, promote, rollback
from registry.versions.revocation import revoke
from tests.registry.conftest import GATE


def write_policy(versions, content):
    (versions.home.path / "policy.yaml").write_text(content)


def problems(versions):
    return [(problem.what, problem.where, problem.severity) for problem in fsck(versions.home, mlflow=False)]


@pytest.fixture
def released(versions, register):
    """A version in production, whose policy then requires a signature."""
    register(versions, b"weights")
    promote(versions, "zorb", 1, "production", reason="r")
    assert problems(versions) == []
    write_policy(versions, "aliases: {production: {needs_signature: true}}")
    return versions.show("zorb", "production")


def test_an_alias_whose_version_does_not_meet_its_policy_names_no_version(versions, released, tmp_path):
    with pytest.raises(Refused, match="it does not meet the policy of 'production' any more") as error:
        versions.get("zorb", "production")
    assert error.value.reasons == ("it is not signed",)
    assert versions.get("zorb", 1) == released, "the number is no alias"
    assert versions.get("zorb") == released
    registry = Registry(versions)
    for use in (lambda found: found.read(), lambda found: found.checkout(tmp_path / "adapter.safetensors")):
        with pytest.raises(Refused, match="it is not signed"):
            use(registry["zorb@production"])
        use(registry["zorb@1"])


def test_audit_and_status_list_what_does_not_meet_its_policy(versions, released):
    found = ("version 1 does not meet the policy: it is not signed", "zorb@production", "warning")
    assert problems(versions) == [found]
    with versions.lineage.database.read() as session:
        (state,) = read_alias_states(versions, session)
    assert (state.version, state.reasons) == (1, ("it is not signed",))


def test_a_promotion_that_changes_nothing_is_judged(versions, released):
    with pytest.raises(Refused, match="it is not signed"):
        promote(versions, "zorb", 1, "production", reason="again")
    assert [event.action for event in history(versions, "zorb", "production")] == ["promote", "refuse"]
    event = promote(versions, "zorb", 1, "production", reason="by contract", override=True)
    assert (event.action, event.before, event.after) == ("override", 1, 1)
    assert versions.get("zorb", "production") == released, "what was overridden does not count again"
    assert promote(versions, "zorb", 1, "production", reason="again") == event
    assert problems(versions) == []
    revoke(versions, "5" * 64, reason="r")
    assert judge_alias(versions, released, "production").reasons == ("image 555555555555 was revoked",)


def test_a_rollback_to_a_version_that_does_not_meet_the_policy_is_refused_unless_it_was_overridden(versions, register):
    register(versions, b"bad", passed=False, gates=[{**GATE, "value": -1}])
    register(versions, b"good")
    promote(versions, "zorb", 1, "production", reason="r", override=True)
    promote(versions, "zorb", 2, "production", reason="r")
    assert rollback(versions, "zorb").after == 1
    promote(versions, "zorb", 2, "production", reason="r")
    write_policy(versions, "aliases: {production: {needs_signature: true}}")
    with pytest.raises(Refused, match="cannot be rolled back") as error:
        rollback(versions, "zorb")
    assert error.value.reasons == ("it is not signed",)


def test_a_logged_signature_that_is_gone_is_found(versions, register, empty_home, tmp_path):
    version = register(versions, b"weights")
    for name in ("first", "second"):
        make_key(tmp_path / name, None)
        trust_key(empty_home, tmp_path / f"{name}.pub")
        sign(versions, version, tmp_path / name)
    assert problems(versions) == []
    with versions.lineage.database.write() as session:
        session.execute(text("DELETE FROM version_records WHERE kind = 'signature'"))
    ((what, where, severity),) = problems(versions)
    assert what.startswith("its signature is gone: event 2 logged one of ")
    assert (where, severity) == ("zorb@1", "damage")
    sign(versions, version, tmp_path / "first")
    assert problems(versions) == []


@pytest.mark.parametrize("movers", ["[nobody@nowhere]", "[ada]"])
def test_a_policy_that_locks_everyone_out_is_noticed(versions, register, movers):
    register(versions, b"weights", alias_request="staging")
    write_policy(versions, f"aliases: {{production: {{movers: {movers}}}}}")
    ((what, where, severity),) = problems(versions)
    assert what.startswith("no known user may move the alias 'production': movers are ")
    assert (where, severity) == ("policy of production", "warning")
    write_policy(versions, "policy: strict")
    with versions.lineage.database.read() as session:
        assert dict(find_lockouts(versions, session)) == {
            "production": "no version can become 'production': it needs a signature, and no trusted key is valid"
        }


def test_a_user_of_the_log_may_move_an_alias(versions, register):
    register(versions, b"weights")
    promote(versions, "zorb", 1, "trial", reason="r", actor="ada@lab")
    write_policy(versions, "aliases: {production: {movers: ['*@lab']}}")
    assert problems(versions) == []


def test_a_clock_that_goes_back_revives_no_expired_consent(versions, from_images, monkeypatch):
    """The consent expires between the clock and the newest event."""
    expires = (datetime.now(UTC) + timedelta(days=30)).date().isoformat()
    from_images(b"weights", {"6" * 64: None}, rights={"expires": expires})
    promote(versions, "zorb", 1, "production", reason="r")
    assert versions.get("zorb", "production").version == 1
    monkeypatch.setattr(event_log, "now", lambda: datetime.now(UTC) + timedelta(days=60))
    promote(versions, "zorb", 1, "trial", reason="r")
    monkeypatch.undo()
    with pytest.raises(Refused, match=r"expired on .* \(by event 2 of .*; the clock went back\)"):
        versions.get("zorb", "production")
    event = promote(versions, "zorb", 1, "production", reason="the clock was wrong", override=True)
    assert "expired on" in event.details["overridden"][0]
    assert versions.get("zorb", "production").version == 1
    assert any("the clock went back" in what for what, _, _ in problems(versions))
