"""Laws of roles over all events and operations; every change of the registry asks the roles and logs refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import get_args

import pytest

from registry.entities import Action, EventType
from registry.errors import PolicyError, Refused
from registry.identity import Actor
from registry.maintenance.fsck import fsck
from registry.policy.identity_policy import IdentityPolicy
from registry.policy.policy_file import read_policies
from registry.policy.roles import REQUIREMENTS, Operation, Permission, Role, find_denial
from registry.store.cells import find_damaged_cells
from registry.versions.deletion import delete, restore, withdraw
from registry.versions.endorsement import endorse
from registry.versions.projections import replay
from registry.versions.promotion import promote, read_log, remove, rollback
from registry.versions.revocation import lift, revoke
from registry.versions.versions import Versions
from registry.versions.voting import log_comparison, vote

PERMISSIONS = get_args(Permission)
OPERATIONS = [literal for part in get_args(Operation) for literal in (get_args(part) or (part,))]
ALL = "{may: [train, stage, promote, endorse, vote, revoke, administer], members: [root]}"
OPEN = IdentityPolicy()


def test_every_event_and_operation_has_a_requirement() -> None:
    assert set(OPERATIONS) == REQUIREMENTS.keys()
    assert {*get_args(Action), *get_args(EventType)} < REQUIREMENTS.keys()
    assert {*REQUIREMENTS.values()} == {*PERMISSIONS, "move", "none"} - {"stage", "promote"}


@pytest.mark.parametrize(("granted", "asked"), list(itertools.product(PERMISSIONS, PERMISSIONS)))
def test_a_role_grants_its_permission_and_no_other(granted, asked) -> None:
    roles = {"one": Role(may=(granted,), members=("*@lab",), adapters=("style-*",), aliases=("production",))}

    def denial(actor: str = "ada@lab", name: str = "style-7", alias: str = "production") -> str:
        return find_denial(roles, OPEN, actor, asked, name=name, alias=alias)

    assert (denial() == "") is (granted == asked)
    for other in ({"actor": "ada@LAB"}, {"actor": "ada@lab2"}, {"name": "my-style-7"}, {"alias": "production2"}):
        assert denial(**other) != "", "patterns match the whole text, case included"
    assert find_denial({}, OPEN, "eve", asked, name="x") == "", "without roles, everyone may do everything"


@pytest.mark.parametrize("established", ["declared", "os", "oidc", "signed", "token"])
@pytest.mark.parametrize("accepted", ["declared", "os", "oidc", "signed", "token"])
def test_only_accepted_ways_to_establish_an_actor_count(established, accepted) -> None:
    identity = IdentityPolicy(accept=(accepted,))
    actor = Actor("ada@lab", established)
    assert (find_denial({}, identity, actor, "train") == "") is (established == accepted)
    assert (find_denial({}, identity, "text alone", "train") == "") is (accepted == "declared")


def change_of(operation: str, versions: Versions, register: Callable[..., object]) -> Callable[[str], object]:
    """Prepares a registry for an operation, and returns a function that does it as an actor."""
    register(versions, b"1", actor="root")
    register(versions, b"2", actor="root")
    for number in (1, 2):
        promote(versions, "zorb", number, "canary", reason="r", actor="root")
    if operation == "restore":
        withdraw(versions, "zorb", 1, reason="r", actor="root")
    if operation == "lift":
        revoke(versions, "5" * 64, reason="r", actor="root", policy="flag")
    artifact = versions.show("zorb", 2).artifact
    compared = {"against": "zorb@1", "artifact": artifact, "prompts": ["0" * 32]}
    cast = {"comparison": artifact.sha256, "pair": 0, "choice": "tie", "left": "candidate"}
    if operation == "vote":
        log_comparison(versions, "zorb", 2, actor="root", **compared)
    changes: dict[str, Callable[[str], object]] = {
        "register": lambda actor: register(versions, b"3", actor=actor),
        "promote": lambda actor: promote(versions, "zorb", 1, "canary", reason="r", actor=actor),
        "override": lambda actor: promote(versions, "zorb", 1, "production", reason="r", actor=actor, override=True),
        "rollback": lambda actor: rollback(versions, "zorb", "canary", actor=actor),
        "remove": lambda actor: remove(versions, "zorb", "canary", reason="r", actor=actor),
        "endorse": lambda actor: endorse(versions, "zorb", 1, "canary", reason="r", actor=actor),
        "compare": lambda actor: log_comparison(versions, "zorb", 2, actor=actor, **compared),
        "vote": lambda actor: vote(versions, "zorb", 2, actor=actor, **cast),
        "withdraw": lambda actor: withdraw(versions, "zorb", 1, reason="r", actor=actor),
        "delete": lambda actor: delete(versions, "zorb", 1, reason="r", actor=actor),
        "restore": lambda actor: restore(versions, "zorb", 1, reason="r", actor=actor),
        "revoke": lambda actor: revoke(versions, "zorb@1", reason="r", actor=actor),
        "lift": lambda actor: lift(versions, "5" * 64, reason="r", actor=actor),
    }
    return changes[operation]


NEEDED = {
    "register": "train",
    "promote": "stage",
    "override": "promote",
    "rollback": "stage",
    "remove": "revoke",
    "endorse": "endorse",
    "compare": "vote",
    "vote": "vote",
    "withdraw": "revoke",
    "delete": "revoke",
    "restore": "administer",
    "revoke": "revoke",
    "lift": "administer",
}
"""Each operation that a user asks for -> its permission; only `override` moves a protected alias."""


def test_every_operation_of_a_user_is_tried() -> None:
    # These follow from others, only read, or are tried elsewhere: import, gc and repair through the command line.
    others = {"import", "gc", "repair", "stage", "flag", "refuse", "export", "recall", "sign", "link"}
    assert NEEDED.keys() | others == set(OPERATIONS)


@pytest.mark.parametrize("operation", NEEDED)
def test_a_change_needs_its_permission_and_a_refusal_is_logged_and_changes_nothing(operation, versions, register):
    change = change_of(operation, versions, register)
    members = {permission: f"{permission}@lab" for permission in PERMISSIONS}
    roles = "".join(f"  {name}: {{may: [{name}], members: ['{user}']}}\n" for name, user in members.items())
    (versions.home.path / "policy.yaml").write_text(f"roles:\n{roles}")
    before = (versions.list(deleted=True), replay(read_log(versions)))
    for permission, user in members.items():
        if permission == NEEDED[operation]:
            continue
        with pytest.raises(Refused, match=f"{user} has no role that may {NEEDED[operation]}"):
            change(user)
        refusal = read_log(versions)[-1]
        assert (refusal.action, refusal.actor) == ("refuse", user)
        assert refusal.details["actor"] == {"established": "declared"}
        assert refusal.details["refused"] == {"override": "promote"}.get(operation, operation)
        assert "has no role" in refusal.reason
    assert (versions.list(deleted=True), replay(read_log(versions))) == before
    change(members[NEEDED[operation]])
    assert read_log(versions)[-1].action != "refuse"
    assert fsck(versions.home, grace=0, mlflow=False) == []


def test_a_version_whose_registrar_may_not_stage_is_registered_without_its_alias(versions, register):
    (versions.home.path / "policy.yaml").write_text("roles: {trainer: {may: [train], members: ['*@lab']}}\n")
    version = register(versions, b"1", alias_request="staging", actor="bob@lab")
    assert version.aliases == ()
    assert [(event.action, event.actor) for event in read_log(versions)] == [
        ("register", "bob@lab"),
        ("refuse", "bob@lab"),
    ]


def test_a_revocation_needs_a_role_for_every_affected_adapter(versions, from_images):
    from_images(b"1", {"1" * 64: "C-1"}, name="style-1")
    from_images(b"2", {"1" * 64: "C-1"}, name="face-1")
    (versions.home.path / "policy.yaml").write_text(
        "roles: {guard: {may: [revoke], members: [eve], adapters: ['style-*']}}\n"
    )
    with pytest.raises(Refused, match="eve has no role that may revoke face-1"):
        revoke(versions, "C-1", reason="r", actor="eve")
    assert read_log(versions)[-1].action == "refuse"
    assert revoke(versions, "C-1", reason="r", actor="eve", dry_run=True).versions == ("face-1@1", "style-1@1")


def test_a_long_refusal_is_cut_in_the_log(versions, register):
    register(versions, b"1")
    members = [f"{'m' * 900}-{number}" for number in range(8)]
    roles = {f"r{number}": members for number in range(8)}
    text = "".join(f"  {name}: {{may: [revoke], members: {list(users)}}}\n" for name, users in roles.items())
    (versions.home.path / "policy.yaml").write_text(f"roles:\n{text}")
    with pytest.raises(Refused):
        withdraw(versions, "zorb", 1, reason="r", actor="x" * 5_000)
    (event,) = read_log(versions)
    assert (len(event.reason), len(event.actor)) == (4_003, 320)


def test_a_refusal_about_an_unknown_adapter_is_logged_without_it(versions):
    (versions.home.path / "policy.yaml").write_text(f"roles: {{all: {ALL}}}\n")
    with pytest.raises(Refused, match="eve has no role that may revoke none"):
        withdraw(versions, "none", 1, reason="r", actor="eve")
    (event,) = read_log(versions)
    assert (event.name, event.details["name"]) == ("", "none")
    with versions.lineage.database.read() as session:
        assert list(find_damaged_cells(session)) == []


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        ("{a: {may: [fly], members: [x]}}", "roles.a.may.0"),
        ("{a: {may: [], members: [x]}}", "roles.a.may"),
        ("{a: {may: [train]}}", "roles.a.members"),
        ("{a: {may: [train], members: []}}", "roles.a.members"),
        ("{a: {may: [train], members: [x], adapter: [y]}}", "roles.a.adapter"),
        ("[train]", "roles"),
    ],
)
def test_invalid_roles_are_refused_with_their_key(roles, problem, versions):
    (versions.home.path / "policy.yaml").write_text(f"roles: {roles}\n")
    with pytest.raises(PolicyError, match=problem):
        read_policies(versions.home.path)


def test_a_home_without_roles_logs_registrations_as_earlier_releases_did(versions, register):
    register(versions, b"1", alias_request="staging", actor="bob")
    assert [event.action for event in read_log(versions)] == ["stage"]
