"""Tests the verbs of upkeep."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from pathlib import Path

import pytest

from lora_engine.files import sha256_bytes
from registry.entities import Execution
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from tasks.errors import SpecError
from tasks.operations.maintenance import collect_garbage, parse_time
from tests.flows.commands import loraline_here as loraline


@pytest.fixture
def filled(home: Path) -> Home:
    """Returns a home with one old unreferenced artifact and one of a recent run."""
    opened = Home.open(home)
    store, lineage = open_store(opened), Lineage(opened.lineage_url)
    store.put_files("manifest", {"a": b"unreferenced"})
    kept = store.put_files("manifest", {"a": b"made by a run"})
    run = lineage.start_run("stripes", {})
    lineage.log_execution(Execution("e", run.id, "s", "s", "1", "k", output=kept), contents=store.files(kept))
    lineage.finish_run(run.id, "COMPLETED")
    lineage.close()
    for path in (opened.store / "blobs").glob("??/*"):
        os.utime(path, (time.time() - 1e6,) * 2)
    return opened


def test_gc_lists_in_a_dry_run_what_it_then_deletes(filled: Home, home: Path) -> None:
    planned = loraline("gc", "--dry-run", "--json", home=home)
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["dry_run"]
    assert len(plan["items"]) == 2
    assert len(list(open_store(filled).blobs.digests())) == 4
    done = loraline("gc", home=home)
    assert "Deleted 2 items" in done.stdout
    assert "2 blobs kept" in done.stdout
    assert len(list(open_store(filled).blobs.digests())) == 2
    assert "Deleted 0 items" in loraline("gc", "--grace", "7d", home=home).stdout


def test_gc_prunes_the_training_cache(filled: Home) -> None:
    for index, name in enumerate(("old", "new")):
        path = filled.cache / "latents" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (index + 1, index + 1))
    assert collect_garbage(filled, grace=0, keep_runs=30, cache=150, dry_run=True).cache == 0
    assert collect_garbage(filled, grace=0, keep_runs=30, cache=150).cache == 100
    assert [path.name for path in filled.cache.rglob("*.safetensors")] == ["new.safetensors"]


def test_fsck_finds_and_repairs_damage(filled: Home, home: Path) -> None:
    assert loraline("fsck", home=home).returncode == 0
    lineage = Lineage(filled.lineage_url)
    (execution,) = lineage.executions()
    lineage.close()
    assert execution.output is not None
    (filled.store / "blobs" / execution.output.sha256[:2] / execution.output.sha256).write_bytes(b"damaged")
    found = loraline("fsck", "--json", home=home)
    assert found.returncode == 1
    assert [problem["severity"] for problem in json.loads(found.stdout)].count("damage") == 1
    repaired = loraline("fsck", "--repair", "--json", home=home)
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert [entry["done"] for entry in json.loads(repaired.stdout)["repaired"]] == [True]


def test_doctor_passes_and_fails_with_a_broken_setting(filled: Home, home: Path) -> None:
    good = loraline("doctor", "--json", home=home)
    findings = json.loads(good.stdout)
    assert good.returncode == 0, findings
    assert {entry["about"] for entry in findings} >= {"packages", "home", "device", "store"}
    (filled.path / "loraline.yaml").write_text("stor: x")
    bad = loraline("doctor", home=home)
    assert bad.returncode == 1
    assert "stor" in bad.stdout


def test_backup_and_restore(filled: Home, home: Path, tmp_path: Path) -> None:
    first = loraline("backup", str(tmp_path / "backups"), home=home)
    assert first.returncode == 0, first.stderr
    assert "2 blobs, 2 of them new" in first.stdout
    assert "0 of them new" in loraline("backup", str(tmp_path / "backups"), home=home).stdout
    refused = loraline("restore-backup", str(tmp_path / "backups"), home=home)
    assert refused.returncode == 1
    assert "not empty" in refused.stderr
    new = tmp_path / "new"
    restored = loraline("restore-backup", str(tmp_path / "backups"), "--json", home=new)
    assert json.loads(restored.stdout)["blobs"] == 2
    assert loraline("fsck", home=new).returncode == 0


def _add_settings(backups: Path, text: str) -> None:
    """Adds settings to a backup, as a stranger can."""
    (snapshot,) = (backups / "snapshots").iterdir()
    (snapshot / "loraline.yaml").write_text(text)
    manifest = json.loads((snapshot / "manifest.json").read_bytes())
    manifest["files"]["loraline.yaml"] = sha256_bytes(text.encode())
    (snapshot / "manifest.json").write_text(json.dumps(manifest))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "setting",
    [
        "database: sqlite:///{0}/lineage.db",
        "database: sqlite:///{0}/missing/x.db",
        "store: file://{0}/elsewhere",
        "store: simplecache::file://{0}/elsewhere",
        "mlflow: sqlite:///{0}/elsewhere.db",
    ],
)
def test_settings_in_a_backup_do_not_choose_where_the_restore_writes(
    setting: str, filled: Home, home: Path, tmp_path: Path
) -> None:
    backups, new = tmp_path / "backups", tmp_path / "new"
    (home / "policy.yaml").write_text("{}")
    assert loraline("backup", backups, home=home).returncode == 0
    _add_settings(backups, setting.format(home))
    before = _contents(home)
    done = loraline("restore-backup", backups, home=new)
    assert done.returncode == 0, done.stderr
    assert setting.partition(": ")[2].format(home) in done.stdout
    assert loraline("fsck", home=new).returncode == 0
    assert "Applies from now on: policy.yaml\n" in done.stdout
    assert not (new / "loraline.yaml").exists()
    with closing(Lineage(Home(new).lineage_url)) as lineage:
        assert len(lineage.runs()) == 1
    assert _contents(home) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"backups", "new", home.name})


def test_settings_in_a_backup_are_taken_over_on_request(filled: Home, home: Path, tmp_path: Path) -> None:
    backups, new, store = tmp_path / "backups", tmp_path / "new", tmp_path / "elsewhere"
    assert loraline("backup", backups, home=home).returncode == 0
    _add_settings(backups, f"store: file://{store}\ndatabase: sqlite:///{home}/lineage.db")
    done = loraline("restore-backup", backups, "--with-settings", "--json", home=new)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"] == {}
    assert (new / "loraline.yaml").read_text() == f"store: file://{store}\n"
    assert len([*store.glob("??/*")]) == 2
    assert loraline("fsck", home=new).returncode == 0


def test_tables_are_copied_to_a_database_that_can_be_used(filled: Home, home: Path, tmp_path: Path) -> None:
    other = f"sqlite:///{tmp_path / 'other' / 'lineage.db'}"
    done = loraline("copy-database", other, "--json", home=home)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"] == 1
    again = loraline("copy-database", other, home=home)
    assert again.returncode == 1
    assert "is not empty" in again.stderr
    (filled.path / "loraline.yaml").write_text(f"database: {other}\n")
    filled.lineage_db.unlink()
    assert loraline("fsck", home=home).returncode == 0


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("24h", 86_400), ("7d", 604_800), ("0", 0)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1h", "1y", "infd", "nan"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="invalid time"):
        parse_time(text)
