"""Tests the verbs that ask policies when an alias is used, and those that show and check the chain of the log."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.flows.commands import loraline_here, say
from tests.flows.made import register_zorb


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a home whose `zorb@1` has the alias `trial`."""
    home = register_zorb(tmp_path_factory.mktemp("conditions"))
    say("promote", "zorb@1", "--to", "trial", "--reason", "to compare", home=home)
    with closing(sqlite3.connect(home / "lineage.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """Returns a copy of that home for one test."""
    return Path(shutil.copytree(made, tmp_path / "home"))


@pytest.fixture
def stricter(home: Path) -> Path:
    """Returns a home whose policy then requires a signature for `trial`."""
    (home / "policy.yaml").write_text("aliases: {trial: {needs_signature: true}}\n")
    return home


@pytest.mark.parametrize(
    "verb",
    [
        ("export", "zorb@trial", "--to", "kohya", "-o", "OUT"),
        ("records", "zorb@trial", "--with-adapter", "-o", "OUT"),
        ("generate", "a zorb <lora:zorb@trial>", "-o", "OUT", "--base", "tiny"),
        ("merge", "zorb@trial", "zorb@1", "-o", "OUT"),
    ],
    ids=lambda verb: verb[0],
)
def test_a_verb_that_uses_an_alias_asks_its_policy(stricter: Path, tmp_path: Path, verb: tuple[str, ...]) -> None:
    out = tmp_path / "out.safetensors"
    arguments = [str(out) if argument == "OUT" else argument for argument in verb]
    refused = loraline_here(*arguments, home=stricter)
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "it does not meet the policy of 'trial' any more" in refused.stderr
    assert "it is not signed" in refused.stderr
    assert not out.exists()


def test_a_pipeline_that_names_an_alias_asks_its_policy(stricter: Path, tmp_path: Path) -> None:
    steps = "{mix: {uses: merge, adapters: [zorb@trial, zorb@1]}, release: {uses: register, adapter: mix}}"
    (tmp_path / "both.yaml").write_text(f"name: both\nbase: tiny\nsteps: {steps}\n")
    refused = loraline_here("plan", tmp_path / "both.yaml", home=stricter)
    assert refused.returncode == 1
    assert "it is not signed" in refused.stderr


def test_a_number_asks_no_policy(stricter: Path, tmp_path: Path) -> None:
    say("export", "zorb@1", "--to", "kohya", "-o", tmp_path / "out", home=stricter)
    assert (tmp_path / "out" / "zorb-v1.safetensors").is_file()


def test_status_verify_and_fsck_list_an_alias_that_does_not_meet_its_policy(home: Path, stricter: Path) -> None:
    shown = json.loads(say("status", "--json", home=stricter, code=1))
    (alias,) = shown["aliases"]
    assert (alias["name"], alias["alias"], alias["version"]) == ("zorb", "trial", 1)
    assert (alias["reasons"], alias["overridden"]) == (["it is not signed"], [])
    assert "NOT MET" in say("status", "zorb", home=stricter, code=1)
    assert json.loads(say("verify", "zorb@trial", "--json", home=stricter, code=1))["policy"] == {
        "trial": ["it is not signed"]
    }
    assert "policy of trial" in say("verify", "zorb@1", home=stricter, code=1)
    assert "version 1 does not meet the policy: it is not signed" in say("fsck", home=stricter)
    (home / "policy.yaml").unlink()
    assert "met" in say("status", home=home)
    assert json.loads(say("verify", "zorb@trial", "--json", home=home))["policy"] == {"trial": []}


def test_a_promotion_that_changes_nothing_says_so_and_is_judged(home: Path) -> None:
    again = ("promote", "zorb@1", "--to", "trial", "--reason", "again")
    assert "trial: already there, since event 1; its policy is met" in say(*again, home=home)
    assert json.loads(say(*again, "--json", home=home))["moved"] is False
    (home / "policy.yaml").write_text("aliases: {trial: {needs_signature: true}}\n")
    assert "it is not signed" in loraline_here(*again, home=home).stderr
    assert "trial: zorb@1 -> zorb@1" in say(*again, "--override", home=home)
    assert "against: it is not signed" in say("status", home=home)
    assert json.loads(say("promote", "zorb@1", "--to", "new", "--reason", "r", "--json", home=home))["moved"] is True


def test_a_policy_that_nobody_can_meet_is_noticed(home: Path) -> None:
    (home / "policy.yaml").write_text("aliases: {production: {movers: [nobody@nowhere]}}\n")
    assert "no known user may move the alias 'production'" in say("status", home=home)
    assert "no known user may move the alias 'production'" in say("fsck", home=home)


def test_a_log_without_an_earlier_head_is_found(home: Path, tmp_path: Path) -> None:
    say("export", "zorb@1", "--to", "kohya", "-o", tmp_path / "out", home=home)
    head = say("log", "--head", home=home).strip()
    shown = json.loads(say("log", "--head", "--json", home=home))
    assert head == f"{shown['seq']}:{shown['digest']}"
    assert json.loads(say("log", "--json", home=home))[-1]["digest"] == shown["digest"]
    say("backup", tmp_path / "backups", home=home)
    checks = (("--head", head), ("--against", tmp_path / "backups"))
    for check in checks:
        assert "Everything agrees" in say("fsck", *check, home=home)
    with closing(sqlite3.connect(home / "lineage.db", isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER events_no_delete")
        connection.execute("DELETE FROM events WHERE seq = 2")
        connection.execute("UPDATE sqlite_sequence SET seq = 1 WHERE name = 'events'")
    assert json.loads(say("fsck", "--json", home=home)) == [], "nothing inside the database shows it"
    for check in checks:
        assert "the log was shortened or written anew" in say("fsck", *check, home=home, code=1)
    assert "the log was shortened or written anew" in say("backup", tmp_path / "backups", home=home, code=1)
    assert "is no head of a log" in loraline_here("fsck", "--head", "17", home=home).stderr


@pytest.mark.needs("openssl")
def test_a_signed_head_of_the_log_is_verified_without_loraline(home: Path, tmp_path: Path) -> None:
    say("keys", "new", tmp_path / "release", "--without-passphrase", home=home)
    files = tmp_path / "head.json", tmp_path / "head.json.sig"
    signed = json.loads(say("log", "--head", "-o", files[0], "--key", tmp_path / "release", "--json", home=home))
    assert signed["files"] == [str(file) for file in files]
    head = json.loads(files[0].read_bytes())
    assert (head["seq"], head["digest"]) == (signed["seq"], signed["digest"])
    assert f"{head['seq']}:{head['digest']}" == say("log", "--head", home=home).strip()
    verify = ["openssl", "dgst", "-sha256", "-verify", tmp_path / "release.pub", "-signature", files[1], files[0]]
    assert subprocess.run(verify, capture_output=True).returncode == 0
    files[0].write_bytes(files[0].read_bytes().replace(b'"seq":', b'"seq": '))
    assert subprocess.run(verify, capture_output=True).returncode == 1
    refused = loraline_here("log", "-o", files[0], "--key", tmp_path / "release", home=home)
    assert (refused.returncode, "needs --head" in refused.stderr) == (1, True)


def test_a_stray_file_among_the_keys_is_a_warning(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (home / "keys").mkdir()
    (home / "keys" / "notes.pub").write_text("not a key")
    assert json.loads(say("keys", "list", "--json", home=home)) == []
    assert any("notes.pub: this is not a public key" in record.getMessage() for record in caplog.records)
