"""Tests users, roles and the two-person rule through the command line, and that a run is refused before it starts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.pipeline import run_pipeline
from flows.spec import load_spec
from flows.sweep import run_sweep
from flows.sweep_file import load_sweep
from registry.errors import Refused
from registry.home import Home
from registry.policy.policy_file import read_policies
from registry.versions.promotion import promote, read_log
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here as loraline
from tests.flows.commands import say
from tests.flows.conftest import PREPARE
from tests.flows.test_rights_cli import adapter_bytes

TRAIN = """\
  adapter: {uses: train, dataset: captions, method: dreambooth, kind: lora, rank: 2, steps: 20}
  release: {uses: register, adapter: adapter, name: style-1}
"""
SWEEP = """\
sweep:
  metric: adapter.validation_loss
  direction: minimize
  trials: 2
  parameters: {adapter.rank: {values: [1, 2]}}
"""
ROLES = """\
identity: {signers: {robot: ["ci-*"]}}
aliases: {production: {needs_approvals: 2, by_others: true}}
roles:
  trainer:  {may: [train, stage], members: ["ci-*"], adapters: ["style-*"]}
  reviewer: {may: [endorse], members: [ann@example.com]}
  releaser: {may: [endorse, promote, revoke], members: [carl@example.com]}
  admin:    {may: [administer], members: [root]}
