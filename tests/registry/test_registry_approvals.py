"""Tests the two-person rule: endorsements, who counts, what they are bound to, and races."""

from __future__ import annotations

import pytest

from registry import event_log
from registry.errors import GoneVersion, PolicyError, PromotionError, Refused
from registry.identity import Actor
from registry.maintenance.fsck import fsck
from registry.maintenance.repair import repair
from registry.policy.approvals import endorsed_digests
from registry.policy.policy_file import read_policies
from registry.versions.deletion import withdraw
from registry.versions.endorsement import endorse, list_endorsements
from registry.versions.projections import project_states, replay
from registry.versions.promotion import history, promote, read_log, rollback
from registry.versions.revocation import revoke
from registry.versions.versions import Versions

TWO = "aliases: {production: {needs_approvals: 2, by_others: true, needs_licence: none, needs_consent: none}}\n"


@pytest.fixture
def strict(versions: Versions, register) -> Versions:
    """Returns versions of a home whose production needs two approvals; bob registered zorb@1 and zorb@2."""
    (versions.home.path / "policy.yaml").write_text(TWO)
    for content in (b"1", b"2"):
        register(versions, content, actor="bob")
    return versions


def release(versions: Versions, actor: str, number: int = 1, **options: object):
    return promote(versions, "zorb", number, "production", reason="release", actor=actor, **options)


def approve(versions: Versions, actor: str, number: int = 1, alias: str = "production", **options: object):
    return endorse(versions, "zorb", number, alias, reason="looks right", actor=actor, **options)


def test_production_needs_two_users_other_than_the_one_who_registered_it(strict):
    with pytest.raises(Refused, match=r"0 of 2 approvals; needs 2 more by other users than bob"):
        release(strict, "bob")
    with pytest.raises(Refused, match=r"1 of 2 approvals \(ann\); needs one more by another user than bob"):
        release(strict, "ann")
    with pytest.raises(Refused, match="1 of 2 approvals"):
        release(strict, "ann", override=True)
    approve(strict, "ann")
    with pytest.raises(Refused, match=r"1 of 2 approvals \(ann\); needs one more"):
        release(strict, "ann")
    with pytest.raises(Refused, match="1 of 2 approvals"):
        release(strict, "ANN")
    assert release(strict, "carl").after == 1
    assert release(strict, "bob").after == 1, "it is in production already, so nothing moves"
    assert fsck(strict.home, grace=0, mlflow=False) == []


def test_the_registrar_may_promote_what_two_others_endorsed(strict):
    approve(strict, "ann")
    approve(strict, "carl")
    assert release(strict, "bob").actor == "bob"


def test_without_by_others_the_registrar_counts(strict):
    (strict.home.path / "policy.yaml").write_text(TWO.replace("true", "false"))
    approve(strict, "ann")
    assert release(strict, "bob").after == 1


def test_the_registrar_cannot_endorse_and_the_refusal_is_logged(strict):
    with pytest.raises(Refused, match="bob registered it"):
        approve(strict, "bob")
    assert (read_log(strict)[-1].action, read_log(strict)[-1].details["refused"]) == ("refuse", "endorse")
    assert list_endorsements(strict, strict.show("zorb", 1)) == []


def test_an_endorsement_counts_for_its_version_and_alias_only(strict):
    approve(strict, "ann", number=2)
    approve(strict, "ann", alias="staging")
    with pytest.raises(Refused, match="0 of 2 approvals"):
        release(strict, "bob")


def test_an_endorsement_of_other_digests_does_not_count(strict):
    version = strict.show("zorb", 1)
    for key in endorsed_digests(version):
        details = {"alias": "production", **endorsed_digests(version), key: "0" * 64}
        with strict.lineage.database.write() as session:
            event_log.log_event(session, "endorse", actor=Actor("eve"), reason="r", version=version, details=details)
    assert list_endorsements(strict, version) == []
    with pytest.raises(Refused, match=r"1 of 2 approvals \(carl\)"):
        release(strict, "carl")


def test_an_endorsement_can_be_taken_back_and_given_again(strict):
    first = approve(strict, "ann")
    assert approve(strict, "ann") == first, "a second one adds no event"
    with pytest.raises(PromotionError, match="carl has not endorsed it"):
        approve(strict, "carl", withdraw=True)
    approve(strict, "ann", withdraw=True)
    with pytest.raises(Refused, match=r"1 of 2 approvals \(carl\)"):
        release(strict, "carl")
    approve(strict, "ann")
    assert [str(entry.actor) for entry in list_endorsements(strict, strict.show("zorb", 1))] == ["ann"]
    assert release(strict, "carl").after == 1


