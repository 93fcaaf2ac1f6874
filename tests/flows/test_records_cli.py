"""Tests the verbs on documents and signatures with a registered adapter of real tensors."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import model_signing
import pytest

from lora_engine.files import sha256_file
from registry.home import Home
from registry.store.artifacts import open_store
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here
from tests.flows.made import register_zorb

DOCUMENTS = {"model-card.md", "model-card.html", "provenance.json", "ml-bom.json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a home with `zorb@1`, created once."""
    return register_zorb(tmp_path_factory.mktemp("records"))


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """Returns a copy of that home for one test."""
    return Path(shutil.copytree(made, tmp_path / "home"))


def loraline(*arguments: object, home: Path, secret: str = "a secret") -> subprocess.CompletedProcess[str]:
    return loraline_here(*arguments, home=home, LORALINE_KEY_PASSPHRASE=secret)


def done(*arguments: object, home: Path) -> str:
    completed = loraline(*arguments, home=home)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_card_is_printed_and_written(home: Path, tmp_path: Path) -> None:
    text = done("card", "zorb", home=home)
    assert text.startswith("---\nbase_model: tiny\n")
    done("card", "zorb@1", "-o", tmp_path / "card.md", home=home)
    assert (tmp_path / "card.md").read_text() == text
    done("card", "zorb@1", "-o", tmp_path / "card.html", home=home)
    assert (tmp_path / "card.html").read_text().startswith("<!doctype html>")
    refused = loraline("card", "zorb@1", "-o", tmp_path / "card.pdf", home=home)
    assert refused.returncode == 2
    assert ".md or .html" in refused.stderr


def test_records_are_written_with_their_digests(home: Path, tmp_path: Path) -> None:
    listed = json.loads(done("records", "zorb", "-o", tmp_path / "out", "--json", home=home))
    assert {Path(entry["file"]).name for entry in listed} == DOCUMENTS
    for entry in listed:
        assert sha256_file(Path(entry["file"])) == entry["sha256"]


def test_version_is_signed_verified_and_refused_without_a_trusted_key(home: Path, tmp_path: Path) -> None:
    key = tmp_path / "release"
    done("keys", "new", key, "--trust", "--days", 30, home=home)
    assert b"ENCRYPTED" in key.read_bytes()
    (listed,) = json.loads(done("keys", "list", "--json", home=home))
    assert listed["name"] == "release"
    unsigned = json.loads(done("verify", "zorb", "--json", home=home))
    assert (unsigned["holds"], unsigned["is_signed"]) == (True, False)
    assert loraline("verify", "zorb", "--signed", home=home).returncode == 1
    assert loraline("sign", "zorb", "--key", key, home=home, secret="wrong").returncode == 1
    signed = json.loads(done("sign", "zorb", "--key", key, "--json", home=home))
    assert signed["key"] == listed["key"]
    assert json.loads(done("verify", "zorb", "--signed", "--json", home=home))["signed_by"] == "release"
    (home / "keys" / "release.pub").unlink()
    for arguments in (["verify", "zorb"], ["export", "zorb", "--to", "kohya", "-o", tmp_path / "out"]):
        refused = loraline(*arguments, home=home)
        assert refused.returncode == 1
        assert "not among the 0 trusted public keys" in refused.stdout + refused.stderr
    assert not (tmp_path / "out").exists()


def test_another_program_verifies_an_export_with_records(home: Path, tmp_path: Path) -> None:
    key = tmp_path / "release"
    done("keys", "new", key, "--without-passphrase", "--trust", home=home)
    done("sign", "zorb@1", "--key", key, home=home)
    done("export", "zorb@1", "--to", "kohya", "-o", tmp_path / "out", "--with-records", home=home)
    records = tmp_path / "out" / "records"
    assert {path.name for path in records.iterdir()} == DOCUMENTS | {
        "signature.json",
        "adapter.safetensors",
        "exported.json",
    }
    signature = records / "signature.json"
    hashed = model_signing.hashing.Config().set_ignored_paths(paths=[signature])
    verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key.with_suffix(".pub"))
    verifier.set_hashing_config(hashed).set_ignore_unsigned_files(True).verify(records, signature)
    (records / "provenance.json").write_text("{}")
    with pytest.raises(ValueError, match=r"provenance\.json"):
        verifier.verify(records, signature)
    exported = json.loads(
        done("export", "zorb", "--to", "kohya", "-o", tmp_path / "z.safetensors", "--with-records", "--json", home=home)
    )
    assert {Path(entry["file"]).parent.name for entry in exported["records"]} == {"z-records"}


def test_verify_reports_findings_by_check(home: Path) -> None:
    store, versions = open_store(Home.open(home)), Versions(Home.open(home))
    version = versions.show("zorb")
    with versions.lineage.database.read() as session:
        from registry.documents.storage import read_records

        bill = read_records(session, version)["ml-bom"]
    versions.close()
    store.blobs.path(store.files(bill)["ml-bom.json"].sha256).write_bytes(b"{}")
    wrong = json.loads(loraline("verify", "zorb", "--json", home=home).stdout)
    assert (wrong["holds"], wrong["bytes"], wrong["structure"]) == (False, [], [])
    assert wrong["records"][0].startswith("ml-bom.json:")
    store.blobs.path(version.sha256).write_bytes(b"no adapter")
    wrong = loraline("verify", "zorb", "--json", home=home)
    assert wrong.returncode == 1
    assert version.sha256 in json.loads(wrong.stdout)["bytes"][0]