"""


@pytest.fixture
def roles(home: Path) -> Path:
    """Returns a home with roles."""
    Home.open(home)
    (home / "policy.yaml").write_text(ROLES)
    return home


def register(home: Path, name: str = "style-1", content: bytes = b"1") -> None:
    """Registers an adapter as ci-nightly, without MLflow."""
    versions = Versions(Home.open(home))
    artifact = versions.store.put_files("adapter", {"adapter.safetensors": content})
    versions.register(name, artifact, actor="ci-nightly")
    versions.close()


def events(home: Path) -> list[tuple[str, str, str | None]]:
    """Returns action, actor and refused operation of each event."""
    log = json.loads(say("log", "--json", home=home))
    return [(event["action"], event["actor"], event["details"].get("refused")) for event in log]


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)


def test_the_current_user_is_shown_with_how_it_was_established_and_its_roles(roles: Path) -> None:
    shown = loraline("actor", "show", home=roles, LORALINE_ACTOR="carl@example.com").stdout
    assert "carl@example.com" in shown
    assert "releaser" in shown
    report = json.loads(loraline("actor", "show", "--json", home=roles, LORALINE_ACTOR="eve").stdout)
    assert report == {"name": "eve", "established": "declared", "accepted": True, "roles": [], "has_roles": True}
    (roles / "policy.yaml").write_text(ROLES.replace("{signers:", "{accept: [oidc], signers:"))
    report = json.loads(loraline("actor", "show", "--json", home=roles, LORALINE_ACTOR="carl@example.com").stdout)
    assert (report["accepted"], report["roles"]) == (False, [])
    refused = loraline("actor", "show", home=roles, LORALINE_OIDC_TOKEN="x.y.z")
    assert (refused.returncode, "x.y.z" in refused.stdout + refused.stderr) == (1, False)
    assert "trusts no issuer" in refused.stderr


def test_a_signed_user_is_made_and_used_through_the_command_line(roles: Path, tmp_path: Path) -> None:
    key = tmp_path / "robot"
    say("keys", "new", key, "--without-passphrase", "--trust", home=roles)
    value = say("actor", "sign", "ci-nightly", "--key", key, "--expires", "8h", home=roles).strip()
    report = json.loads(loraline("actor", "show", "--json", home=roles, LORALINE_SIGNED_ACTOR=value).stdout)
    assert (report["name"], report["established"], report["roles"]) == ("ci-nightly", "signed", ["trainer"])
    assert report["key_name"] == "robot"
    other = loraline("actor", "sign", "carl@example.com", "--key", key, home=roles)
    assert (other.returncode, other.stdout) == (1, "")
    for expires, code in (("0s", 1), ("400d", 1), ("soon", 2)):
        done = loraline("actor", "sign", "ci-x", "--key", key, "--expires", expires, home=roles)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr


def test_two_users_release_a_version_and_show_lists_the_endorsement(roles: Path) -> None:
    (roles / "policy.yaml").write_text(
        ROLES.replace("by_others: true", "by_others: true, needs_evaluation: false, needs_gate: false")
    )
    register(roles)
    move = ("promote", "style-1@1", "--to", "canary", "--reason", "r")
    refused = loraline(*move, home=roles, LORALINE_ACTOR="ann@example.com")
    assert (refused.returncode, "has no role that may stage style-1@canary" in refused.stderr) == (1, True)
    endorse = ("endorse", "style-1@1", "--for", "production", "--reason", "looks right")
    done = loraline(*endorse, home=roles, LORALINE_ACTOR="ann@example.com")
    assert "style-1@1: endorsed for production by ann@example.com" in done.stdout
    again = json.loads(loraline(*endorse, "--json", home=roles, LORALINE_ACTOR="ann@example.com").stdout)
    assert again["details"]["sha256"] == json.loads(say("show", "style-1@1", "--json", home=roles))["sha256"]
    assert "ann@example.com" in say("show", "style-1@1", home=roles)
    (entry,) = json.loads(say("show", "style-1@1", "--json", home=roles))["endorsements"]
    assert (entry["alias"], entry["actor"], entry["established"]) == ("production", "ann@example.com", "declared")
    loraline(*endorse, "--withdraw", home=roles, LORALINE_ACTOR="ann@example.com")
    assert json.loads(say("show", "style-1@1", "--json", home=roles))["endorsements"] == []
    assert loraline(*endorse, "--expect", "2", home=roles, LORALINE_ACTOR="ann@example.com").returncode == 1
    assert loraline(*endorse, home=roles, LORALINE_ACTOR="eve").returncode == 1
    assert events(roles) == [
        ("register", "ci-nightly", None),
        ("refuse", "ann@example.com", "promote"),
        ("endorse", "ann@example.com", None),
        ("endorse", "ann@example.com", None),
        ("refuse", "eve", "endorse"),
    ]


@pytest.mark.parametrize(
    ("verb", "operation"),
    [
        (("withdraw", "style-1@1", "--reason", "r"), "withdraw"),
        (("delete", "style-1@1", "--reason", "r"), "delete"),
        (("restore", "style-1@1", "--reason", "r"), "restore"),
        (("rollback", "style-1", "--alias", "canary"), "rollback"),
        (("unalias", "style-1@canary", "--reason", "r"), "remove"),
        (("revoke", "style-1@1", "--reason", "r"), "revoke"),
        (("lift", "style-1@1", "--reason", "r"), "lift"),
        (("gc",), "gc"),
        (("fsck", "--repair"), "repair"),
    ],
)
def test_a_verb_is_refused_without_a_role_and_the_log_has_it(
    verb: tuple[str, ...], operation: str, roles: Path
) -> None:
    register(roles)
    register(roles, content=b"2")
    versions = Versions(Home.open(roles))
    for number in (1, 2):
        promote(versions, "style-1", number, "canary", reason="r", actor="ci-nightly")
    versions.close()
    done = loraline(*verb, home=roles, LORALINE_ACTOR="eve")
    assert done.returncode == 1, done.stdout
    assert "eve has no role that may" in done.stderr
    assert "Traceback" not in done.stderr
    assert events(roles)[-1] == ("refuse", "eve", operation)


def test_the_policy_on_the_page_about_access_is_valid(home: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "access.md").read_text()
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "permissions:" not in block]
    Home.open(home)
    (home / "policy.yaml").write_text("".join(blocks))
    policies = read_policies(home)
    assert policies.identity.signers == {"robot": ("ci-*",)}
    assert set(policies.roles) == {"trainer", "reviewer", "releaser", "admin"}
    assert (policies.of("production").needs_approvals, policies.of("production").by_others) == (2, True)


def test_garbage_is_collected_by_an_administrator_and_a_dry_run_needs_no_role(roles: Path) -> None:
    assert loraline("gc", "--dry-run", home=roles, LORALINE_ACTOR="eve").returncode == 0
    assert loraline("gc", home=roles, LORALINE_ACTOR="root").returncode == 0


def test_an_import_is_refused_before_anything_is_stored(roles: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(adapter_bytes(tmp_path, 1.0))
    done = loraline(
        "import",
        file,
        "--name",
        "face-1",
        "--base",
        "tiny",
        "--license",
        "MIT",
        home=roles,
        LORALINE_ACTOR="ci-nightly",
    )
    assert done.returncode == 1
    assert "ci-nightly has no role that may train face-1" in done.stderr
    assert events(roles)[-1] == ("refuse", "ci-nightly", "import")
    assert not any((roles / "store").rglob("*.safetensors"))
    assert json.loads(say("list", "--json", home=roles)) == []


def test_a_run_that_may_not_register_is_refused_before_its_first_step(
    roles: Path, pipeline: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALINE_ACTOR", "eve")
    spec = load_spec(pipeline(PREPARE + TRAIN))
    with pytest.raises(Refused, match="eve has no role that may train style-1"):
        run_pipeline(spec, Home.open(roles))
    versions = Versions(Home.open(roles))
    assert versions.lineage.runs() == []
    assert [(event.action, event.details["refused"]) for event in read_log(versions)] == [("refuse", "register")]
    versions.close()


def test_a_sweep_that_may_not_register_is_refused_before_its_first_trial(
    roles: Path, pipeline: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALINE_ACTOR", "eve")
    train = TRAIN.replace("steps: 20", "steps: 20, validate_every: 5")
    path = pipeline(PREPARE.replace("images: images/", "images: images/, heldout: 0.5") + train + SWEEP)
    with pytest.raises(Refused, match="eve has no role that may train style-1"):
        run_sweep(load_sweep(path), Home.open(roles))