def test_an_endorsement_of_a_user_who_lost_the_role_or_whose_identity_is_no_longer_accepted_does_not_count(strict):
    roles = "roles: {all: {may: [promote, endorse], members: [ann, carl]}}\n"
    (strict.home.path / "policy.yaml").write_text(TWO + roles)
    approve(strict, "ann")
    (strict.home.path / "policy.yaml").write_text(TWO + roles.replace("ann, ", ""))
    with pytest.raises(Refused, match=r"1 of 2 approvals \(carl\)"):
        release(strict, "carl")
    (strict.home.path / "policy.yaml").write_text(TWO + roles + "identity: {accept: [oidc]}\n")
    with pytest.raises(Refused, match=r"1 of 2 approvals \(carl\)"):
        release(strict, Actor("carl", "oidc"))
    approve(strict, Actor("ann", "oidc"))
    assert release(strict, Actor("carl", "oidc")).after == 1


def test_a_rollback_needs_no_new_approval_and_a_withdrawn_version_gets_none(strict):
    for number in (1, 2):
        approve(strict, "ann", number)
        release(strict, "carl", number)
    approve(strict, "ann", 1, withdraw=True)
    assert rollback(strict, "zorb", "production", actor="carl").after == 1
    withdraw(strict, "zorb", 2, reason="r", actor="carl")
    with pytest.raises(GoneVersion):
        approve(strict, "ann", 2)


def test_a_pipeline_cannot_register_straight_into_production(strict, register):
    version = register(strict, b"3", alias_request="production", actor="bob")
    assert version.aliases == ()
    assert "0 of 2 approvals" in read_log(strict)[-1].reason


def test_endorsements_move_no_alias_in_any_projection_of_the_log(strict):
    approve(strict, "ann", 2)
    release(strict, "carl", 2)
    approve(strict, "dora", 1)
    events = read_log(strict)
    assert replay(events) == {("zorb", "production"): 2}
    assert project_states(events) == {}
    assert [event.action for event in history(strict, "zorb", "production")] == ["promote"]
    assert repair(strict.home, mlflow=False) == []
    assert revoke(strict, "zorb@2", reason="r", policy="withdraw").taken_back == {"zorb@production": None}


@pytest.mark.parametrize(("key", "value"), [("needs_approvals", 6), ("needs_approvals", -1), ("by_others", "'yes'")])
def test_invalid_approvals_are_refused(key, value, versions):
    (versions.home.path / "policy.yaml").write_text(f"aliases: {{production: {{{key}: {value}}}}}\n")
    with pytest.raises(PolicyError, match=f"aliases.production.{key}"):
        read_policies(versions.home.path)


def test_an_endorsement_that_is_taken_back_between_the_decision_and_the_move_does_not_count(strict, monkeypatch):
    approve(strict, "ann")
    own = strict.lineage.database.write
    taken_back = []

    def write():
        if not taken_back:
            taken_back.append(True)
            approve(strict, "ann", withdraw=True)
        return own()

    monkeypatch.setattr(strict.lineage.database, "write", write)
    with pytest.raises(Refused, match="1 of 2 approvals"):
        release(strict, "carl")
    assert replay(read_log(strict)) == {}


RACERS = """
import sys, time
from pathlib import Path
from registry.versions import promotion
from registry.errors import Conflict, Refused
from registry.home import Home
from registry.versions.endorsement import endorse
from registry.versions.versions import Versions
Versions.sync = lambda *arguments, **settings: None
versions = Versions(Home.open(sys.argv[1]))
user, rounds, folder = sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
won = []
for number in range(1, rounds + 1):
    (folder / f"{user}-{number}").touch()
    while not all((folder / f"{rival}-{number}").exists() for rival in ("ann", "carl")):
        time.sleep(0.0005)
    endorse(versions, "zorb", number, "production", reason="race", actor=user)
    try:
        event = promotion.promote(versions, "zorb", number, "production", reason="race", actor=user)
        won.append(str(event.seq))
    except (Conflict, Refused):
        pass
print(",".join(won))
"""


def test_two_processes_that_endorse_and_promote_at_once_move_the_alias_once_with_both_endorsements_before(
    versions, register, spawn, tmp_path
):
    rounds = 8
    (versions.home.path / "policy.yaml").write_text(TWO)
    for number in range(rounds):
        register(versions, bytes([number]), actor="bob")
    children = [spawn(RACERS, versions.home.path, user, rounds, tmp_path) for user in ("ann", "carl")]
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    events = read_log(versions)
    for number in range(1, rounds + 1):
        own = [event for event in events if event.after == number]
        (moved,) = [event.seq for event in own if event.action == "promote"]
        users = {event.actor for event in own if event.action == "endorse" and event.seq < moved}
        promoter = next(event.actor for event in own if event.seq == moved)
        assert users | {promoter} == {"ann", "carl"}
    assert replay(events) == {("zorb", "production"): rounds}
